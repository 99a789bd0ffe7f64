import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ctrdist.errors import UserError
from ctrdist.group import Group, attach_group
from ctrdist.language.lora import LoraConfig
from ctrdist.language.masking import mask_tokens
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import TokenBatch, tokenize
from ctrdist.loop import LoopConfig, fit
from ctrdist.losses import info_nce
from ctrdist.tasks.pretrain import DomainAdaptivePretraining, PretrainConfig

TEXTS = ["red dog and the sea", "war of the sea", "a long sad film about love", "the old house , the cat", "new book .",
         "short funny story with a dog", "blue sea and blue cat"]  # fmt: skip
SPLITS = [[4, 3], [7, 0], [0, 7]]


def task_of(folder: str | Path, simcse_weight: float = 0.5, **options) -> DomainAdaptivePretraining:
    torch.manual_seed(0)
    config = PretrainConfig(simcse_weight=simcse_weight, mask_probability=0.3, **options)
    model = LanguageModel.load(str(folder), head=config.mlm_weight > 0)
    return DomainAdaptivePretraining(model, config, seed=1)


def batch_of(task: DomainAdaptivePretraining, rows: slice = slice(None), epoch: int = 0) -> TokenBatch:
    items = list(range(10, 17))[rows]
    return tokenize(task.language_model.tokenizer, TEXTS[rows], items, max_length=16, epoch=epoch)


