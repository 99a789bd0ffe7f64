import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctrdist.errors import UserError
from ctrdist.group import Group, attach_group
from ctrdist.language.encoder import TextEncoder, load_encoder
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import TokenBatch, tokenize
from ctrdist.loop import LoopConfig, fit
from ctrdist.tasks.align import AlignConfig, ItemAlignment

TEXTS = ["red dog and the sea", "war of the sea", "a long sad film about love", "the old house , the cat", "new book .",
         "short funny story with a dog", "blue sea and blue cat"]  # fmt: skip
ITEMS = [12, 3, 9, 0, 5, 7, 1]
COUNTS = torch.arange(20) ** 2 + 1
SPLITS = [[4, 3], [7, 0], [0, 7], [6, 1]]


def task_of(folder: str | Path, config: AlignConfig | None = None) -> ItemAlignment:
    config = config or AlignConfig(head_hidden=(8,))
    torch.manual_seed(0)
    encoder = TextEncoder(LanguageModel.load(str(folder)), 6, config.head_hidden, config.head_norm)
    targets = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    return ItemAlignment(encoder, targets, config, COUNTS if config.popularity_power else None)


def batch_of(task: ItemAlignment, rows: slice = slice(None)) -> TokenBatch:
    return tokenize(task.encoder.language_model.tokenizer, TEXTS[rows], ITEMS[rows], max_length=16)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_loss_is_equation_12_over_the_items_own_rows(tiny_lm: Path, similarity: str):
    task = task_of(tiny_lm, AlignConfig(head_hidden=(8,), temperature=0.5, similarity=similarity)).eval()
    batch = batch_of(task)
    out = task(batch)
    text, item = task.encoder(batch.input_ids, batch.attention_mask), task.targets[ITEMS]
    if similarity == "cosine":
        text, item = nn.functional.normalize(text, dim=1), nn.functional.normalize(item, dim=1)
    total, hits = 0.0, 0
    for i in range(7):
        forth, back = text[i] @ item.T / 0.5, item[i] @ text.T / 0.5
        total -= (torch.log_softmax(forth, 0)[i] + torch.log_softmax(back, 0)[i]).item()
        hits += int(forth.argmax() == i)
    assert out["loss"].item() == pytest.approx(total / 7, rel=1e-5)
    assert out["accuracy"].item() == pytest.approx(hits / 7) and not out["accuracy"].requires_grad


@pytest.mark.parametrize("power", [1.0, 0.5, -2.0])
def test_popular_items_count_more(tiny_lm: Path, power: float):
    task = task_of(tiny_lm, AlignConfig(head_hidden=(8,), popularity_power=power)).eval()
    batch = batch_of(task)
    scores = task.encoder(batch.input_ids, batch.attention_mask) @ task.targets[ITEMS].T
    each = -(torch.log_softmax(scores, 1) + torch.log_softmax(scores, 0)).diagonal()
    weights = [(item**2 + 1) ** power for item in ITEMS]
    expected = sum(w * x for w, x in zip(weights, each.tolist(), strict=True)) / sum(weights)
    assert task(batch)["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(each.mean().item(), rel=1e-4)


def test_only_the_head_of_a_frozen_language_model_learns(tiny_lm: Path, tmp_path: Path):
    task = task_of(tiny_lm, AlignConfig(head_hidden=(8,), head_lr=0.01, freeze_language_model=True)).train()
    start = {name: value.clone() for name, value in task.state_dict().items()}
    batch = batch_of(task)
    assert torch.equal(task(batch)["loss"], task(batch)["loss"])  # no dropout
    fit(task, lambda first: iter([batch] * (3 - first)), LoopConfig(3))
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if name.startswith("encoder.head.")}
    # The table takes the head's vectors then, and those of the language model otherwise.
    for into_table, width in ((True, 6), (False, 16)):
        task.encoder.into_table = into_table
        task.encoder.save(tmp_path)
        loaded, inputs = load_encoder(tmp_path).eval(), (batch.input_ids, batch.attention_mask)
        expected = task.encoder if into_table else task.encoder.language_model
        assert loaded.width == width and loaded.tokenizer.get_vocab() == task.encoder.tokenizer.get_vocab()
        assert torch.equal(loaded(*inputs), expected(*inputs)) and loaded(*inputs).shape == (7, width)
        assert TextEncoder.load(tmp_path).into_table == into_table


