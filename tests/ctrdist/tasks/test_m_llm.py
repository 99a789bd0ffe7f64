from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor, nn

from ctrdist.batch import Batch, join_items
from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.loop import LoopConfig, fit
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel

TEXT = 8
SMALL = MLLMConfig(hidden=(16, 12, 4), dropout=0.0, lr=0.01)


def batch_of(rows: int = 20, seed: int = 0) -> Batch:
    """Clicks follow the first number of the target's text."""
    draws, texts = np.random.default_rng(seed), np.random.default_rng(5).normal(size=(30, TEXT)).astype(np.float32)
    texts[0] = 0
    target = draws.integers(2, 30, rows)
    history = np.where(np.arange(4) < draws.integers(0, 5, (rows, 1)), draws.integers(2, 30, (rows, 4)), 0)
    return join_items(texts[target, 0] + 0.3 * draws.normal(size=rows) > 0, {}, target, history, {}, texts)


def test_the_state_is_the_targets_text_and_the_mean_of_the_behaviours():
    batch = batch_of()
    states = ModifiedLanguageModel(TEXT, True, SMALL).states(batch)
    for row, state in enumerate(states):
        behaviours = [batch.text[i] for i in batch.history[row].tolist() if i]
        mean = torch.stack(behaviours).mean(0) if behaviours else torch.zeros(TEXT)
        torch.testing.assert_close(state, torch.cat([batch.text[batch.target[row]], mean]))
    assert 0 < (states[:, TEXT:] == 0).all(1).sum() < len(batch)
    alone = ModifiedLanguageModel(TEXT, False, SMALL).states(batch)
    torch.testing.assert_close(alone, states[:, :TEXT])
    given = replace(batch, vector=torch.ones(20, TEXT))
    assert torch.equal(ModifiedLanguageModel(TEXT, False, SMALL).states(given), given.vector)


def test_the_transformation_layer_has_the_papers_widths():
    model = ModifiedLanguageModel(384, False, MLLMConfig())
    widths = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert widths == [
        (384, 512),
        (512, 256),
        (256, 128),
        (128, 1),
    ]
    assert model.width == 128


def test_learns_and_the_loss_is_the_log_loss_of_what_it_predicts(tmp_path: Path):
    model, test = ModifiedLanguageModel(TEXT, True, SMALL, seed=1), batch_of(200, seed=99)
    before = model.eval()(test)["loss"].item()
    fit(model, lambda first: (batch_of(64, seed) for seed in range(first, 60)), LoopConfig(60))
    loss, probability = model(test)["loss"].item(), model.predict(test).detach()
    assert loss == pytest.approx(log_loss(test.label, probability.double()), rel=1e-5) and loss < 0.6 * before
    representation = model.represent(test).detach()
    assert representation.shape == (200, 4) and (representation >= 0).all() and representation.std() > 0.1
    torch.testing.assert_close(torch.sigmoid(model.logits(representation)), probability)
    model.save(tmp_path)
    loaded = ModifiedLanguageModel.load(tmp_path, replace(SMALL, lr=0.5))
    assert torch.equal(loaded.predict(test), probability) and loaded.parameter_groups()[0]["lr"] == 0.5
    with pytest.raises(UserError, match=r"--m-llm.hidden: .* has \(16, 12, 4\), not \(9,\)"):
        ModifiedLanguageModel.load(tmp_path, MLLMConfig(hidden=(9,)))


def worker_batches(rank: int, workers: int, first: int) -> Iterator[Batch]:
    """A worker's share of global batches of 12 rows."""
    for step in range(first, 6):
        whole = batch_of(12, step)
        mine = slice(None) if workers == 1 else slice(6 * rank, 6 * rank + 6)
        yield replace(whole, label=whole.label[mine], target=whole.target[mine], history=whole.history[mine])


def trained(group: Group) -> dict[str, Tensor]:
    model = ModifiedLanguageModel(TEXT, True, SMALL, seed=1)
    fit(model, partial(worker_batches, group.rank, group.size), LoopConfig(6, precision="float64"), group=group)
    return model.state_dict()


def test_two_workers_end_with_the_weights_of_one(two_workers):
    alone, (first, second) = trained(Group()), two_workers(trained)
    start = ModifiedLanguageModel(TEXT, True, SMALL, seed=1).double().state_dict()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert not torch.equal(alone["output.weight"], start["output.weight"])


def test_no_rows_at_all():
    batch = batch_of().empty()
    model = ModifiedLanguageModel(TEXT, True, SMALL)
    loss = model(batch)["loss"]
    loss.backward()
    assert loss.item() == 0 and model.predict(batch).shape == (0,)


@pytest.mark.parametrize(("options", "match"), [({"hidden": ()}, "m_llm.hidden"), ({"epochs": 0}, "m_llm.epochs: 0")])
def test_options_that_make_no_sense(options: dict, match: str):
    with pytest.raises(UserError, match=match):
        MLLMConfig(**options)