def test_the_loss_is_equation_6(tiny_lm: Path):
    task = task_of(tiny_lm).eval()
    batch, model = batch_of(task), task.language_model
    out = task(batch)
    masked = mask_tokens(batch, task.vocabulary, 0.3, seed=1)
    logits = model.model(input_ids=masked.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    total = 0.0
    for position, target in zip(masked.positions.tolist(), masked.targets.tolist(), strict=True):
        total -= torch.log_softmax(logits[position], 0)[target].item()
    pooled = model(batch.input_ids, batch.attention_mask)
    assert out["mlm"].item() == pytest.approx(total / len(masked.targets), rel=1e-5)
    assert out["simcse"].item() == pytest.approx(info_nce(pooled, pooled, 0.05, similarity="cosine").item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx(out["mlm"].item() + 0.5 * out["simcse"].item(), rel=1e-6)
    assert not out["mlm"].requires_grad and len(masked.targets) > 5


def test_the_two_views_differ_by_dropout(tiny_lm: Path):
    task = task_of(tiny_lm, simcse_temperature=0.01)
    batch = batch_of(task)
    assert task.train()(batch)["simcse"] > task.eval()(batch)["simcse"]


def test_masks_follow_the_epoch(tiny_lm: Path):
    task = task_of(tiny_lm).eval()
    first, again, second = (task(batch_of(task, epoch=epoch))["mlm"] for epoch in (0, 0, 1))
    assert first == again != second


def test_without_simcse(tiny_lm: Path):
    task = task_of(tiny_lm, simcse_weight=0).eval()
    out, both = task(batch_of(task)), task_of(tiny_lm).eval()
    assert set(out) == {"loss", "mlm"} and torch.equal(out["loss"].detach(), out["mlm"])
    assert out["mlm"].item() == pytest.approx(both(batch_of(both))["mlm"].item(), rel=1e-5)


def test_a_decoder_predicts_each_next_word(lm_family):
    task = task_of(lm_family("gpt2"), simcse_temperature=0.1).eval()
    batch, model = batch_of(task), task.language_model
    out = task(batch)
    labels = batch.input_ids.where(batch.attention_mask == 1, -100)
    expected = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    assert (labels == -100).any() and out["clm"].item() == pytest.approx(expected.item(), rel=1e-5)
    pooled = model(batch.input_ids, batch.attention_mask)
    assert out["simcse"].item() == pytest.approx(info_nce(pooled, pooled, 0.1, similarity="cosine").item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx(out["clm"].item() + 0.5 * out["simcse"].item(), rel=1e-6)
    words_only = task_of(lm_family("gpt2"), 0.0).eval()
    found = words_only(batch_of(words_only))
    assert set(found) == {"loss", "clm"} and found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    one = tokenize(model.tokenizer, [""], [3], max_length=16)
    assert words_only(one)["clm"] == 0 and words_only(batch_of(words_only, slice(0, 0)))["clm"] == 0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_without_words(lm_family, family: str):
    task = task_of(lm_family(family), mlm_weight=0).eval()
    out, both = task(batch_of(task)), task_of(lm_family(family)).eval()
    assert set(out) == {"loss", "simcse"} and not task.language_model.has_head
    assert out["simcse"].item() == pytest.approx(both(batch_of(both))["simcse"].item(), rel=1e-5)
    assert out["loss"].item() == pytest.approx(0.5 * out["simcse"].item(), rel=1e-6)
    task(batch_of(task))["loss"].backward()
    assert all(p.grad is not None for p in task.parameters())


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(
    ("family", "options"), [("bert", {}), ("gpt2", {}), ("bert", {"mlm_weight": 0}), ("gpt2", {"simcse_weight": 0})]
)
def test_gradient_caching_changes_no_gradient(lm_family, family: str, options: dict, chunk: int):
    plain, cached = (task_of(lm_family(family), chunk=c, **options).double().eval() for c in (0, chunk))
    expected, found = (run(task, batch_of(task)) for task in (plain, cached))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    assert any(value.any() for name, value in expected.items() if "." in name)


def test_gradient_caching_keeps_one_chunk_of_activations(tiny_lm: Path):
    """Bytes that a forward pass keeps for its backward pass: as many for 7 texts, two by two, as for two alone."""

    def most(rows: slice, chunk: int) -> int:
        task, alive, peak = task_of(tiny_lm, chunk=chunk), 0, 0

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, peak
                self.tensor, alive = tensor, alive + tensor.nbytes
                peak = max(peak, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.tensor.nbytes

        batch = batch_of(task, rows)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            task(batch)["loss"].backward()
        return peak

    alone, cached, plain = most(slice(0, 2), 0), most(slice(None), 2), most(slice(None), 0)
    assert cached < 1.5 * alone < plain


def test_gradient_caching_draws_the_same_dropout_twice(lm_family):
    task, step = task_of(lm_family("bert"), chunk=3).double(), 1e-5
    weight, batch = task.language_model.model.cls.predictions.bias, batch_of(task)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return task(batch)["loss"]

    loss().backward()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * weight.grad
        values.append(loss().item())
        with torch.no_grad():
            weight -= sign * step * weight.grad
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(weight.grad.square().sum().item(), rel=1e-4)


def test_a_decoder_with_adapters_learns_and_goes_on_from_a_checkpoint(lm_family, tmp_path: Path):
    def task() -> DomainAdaptivePretraining:
        torch.manual_seed(0)
        model = LanguageModel.load(str(lm_family("gpt2")), head=True)
        model.adapt(LoraConfig(lr=0.02))
        model.checkpoint_layers()
        return DomainAdaptivePretraining(model, PretrainConfig(simcse_weight=0.1, chunk=3), seed=1)

    def batches(first: int):
        return (batch_of(whole, epoch=step) for step in range(first, 30))

    loop = LoopConfig(10, epochs=3, clip_norm=1.0, patience=2)
    whole, again, records = task(), task(), []
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    valid = lambda: iter([batch_of(whole, slice(4, 7)), batch_of(whole, slice(0, 0))])

    def stop(write, progress) -> None:
        if progress.step == 10:
            write(tmp_path)
            raise InterruptedError

    progress = fit(whole, batches, loop, valid=valid, record=records.append)
    assert [epoch for epoch, _ in progress.valid_loss] == [1, 2, 3] and not progress.valid_auc
    assert progress.valid_loss[-1][1] < progress.valid_loss[0][1] and progress.losses[-1][1] < progress.losses[0][1]
    changed = {name for name, value in whole.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    with pytest.raises(InterruptedError):
        fit(again, batches, loop, valid=valid, checkpoint=stop)
    resumed = task()
    assert fit(resumed, batches, loop, valid=valid, resume=tmp_path).valid_loss == progress.valid_loss
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_learns(tiny_lm: Path):
    task = task_of(tiny_lm, simcse_weight=0.1)
    groups = [group | {"lr": 5e-3} for group in task.parameter_groups()]
    optimizer, losses = torch.optim.AdamW(groups), []
    for step in range(50):
        out = task(batch_of(task, epoch=step))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["mlm"].item())
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert first == pytest.approx(math.log(task.vocabulary.size), rel=0.1) and last < first - 0.3


def test_held_out_items_end_the_training(tiny_lm: Path):
    task = task_of(tiny_lm, lr=5e-3)
    train, held = batch_of(task, slice(0, 3)), batch_of(task, slice(3, 7))
    seen = []

    def valid():
        seen.append({name: value.clone() for name, value in task.state_dict().items()})
        return iter([held])

    progress = fit(task, lambda first: iter([train] * (160 - first)), LoopConfig(4, epochs=40, patience=3), valid=valid)
    found = [loss for _, loss in progress.valid_loss]
    best = min(range(len(found)), key=found.__getitem__)
    assert len(found) < 40 and progress.best_epoch == best + 1 == len(found) - 3 and progress.finished
    for name, value in seen[best].items():
        assert torch.equal(task.state_dict()[name], value), name


def test_trains_in_bfloat16(lm_family):
    """Products in bfloat16, weights and what is optimised in float32: it learns as float32 does."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        task = task_of(lm_family("minilm"), lr=2e-3)
        seen, batch = [], batch_of(task)
        task.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out["loss"].item()))
        kinds = set()
        layer = next(m for m in task.modules() if isinstance(m, torch.nn.Linear))
        layer.register_forward_hook(lambda _m, _i, out, kinds=kinds: kinds.add(out.dtype))
        fit(task, lambda first, batch=batch: iter([batch] * (60 - first)), LoopConfig(60, precision=precision))
        assert kinds == {getattr(torch, precision)}
        assert all(value.dtype == torch.float32 for value in task.parameters())
        losses[precision] = sum(seen[-5:]) / 5
        assert losses[precision] < 0.6 * seen[0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.3)


def test_parameter_groups_name_each_parameter_once(tiny_lm: Path):
    task = task_of(tiny_lm)
    groups = task.parameter_groups()
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in task.parameters())
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(2e-6, 0.01), (2e-6, 0.0), (1e-3, 0.01), (1e-3, 0.0)]


def test_wrong_options():
    with pytest.raises(UserError, match="pretrain.mask_probability: 0 "):
        PretrainConfig(mask_probability=0)
    with pytest.raises(UserError, match="pretrain.simcse_temperature"):
        PretrainConfig(simcse_temperature=0)
    with pytest.raises(UserError, match="pretrain.simcse_weight"):
        PretrainConfig(simcse_weight=-1)
    with pytest.raises(UserError, match="pretrain.mlm_weight: -1"):
        PretrainConfig(mlm_weight=-1)
    with pytest.raises(UserError, match="both 0: nothing is left to learn; pretrain.epochs 0"):
        PretrainConfig(mlm_weight=0, simcse_weight=0)
    for name, value in {"chunk": -1, "clip_norm": -1, "valid_share": 1, "patience": -1}.items():
        with pytest.raises(UserError, match=f"pretrain.{name}: {value} "):
            PretrainConfig(**{name: value})
    with pytest.raises(UserError, match="pretrain.patience: 2 .*set pretrain.valid_share too"):
        PretrainConfig(patience=2)


def run(task: DomainAdaptivePretraining, batch: TokenBatch, module: torch.nn.Module | None = None) -> dict[str, Tensor]:
    """The terms of one step, and every gradient."""
    task.zero_grad()
    out = (module or task)(batch)
    out["loss"].backward()
    terms = {name: value.detach() for name, value in out.items()}
    return terms | {name: parameter.grad.clone() for name, parameter in task.named_parameters()}


def step_of(group: Group, folder: str, split: list[int], options: dict) -> dict[str, Tensor]:
    """`run` of this worker's part of the texts, after DDP."""
    task = task_of(folder, **options).double().eval()
    if group.size == 1:
        return run(task, batch_of(task))
    attach_group(task, group)
    rows = slice(sum(split[: group.rank]), sum(split[: group.rank + 1]))
    return run(task, batch_of(task, rows), DistributedDataParallel(task))


def ddp_steps(group: Group, folders: list[str], splits: list[list[int]]) -> list[dict[str, Tensor]]:
    # Dropout on, two steps: DDP complains at the second forward pass about parameters without gradient.
    module = task_of(folders[0])
    attach_group(module, group)
    wrapped = DistributedDataParallel(module)
    for split in ([7, 0], [0, 7], [5, 2]):
        rows = slice(sum(split[: group.rank]), sum(split[: group.rank + 1]))
        wrapped(batch_of(module, rows))["loss"].backward()
    return [step_of(group, folders[f], splits[s], options) for f, s, options in VARIANTS]


VARIANTS = [(0, 0, {}), (0, 1, {}), (0, 2, {}), (0, 0, {"simcse_weight": 0.0}), (0, 0, {"chunk": 2}),
            (1, 0, {"chunk": 2}), (1, 1, {"mlm_weight": 0})]  # fmt: skip
"""A folder's number, a split's number, and options."""


def test_two_workers_take_the_step_of_one(tiny_lm: Path, lm_family, two_workers):
    folders = [str(tiny_lm), str(lm_family("gpt2"))]
    expected = [step_of(Group(), folders[f], [], options) for f, _, options in VARIANTS]
    for found in two_workers(ddp_steps, folders, SPLITS):
        for one, other in zip(expected, found, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)
