import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrdist.backbones import BackboneConfigs
from ctrdist.backbones.dcnv2 import Config as DCNv2Config
from ctrdist.backbones.dien import Config as DIENConfig
from ctrdist.batch import Batch, Lookup, join_items
from ctrdist.errors import UserError
from ctrdist.export import DESCRIPTION, WEIGHTS, load_click_model, save_click_model
from ctrdist.group import Group
from ctrdist.items import Ragged, offsets_of
from ctrdist.language.assemble import RowTokens
from ctrdist.language.lora import LoraConfig
from ctrdist.language.masking import mask_tokens, next_tokens
from ctrdist.language.model import LanguageModel
from ctrdist.language.prompts import PromptConfig
from ctrdist.language.tokens import TokenBatch, tokenize
from ctrdist.loop import LoopConfig, fit, make_optimizer
from ctrdist.precision import Precision
from ctrdist.prompted import (
    attention_by_field,
    finetuning_task,
    load_prompted,
    load_scorer,
    pretraining_task,
    rates,
    save_prompted,
)
from ctrdist.schema import Field, Schema
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.tasks.pretrain import DomainAdaptivePretraining, PretrainConfig
from ctrdist.tasks.prompted import PromptPretrainConfig, PromptPretraining
from ctrdist.tasks.prompted_click import PromptedClick, PromptFinetuneConfig
from ctrdist.text_training import LanguageModelConfig
from tests.conftest import WORDS

SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"), Field("genre")), history_length=3)
SIZES = {"user_id": 12, "item_id": 10, "genre": 5}
DRY = BackboneConfigs(dcnv2=DCNv2Config(hidden=(8,), dropout=0.0), dien=DIENConfig(hidden=(8,), dropout=0.0))
CTR = ClickConfig(backbone="dcnv2", dim=4, lr=1e-2, table_lr=1e-2, unknown_share=0.0, networks=DRY)
TWO = PromptConfig(count=2)


def words_of(users: np.ndarray) -> list[str]:
    return ["the " * (1 + user % 3) + f"{WORDS[user]} film and {WORDS[user // 2]}" for user in users]


def batch_of(folder: Path, rows: int, seed: int = 0) -> Batch:
    draws, items = np.random.default_rng(seed), np.random.default_rng(9)
    history = np.where(np.arange(3) < draws.integers(0, 4, (rows, 1)), draws.integers(2, 10, (rows, 3)), 0)
    fields = {"item_id": np.arange(10, dtype=np.int32), "genre": np.append(0, items.integers(1, 5, 9)).astype(np.int32)}
    users = draws.integers(2, 12, rows).astype(np.int32)
    batch = join_items(draws.random(rows) < 0.4, {"user_id": users}, draws.integers(2, 10, rows), history, fields)
    tokenizer = LanguageModel.load(str(folder)).tokenizer
    return replace(batch, tokens=tokenize(tokenizer, words_of(users), users * 1000 + np.arange(rows), 24))


def still(task: Any) -> Any:
    """The same task, its language model without dropout."""
    for module in task.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return task


def reads(folder: Path, precision: Precision = "float32") -> LanguageModelConfig:
    return LanguageModelConfig(name=str(folder), precision=precision, lora=LoraConfig(use="never"))


def pretraining(folder: Path, ctr: ClickConfig = CTR, seed: int = 0, **options: Any) -> PromptPretraining:
    config = PromptPretrainConfig(**{"mask_probability": 0.4, "lm_lr": 1e-3} | options)
    click = ClickModel(SCHEMA, SIZES, rates(ctr, config), seed=seed)
    return still(pretraining_task(click, reads(folder), TWO, config, seed))


def finetuning(folder: Path, start: Path | None = None, ctr: ClickConfig = CTR, **options: Any) -> PromptedClick:
    config = PromptFinetuneConfig(**{"lm_lr": 1e-3} | options)
    click = load_click_model(start, SCHEMA, rates(ctr, config)) if start else ClickModel(SCHEMA, SIZES, ctr)
    return still(finetuning_task(click, reads(folder), TWO, config, start, seed=0))


