import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ctrdist.errors import UserError
from ctrdist.group import Group, attach_group
from ctrdist.language.masking import mask_tokens
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import TokenBatch, tokenize
from ctrdist.losses import info_nce
from ctrdist.tasks.pretrain import DomainAdaptivePretraining, PretrainConfig

TEXTS = ["red dog and the sea", "war of the sea", "a long sad film about love", "the old house , the cat", "new book .",
         "short funny story with a dog", "blue sea and blue cat"]  # fmt: skip
SPLITS = [[4, 3], [7, 0], [0, 7]]


def task_of(folder: str | Path, simcse_weight: float = 0.5, temperature: float = 0.05) -> DomainAdaptivePretraining:
    torch.manual_seed(0)
    config = PretrainConfig(simcse_weight=simcse_weight, simcse_temperature=temperature, mask_probability=0.3)
    return DomainAdaptivePretraining(LanguageModel.load(str(folder), masked_lm=True), config, seed=1)


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
    task = task_of(tiny_lm, temperature=0.01)
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


def step_of(group: Group, folder: str, split: list[int], weight: float) -> dict[str, Tensor]:
    """The terms of one step, and every gradient after DDP."""
    task = task_of(folder, weight).double().eval()
    rows = slice(None)
    module: torch.nn.Module = task
    if group.size > 1:
        attach_group(task, group)
        module = DistributedDataParallel(task)
        rows = slice(sum(split[: group.rank]), sum(split[: group.rank + 1]))
    out = module(batch_of(task, rows))
    out["loss"].backward()
    terms = {name: value.detach() for name, value in out.items()}
    return terms | {name: parameter.grad for name, parameter in task.named_parameters()}


def ddp_steps(group: Group, folder: str, splits: list[list[int]]) -> list[dict[str, Tensor]]:
    # Dropout on, two steps: DDP complains at the second forward pass about parameters without gradient.
    module = task_of(folder)
    attach_group(module, group)
    wrapped = DistributedDataParallel(module)
    for split in ([7, 0], [0, 7], [5, 2]):
        rows = slice(sum(split[: group.rank]), sum(split[: group.rank + 1]))
        wrapped(batch_of(module, rows))["loss"].backward()
    steps = [step_of(group, folder, split, 0.5) for split in splits]
    return [*steps, step_of(group, folder, splits[0], 0.0)]


def test_two_workers_take_the_step_of_one(tiny_lm: Path, two_workers):
    expected = [step_of(Group(), str(tiny_lm), [], 0.5)] * len(SPLITS) + [step_of(Group(), str(tiny_lm), [], 0.0)]
    for found in two_workers(ddp_steps, str(tiny_lm), SPLITS):
        for one, other in zip(expected, found, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)