def test_the_heads_of_the_paper_and_of_its_code(tiny_lm: Path):
    batch = batch_of(task_of(tiny_lm))
    for hidden, norm in (((8,), False), ((), False), ((), True), ((8, 4), True)):
        encoder = task_of(tiny_lm, AlignConfig(head_hidden=hidden, head_norm=norm)).eval().encoder
        state, found = encoder.head.state_dict(), encoder(batch.input_ids, batch.attention_mask)
        vector = encoder.language_model(batch.input_ids, batch.attention_mask)
        linear = [key for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
        for i, key in enumerate(linear):
            vector = vector @ state[key].T + state[key.replace("weight", "bias")]
            if norm or i < len(linear) - 1:
                vector = vector.clamp(min=0)
        if norm:
            vector = (vector - vector.mean(1, keepdim=True)) / (vector.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        assert len(linear) == len(hidden) + 1 and found.shape == (7, 6)
        torch.testing.assert_close(found, vector, rtol=1e-4, atol=1e-5)


def test_held_out_items_end_the_training(tiny_lm: Path):
    task = task_of(tiny_lm, AlignConfig(head_hidden=(32,), lr=2e-3, head_lr=0.05))
    train, held = batch_of(task, slice(0, 4)), [batch_of(task, slice(4, 6)), batch_of(task, slice(6, 7))]
    seen = []

    def valid():
        seen.append({name: value.clone() for name, value in task.state_dict().items()})
        return iter(held)

    progress = fit(task, lambda first: iter([train] * (80 - first)), LoopConfig(4, epochs=20, patience=3), valid=valid)
    found = [loss for _, loss in progress.valid_loss]
    best = min(range(len(found)), key=found.__getitem__)
    assert len(found) < 20 and progress.best_epoch == best + 1 == len(found) - 3 and progress.best_loss == found[best]
    assert math.isnan(progress.best_auc) and progress.finished
    for name, value in seen[best].items():
        assert torch.equal(task.state_dict()[name], value), name
    with torch.no_grad():  # of the kept weights, over all rows: the batch of one item has a loss of 0
        losses = [task(batch)["loss"].item() for batch in held]
    assert losses[1] == 0 and found[best] == pytest.approx(losses[0] * 2 / 3, rel=1e-6)


def test_learns_to_find_each_item(tiny_lm: Path):
    task = task_of(tiny_lm, AlignConfig(head_hidden=(32,), lr=2e-3, head_lr=2e-2)).eval()
    optimizer = torch.optim.AdamW(task.parameter_groups())
    batch, outs = batch_of(task), []
    for _ in range(60):
        outs.append(task(batch))
        optimizer.zero_grad()
        outs[-1]["loss"].backward()
        optimizer.step()
    assert outs[-1]["loss"] < 0.5 * math.log(7) < outs[0]["loss"] and outs[-1]["accuracy"] > 0.9


def gradients(task: ItemAlignment, batch: TokenBatch) -> dict[str, Tensor]:
    task.zero_grad()
    task(batch)["loss"].backward()
    return {name: parameter.grad.clone() for name, parameter in task.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_gradient_caching_changes_no_gradient(tiny_lm: Path, chunk: int):
    plain = task_of(tiny_lm, AlignConfig(head_hidden=())).double().eval()
    cached = task_of(tiny_lm, AlignConfig(head_hidden=(), chunk=chunk)).double().eval()
    expected, found = gradients(plain, batch_of(plain)), gradients(cached, batch_of(cached))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_gradient_caching_draws_the_same_dropout_twice(tiny_lm: Path):
    task = task_of(tiny_lm, AlignConfig(head_hidden=(), chunk=3)).double()
    weight, batch, step = task.encoder.head[0].weight, batch_of(task), 1e-5

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
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(weight.grad.square().sum().item(), rel=1e-4)


def test_parameter_groups_and_state(tiny_lm: Path):
    task = task_of(tiny_lm)
    groups = task.parameter_groups()
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in task.parameters())
    rates = [(g["lr"], g["weight_decay"]) for g in groups]
    assert rates == [(2e-6, 0.01), (2e-6, 0.0), (3e-3, 3e-2), (3e-3, 0.0)]
    assert all(name.startswith("encoder.") for name in task.state_dict())
    assert len(task_of(tiny_lm, AlignConfig(head_hidden=())).encoder.head) == 1


def test_a_gradient_for_every_parameter_even_without_rows(tiny_lm: Path):
    for config in (AlignConfig(head_hidden=(8,)), AlignConfig(chunk=2)):
        task = task_of(tiny_lm, config)
        assert all(g.any() for name, g in gradients(task, batch_of(task)).items() if "key.bias" not in name)
        assert not any(g.any() for g in gradients(task, batch_of(task, slice(0, 0))).values())


def test_wrong_options():
    with pytest.raises(UserError, match="align.temperature: -1 "):
        AlignConfig(temperature=-1)
    with pytest.raises(UserError, match="align.similarity: unknown 'cos'; known: dot, cosine"):
        AlignConfig(similarity="cos")
    with pytest.raises(UserError, match="align.chunk"):
        AlignConfig(chunk=-1)
    with pytest.raises(UserError, match="align.negatives: unknown 'all'; known: global, local"):
        AlignConfig(negatives="all")
    with pytest.raises(UserError, match="align.popular_share: 0 "):
        AlignConfig(popular_share=0)
    with pytest.raises(UserError, match="align.patience: 2 .*set align.valid_share too"):
        AlignConfig(patience=2)


def step_of(group: Group, folder: str, split: list[int], chunk: int) -> dict[str, Tensor]:
    """The terms of one step, and every gradient after DDP."""
    config = AlignConfig(head_hidden=(8,), chunk=chunk, popularity_power=0.5 if chunk else 0.0)
    task = task_of(folder, config).double().eval()
    rows = slice(None)
    module: nn.Module = task
    if group.size > 1:
        attach_group(task, group)
        module = DistributedDataParallel(task)
        rows = slice(sum(split[: group.rank]), sum(split[: group.rank + 1]))
    out = module(batch_of(task, rows))
    out["loss"].backward()
    terms = {name: value.detach() for name, value in out.items()}
    return terms | {name: parameter.grad for name, parameter in task.named_parameters()}


def ddp_steps(group: Group, folder: str, splits: list[list[int]], chunks: list[int]) -> list[dict[str, Tensor]]:
    # Dropout on, three steps: DDP complains at the next forward pass about parameters without gradient.
    for chunk in chunks:
        module = task_of(folder, AlignConfig(chunk=chunk))
        attach_group(module, group)
        wrapped = DistributedDataParallel(module)
        for split in splits:
            rows = slice(sum(split[: group.rank]), sum(split[: group.rank + 1]))
            wrapped(batch_of(module, rows))["loss"].backward()
    return [step_of(group, folder, split, chunk) for split in splits for chunk in chunks]


def test_two_workers_take_the_step_of_one(tiny_lm: Path, two_workers):
    expected = [step_of(Group(), str(tiny_lm), [], chunk) for chunk in (0, 100)] * len(SPLITS)
    for found in two_workers(ddp_steps, str(tiny_lm), SPLITS, [0, 2]):
        for one, other in zip(expected, found, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)
