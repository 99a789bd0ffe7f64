import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctrdist.errors import UserError
from ctrdist.group import Group, attach_group
from ctrdist.language.encoder import TextEncoder
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import TokenBatch, tokenize
from ctrdist.tasks.align import AlignConfig, ItemAlignment

TEXTS = ["red dog and the sea", "war of the sea", "a long sad film about love", "the old house , the cat", "new book .",
         "short funny story with a dog", "blue sea and blue cat"]  # fmt: skip
ITEMS = [12, 3, 9, 0, 5, 7, 1]
SPLITS = [[4, 3], [7, 0], [0, 7], [6, 1]]


def task_of(folder: str | Path, config: AlignConfig | None = None) -> ItemAlignment:
    config = config or AlignConfig(head_hidden=(8,))
    torch.manual_seed(0)
    encoder = TextEncoder(LanguageModel.load(str(folder)), 6, config.head_hidden)
    return ItemAlignment(encoder, torch.randn(20, 6, generator=torch.Generator().manual_seed(1)), config)


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


def step_of(group: Group, folder: str, split: list[int], chunk: int) -> dict[str, Tensor]:
    """The terms of one step, and every gradient after DDP."""
    task = task_of(folder, AlignConfig(head_hidden=(8,), chunk=chunk)).double().eval()
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
    one = step_of(Group(), str(tiny_lm), [], 0)
    for found in two_workers(ddp_steps, str(tiny_lm), SPLITS, [0, 2]):
        assert len(found) == 2 * len(SPLITS)
        for other in found:
            assert one.keys() == other.keys()
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)