def prompts_of(task: Any, batch: Batch) -> Tensor:
    h = task.click.represent(batch)[0]
    return task.writer((h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt())


def leaves(task: Any) -> dict[str, Tensor]:
    """The rows that each table has looked up since the last step."""
    return {f"{name}.{n}": leaf for name, t in task.click.tables.items() for n, (_, leaf) in enumerate(t._pending)}


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_loss_is_the_mean_over_the_words_to_predict(family: str, chunk: int, lm_family):
    folder = lm_family(family)
    task, batch = pretraining(folder, chunk=chunk).eval(), batch_of(folder, 11)
    out = task(batch)
    tokens, reader = batch.tokens, task.reader
    words = mask_tokens(tokens, task.vocabulary, 0.4, seed=0) if family == "bert" else next_tokens(tokens)
    prompts, total = prompts_of(task, batch), 0.0
    length = tokens.input_ids.shape[1]
    for position, target in zip(words.positions.tolist(), words.targets.tolist(), strict=True):
        row = slice(position // length, position // length + 1)
        real = slice(0, tokens.lengths[row.start])
        states = reader.states(words.input_ids[row, real], tokens.attention_mask[row, real], prompts[row])[0]
        logits = reader.language_model.token_logits(states[0, position % length][None])
        total -= torch.log_softmax(logits[0], 0)[target].item()
    name = "mlm" if family == "bert" else "clm"
    assert len(words.targets) > 10 and set(out) == {"loss", name}
    assert out["loss"].item() == out[name].item() == pytest.approx(total / len(words.targets), rel=1e-5)


def test_masks_differ_from_step_to_step_and_not_in_validation(tiny_lm: Path):
    task, batch = pretraining(tiny_lm), batch_of(tiny_lm, 11)
    torch.manual_seed(1)
    first, second = (task(batch)["loss"].item() for _ in range(2))
    torch.manual_seed(1)
    assert first == task(batch)["loss"].item() != second
    assert task.eval()(batch)["loss"] == task(batch)["loss"]


def test_gradient_reaches_tables_network_writer_and_language_model_but_not_the_head(tiny_lm: Path):
    task, batch = pretraining(tiny_lm), batch_of(tiny_lm, 20)
    make_optimizer(task)
    task(batch)["loss"].backward()
    assert set(leaves(task)) == {"user_id.0", "item_id.0", "genre.0"}
    assert all(leaf.grad.any() for leaf in leaves(task).values())
    found = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert {"click.backbone.mlp.layers.0.weight", "writer.layers.1.2.weight"} <= found.keys()
    assert all(gradient is not None and gradient.any() for name, gradient in found.items() if "key.bias" not in name)
    assert not task.click.backbone.output.weight.requires_grad
    before = {name: table.weight.clone() for name, table in task.click.tables.items()}
    fit(task, lambda first: iter([batch]), LoopConfig(1))
    assert all(not torch.equal(table.weight, before[name]) for name, table in task.click.tables.items())


@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_gradients_in_parts_are_those_of_the_whole(make: Any, tiny_lm: Path):
    found, batch = [], batch_of(tiny_lm, 11)
    for chunk in (0, 4):
        task = make(tiny_lm, chunk=chunk).double()
        make_optimizer(task)
        torch.manual_seed(5)
        task(batch)["loss"].backward()
        found.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
        found[-1] |= {name: leaf.grad for name, leaf in leaves(task).items()}
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("backbone", ["fm", "deepfm", "fignn", "dien", "autoint"])
def test_every_parameter_that_is_trained_has_a_gradient(backbone: str, tiny_lm: Path):
    """Which data-parallel training asks for, also of a worker without rows."""
    task, batch = pretraining(tiny_lm, replace(CTR, backbone=backbone)), batch_of(tiny_lm, 9)
    tuned = finetuning(tiny_lm, ctr=replace(CTR, backbone=backbone))
    for model in (task, tuned):
        make_optimizer(model)
        for rows in (batch, batch.empty()):
            model.zero_grad(set_to_none=True)
            out = model(rows)
            out["loss"].backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert ("auxiliary" in out) == (backbone == "dien")


def planted(folder: Path) -> tuple[Tensor, Any]:
    """The one word of a user's text is the user's own, and nothing but the id tells which."""
    users = np.tile(np.arange(2, 12, dtype=np.int32), 4)
    of = np.random.default_rng(3).permutation(10)
    fields = {"item_id": np.arange(10, dtype=np.int32), "genre": np.zeros(10, np.int32) + 2}
    history = np.zeros((len(users), 3), np.int64)
    batch = join_items(np.zeros(len(users)), {"user_id": users}, np.full(len(users), 3), history, fields)
    tokenizer = LanguageModel.load(str(folder)).tokenizer
    texts = [WORDS[of[user - 2]] for user in users]
    return replace(batch, tokens=tokenize(tokenizer, texts, np.arange(len(users)), 24))


def test_a_word_that_only_the_id_decides_is_learnt_through_the_prompts(tiny_lm: Path):
    batch = planted(tiny_lm)
    found = {}
    for name, shown in (("ids", batch), ("no ids", replace(batch, row_fields={"user_id": one_user(batch)}))):
        task = pretraining(tiny_lm, mask_probability=1.0, prompt_lr=1e-2, lm_lr=1e-3, head_lr=1e-2)
        fit(task, lambda first, rows=shown: iter([rows] * 80), LoopConfig(80))
        words = replace(shown, tokens=replace(shown.tokens, input_ids=masked(task, shown.tokens)))
        logits = task.reader.language_model.token_logits(
            task.reader.states(words.tokens.input_ids, words.tokens.attention_mask, prompts_of(task, words))[0][:, 1]
        )
        found[name] = torch.nn.functional.cross_entropy(logits, shown.tokens.input_ids[:, 1]).item()
    config = PretrainConfig(simcse_weight=0.0, mask_probability=1.0, lr=1e-3, head_lr=1e-2)
    plain = still(DomainAdaptivePretraining(LanguageModel.load(str(tiny_lm), head=True), config, seed=0))
    fit(plain, lambda first: iter([batch.tokens] * 80), LoopConfig(80))
    states, _ = plain.language_model.states(masked(plain, batch.tokens), batch.tokens.attention_mask)
    logits = plain.language_model.token_logits(states[:, 1])
    found["plain"] = torch.nn.functional.cross_entropy(logits, batch.tokens.input_ids[:, 1]).item()
    # Without the id ten words are alike: no model does better than log 10. The plain one has learnt that they are ten.
    chance = math.log(10)
    assert found["ids"] < 0.6 and found["no ids"] > 0.95 * chance and 0.95 * chance < found["plain"] < 1.2 * chance, (
        found
    )


def masked(task: PromptPretraining | DomainAdaptivePretraining, tokens: TokenBatch) -> Tensor:
    return torch.where(torch.arange(tokens.input_ids.shape[1]) == 1, task.vocabulary.mask_id, tokens.input_ids)


def one_user(batch: Batch) -> Lookup:
    return Lookup.of(np.full(len(batch), 2, np.int32))


LOOP = LoopConfig(2, epochs=2, schedule="linear", precision="float64")


def whole_batches(folder: str, first: int) -> Iterator[Batch]:
    for step in range(first, 4):
        yield batch_of(Path(folder), 12 if step % 2 == 0 else 6, seed=step)


def train_batches(folder: str, rank: int, size: int, first: int) -> Iterator[Batch]:
    """A worker's halves of `whole_batches`; every second one is the first worker's alone."""
    for step, rows in enumerate(whole_batches(folder, first), first):
        yield rows if size == 1 else part(rows, rank, step % 2 == 1)


def part(batch: Batch, rank: int, last: bool) -> Batch:
    mine = slice(0, len(batch)) if last else slice(6 * rank, 6 * rank + 6)
    if last and rank:
        return batch.empty()
    users, tokens = batch.row_fields["user_id"], batch.tokens
    own = TokenBatch(tokens.items[mine], tokens.input_ids[mine], tokens.attention_mask[mine], 0, tokens.lengths[mine])
    return replace(
        batch, label=batch.label[mine], row_fields={"user_id": Lookup.of(users.rows[users.index[mine]].numpy())},
        target=batch.target[mine], history=batch.history[mine], tokens=own,
    )  # fmt: skip


def trained(group: Group, folder: str) -> dict[str, dict[str, Tensor]]:
    out = {}
    for name, task in (("pretrain", pretraining(Path(folder))), ("finetune", finetuning(Path(folder)))):
        fit(task, partial(train_batches, folder, group.rank, group.size), LOOP, group=group)
        out[name] = {key: value for key, value in task.state_dict().items() if "lm_head.decoder" not in key}
    return out


def test_two_workers_end_with_the_weights_of_one(two_workers, tiny_lm: Path):
    alone, (first, second) = trained(Group(), str(tiny_lm)), two_workers(trained, str(tiny_lm))
    for name, task in (("pretrain", pretraining(tiny_lm)), ("finetune", finetuning(tiny_lm))):
        start = task.double().state_dict()
        for key, value in alone[name].items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            torch.testing.assert_close(first[name][key], value, rtol=1e-7, atol=1e-9, msg=f"{name} {key}")
        assert sum(not torch.equal(value, start[key]) for key, value in alone[name].items()) > 40


@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_a_language_model_of_rate_0_stays_as_it_is_and_has_no_dropout(make: Any, tiny_lm: Path):
    task, batch = make(tiny_lm, lm_lr=0.0), batch_of(tiny_lm, 12)
    before = {name: value.clone() for name, value in task.reader.state_dict().items()}
    task.train()
    assert not any(module.training for module in task.reader.modules()) and task.writer.training
    fit(task, lambda first: iter([batch] * 3), LoopConfig(3))
    drawn = {f"language_model.model.{name}" for name in task.reader.language_model.drawn}
    changed = {name for name, value in task.reader.state_dict().items() if not torch.equal(value, before[name])}
    # Only a head that was drawn is trained, of which the model has a bias twice; the words' vectors are frozen.
    assert {name.replace("decoder.bias", "bias") for name in changed} <= drawn
    assert bool(changed) == (make is pretraining)


@pytest.mark.parametrize("combine", ["alpha", "sum"])
def test_the_probability_is_equation_9(combine: str, tiny_lm: Path):
    task, batch = finetuning(tiny_lm, combine=combine).eval(), batch_of(tiny_lm, 13)
    with torch.no_grad():
        if combine == "alpha":
            task.alpha.fill_(0.3)
        task.output.weight.mul_(20)
        own = torch.logit(task.click.predict(batch).double())
        prompts = prompts_of(task, batch)
        texts = []
        for row in range(13):
            ids = batch.tokens.input_ids[row : row + 1, : batch.tokens.lengths[row]]
            states = task.reader.states(ids, torch.ones_like(ids), prompts[row : row + 1])[1]
            pooled = states[0, 0] if task.reader.language_model.pooling == "cls" else states[0].mean(0)
            texts.append(pooled @ task.output.weight[0] + task.output.bias[0])
        its = torch.stack(texts).double()
    expected = 0.3 * own + 0.7 * its if combine == "alpha" else own + its
    torch.testing.assert_close(torch.logit(task.predict(batch).double()), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(task.predict(batch), torch.sigmoid(task.logits(batch)[0]))
    out = task(batch)
    assert ("alpha" in out) == (combine == "alpha")
    if combine == "alpha":
        out["loss"].backward()
        residual = (torch.sigmoid(expected) - batch.label) / 13
        assert task.alpha.grad.item() == pytest.approx((residual * (own - its)).sum().item(), rel=1e-3)


def test_the_click_tower_computes_once_a_step(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch):
    task, batch, calls = finetuning(tiny_lm), batch_of(tiny_lm, 12), []
    represent = task.click.backbone.represent
    monkeypatch.setattr(task.click.backbone, "represent", lambda inputs: calls.append(1) or represent(inputs))
    task(batch)["loss"].backward()
    assert len(calls) == 1 and task.alpha.grad is not None


def test_without_prompts_the_text_says_the_same_whatever_the_ids(tiny_lm: Path):
    task, batch = finetuning(tiny_lm, prompts=False, combine="sum").eval(), batch_of(tiny_lm, 12)
    assert not any(name.startswith("writer") for name, _ in task.named_parameters())
    other = replace(batch, row_fields={"user_id": one_user(batch)})
    with torch.no_grad():
        task.click.backbone.output.weight.zero_()
        assert torch.equal(task.predict(batch), task.predict(other))
        with_prompts = finetuning(tiny_lm, combine="sum").eval()
        with_prompts.click.backbone.output.weight.zero_()
        assert not torch.equal(with_prompts.predict(batch), with_prompts.predict(other))


def test_rates_are_those_of_the_options(tiny_lm: Path):
    options = {"lr": 0.3, "prompt_lr": 0.2, "lm_lr": 0.1, "lm_schedule": "constant", "lm_warmup": 0.5}
    task = finetuning(tiny_lm, **options)
    task = PromptedClick(ClickModel(SCHEMA, SIZES, rates(CTR, task.config)), task.reader, task.config)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    found = {names[id(p)]: group for group in task.parameter_groups() for p in group["params"]}
    assert found["click.backbone.output.weight"]["lr"] == found["click.backbone.output.bias"]["lr"] == 0.3
    assert found["writer.layers.0.0.bias"]["lr"] == found["alpha"]["lr"] == found["output.weight"]["lr"] == 0.2
    own = "reader.language_model.model.encoder.layer.0.output.LayerNorm.weight"
    assert (found[own]["lr"], found[own]["schedule"], found[own]["warmup"]) == (0.1, "constant", 0.5)
    assert "schedule" not in found["alpha"] and found[own]["weight_decay"] == 0
    assert task.click.tables["user_id"].optimizer.lr == CTR.table_lr
    # As in the authors' code: biases and normalisation at AdamW's own rate, matrices at theirs.
    task.config = replace(task.config, bias_lr="adamw")
    rate = {names[id(p)]: group["lr"] for group in task.parameter_groups() for p in group["params"]}
    assert rate[own] == rate["click.backbone.output.bias"] == rate["writer.layers.0.0.bias"] == 1e-3
    assert rate["click.backbone.output.weight"] == 0.3 and rate["writer.layers.0.0.weight"] == 0.2


def test_the_language_models_rate_has_a_course_of_its_own(tiny_lm: Path):
    """Halfway through its warm-up, with the others' over at once, it takes a step half as long, the same way."""
    moved = {}
    for warmup in (0.0, 2.0):
        task, batch = finetuning(tiny_lm, lm_warmup=warmup, warmup=0.0, schedule="constant"), batch_of(tiny_lm, 12)
        before = {name: p.detach().clone() for name, p in task.named_parameters()}
        fit(task, lambda first, rows=batch: iter([rows]), LoopConfig(1))
        moved[warmup] = {name: (p - before[name]).detach() for name, p in task.named_parameters()}
    key = "reader.language_model.model.encoder.layer.0.intermediate.dense.weight"
    torch.testing.assert_close(moved[2.0][key], moved[0.0][key] / 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved[2.0]["alpha"], moved[0.0]["alpha"])


def test_what_is_saved_goes_on_and_scores_alike(tiny_lm: Path, tmp_path: Path):
    task, batch = pretraining(tiny_lm), batch_of(tiny_lm, 12)
    fit(task, lambda first: iter([batch] * 2), LoopConfig(2))
    for name in ("pretrained", "tuned"):
        (tmp_path / name).mkdir()
    save_prompted(task, tmp_path / "pretrained")
    tuned = finetuning(tiny_lm, tmp_path / "pretrained")
    for key, value in task.writer.state_dict().items():
        assert torch.equal(tuned.writer.state_dict()[key], value), key
    assert torch.equal(tuned.click.tables["user_id"].weight, task.click.tables["user_id"].weight)
    own, its = (t.reader.language_model.base.state_dict() for t in (task, tuned))
    assert all(torch.equal(own[key], its[key]) for key in own)
    fit(tuned, lambda first: iter([batch] * 2), LoopConfig(2))
    save_prompted(tuned, tmp_path / "tuned")
    loaded = load_scorer(tmp_path / "tuned", SCHEMA)
    assert isinstance(loaded, PromptedClick)
    with torch.no_grad():
        assert torch.equal(loaded.predict(batch), tuned.predict(batch))


@pytest.mark.parametrize(
    ("family", "layer"), [("gpt2", "lora_"), ("opt", "lora_"), ("qwen2", "lora_"), ("bart", "fc1")]
)
def test_other_families_are_trained_saved_and_gone_on_with(lm_family, tmp_path: Path, family: str, layer: str):
    """A decoder by adapters, which are merged where it is saved; a frozen one stays as it is."""
    lm, batch = LanguageModelConfig(name=str(lm_family(family)), precision="float32"), batch_of(lm_family(family), 12)
    for name in ("pretrained", "tuned"):
        (tmp_path / name).mkdir()

    def weights(task: Any) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in task.named_parameters() if layer in name and p.requires_grad}

    config = PromptPretrainConfig(lm_lr=1e-2)
    task = still(pretraining_task(ClickModel(SCHEMA, SIZES, rates(CTR, config)), lm, TWO, config, 0))
    before = weights(task)
    assert before
    progress = fit(task, lambda first: iter([batch] * 8), LoopConfig(4, epochs=2))
    assert progress.step == 8 and any(not torch.equal(before[name], value) for name, value in weights(task).items())
    save_prompted(task, tmp_path / "pretrained")
    for rate in (1e-2, 0.0):
        own = PromptFinetuneConfig(lm_lr=rate)
        click = load_click_model(tmp_path / "pretrained", SCHEMA, rates(CTR, own))
        tuned = still(finetuning_task(click, lm, TWO, own, tmp_path / "pretrained", seed=0))
        plain = tuned.reader.language_model.base.state_dict()
        kept = {name: value.clone() for name, value in plain.items()}
        fit(tuned, lambda first: iter([batch] * 2), LoopConfig(2))
        moved = [name for name, value in tuned.reader.language_model.base.state_dict().items()
                 if not torch.equal(value, kept[name])]  # fmt: skip
        assert bool(moved) == bool(rate)
    save_prompted(tuned, tmp_path / "tuned")
    with torch.no_grad():
        torch.testing.assert_close(load_scorer(tmp_path / "tuned", SCHEMA).predict(batch), tuned.eval().predict(batch))


@pytest.mark.parametrize(("its", "ctrs"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float32")])
def test_each_model_computes_in_its_own_precision(tiny_lm: Path, tmp_path: Path, its: Precision, ctrs: Precision):
    """In training as the options say; where rows are scored the language model does so too."""
    lm, batch = reads(tiny_lm, its), batch_of(tiny_lm, 12)
    kinds: dict[str, set[torch.dtype]] = {"lm": set(), "ctr": set()}

    def watch(task: Any) -> Any:
        for name, part in (("lm", task.reader), ("ctr", task.click.backbone)):
            linear = next(module for module in part.modules() if type(module) is torch.nn.Linear)
            linear.register_forward_hook(lambda _m, _i, out, seen=kinds[name]: seen.add(out.dtype))
        return task

    for make, config in ((pretraining_task, PromptPretrainConfig()), (finetuning_task, PromptFinetuneConfig())):
        click = ClickModel(SCHEMA, SIZES, rates(CTR, config))
        args = (None, 0) if make is finetuning_task else (0,)
        task = watch(make(click, lm, TWO, config, *args))
        fit(task, lambda first: iter([batch]), LoopConfig(1, precision=ctrs))
        assert kinds == {"lm": {getattr(torch, its)}, "ctr": {getattr(torch, ctrs)}}
        assert {value.dtype for value in task.parameters()} == {torch.float32}
    save_prompted(task, tmp_path)
    loaded = watch(load_scorer(tmp_path, SCHEMA))
    for seen in kinds.values():
        seen.clear()
    with torch.no_grad():
        scores = loaded.predict(batch)
        assert kinds == {"lm": {getattr(torch, its)}, "ctr": {torch.float32}}
        loaded.precision = "float32"
        torch.testing.assert_close(scores, loaded.predict(batch), rtol=0, atol=0.01 if its == "bfloat16" else 0)


def test_attention_of_a_fields_masked_words(tiny_lm: Path, tmp_path: Path):
    """The first word of each text is of field 1, the others of field 0."""
    task, batch = pretraining(tiny_lm), batch_of(tiny_lm, 6)
    save_prompted(task, tmp_path)
    tokens, loaded = batch.tokens, load_prompted(tmp_path, SCHEMA)
    lengths = np.array(tokens.lengths)
    values = tokens.input_ids.numpy()[np.arange(tokens.input_ids.shape[1]) < lengths[:, None]]
    fields = np.concatenate([[-1, 1, *[0] * (length - 3), -1] for length in lengths]).astype(np.int16)
    said = RowTokens(Ragged(values, offsets_of(lengths)), fields)
    found = attention_by_field(loaded, batch, said, ("rest", "first", "never"))
    assert set(found) == {"rest", "first"} and sum(found["rest"]) == pytest.approx(1)
    total = torch.zeros(2)
    for row in range(6):
        ids = tokens.input_ids[row : row + 1, : lengths[row]].clone()
        ids[0, 1] = task.vocabulary.mask_id
        prompts = prompts_of(task.eval(), batch)[row : row + 1]
        with torch.no_grad():
            total += task.reader.attention_on_prompts(ids, torch.ones_like(ids), prompts)[0, -1, :, 1].mean(0)
    np.testing.assert_allclose(found["first"], total / total.sum(), rtol=1e-4)


def test_without_the_language_model_it_is_the_plain_backbone(tiny_lm: Path, tmp_path: Path):
    task, batch = pretraining(tiny_lm), batch_of(tiny_lm, 12)
    fit(task, lambda first: iter([batch] * 2), LoopConfig(2))
    for name in ("pretrained", "tuned", "plain"):
        (tmp_path / name).mkdir()
    save_prompted(task, tmp_path / "pretrained")
    tuned, plain = load_click_model(tmp_path / "pretrained", SCHEMA, CTR), ClickModel(SCHEMA, SIZES, CTR)
    assert not torch.equal(tuned.tables["user_id"].weight, plain.tables["user_id"].weight)
    for name, model in (("tuned", tuned), ("plain", plain)):
        fit(model, lambda first: iter([batch] * 2), LoopConfig(2))
        save_click_model(model, tmp_path / name, optimizer_state=False)
    sizes = {name: (tmp_path / name / WEIGHTS).stat().st_size for name in ("tuned", "plain")}
    assert (tmp_path / "tuned" / DESCRIPTION).read_bytes() == (tmp_path / "plain" / DESCRIPTION).read_bytes()
    assert sizes["tuned"] == sizes["plain"] and repr(tuned) == repr(plain)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (tuned, plain)]
    assert shapes[0] == shapes[1]
    assert isinstance(load_scorer(tmp_path / "tuned", SCHEMA), ClickModel)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(PromptPretrainConfig, lm_lr=-1.0), "pretrain.lm_lr: -1.0 is under 0"),
        (partial(PromptPretrainConfig, mask_probability=0.0), "pretrain.mask_probability: 0.0"),
        (partial(PromptFinetuneConfig, epochs=0), "finetune.epochs: 0 is under 1"),
        (partial(PromptFinetuneConfig, patience=-1), "finetune.patience: -1 is under 0"),
        (partial(ClickConfig, patience=-1), "ctr.patience: -1 is under 0"),
        (partial(PromptFinetuneConfig, batch_size=0), "finetune.batch_size: 0 is under 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Any, message: str):
    with pytest.raises(UserError, match=message):
        make()


def test_pretraining_hides_no_id_and_finetuning_as_many_as_the_backbone():
    ctr = replace(CTR, unknown_share=0.2)
    assert rates(ctr, PromptPretrainConfig()).unknown_share == 0.0
    assert rates(ctr, PromptFinetuneConfig(lr=0.5)) == replace(ctr, lr=0.5, table_lr=ctr.table_lr)
