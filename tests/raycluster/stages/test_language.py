from types import SimpleNamespace

import numpy as np
import pytest

from ctrdist.errors import UserError
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.pretrain import PretrainConfig
from raycluster.stages.language import _text_training

ITEMS = np.arange(2, 1002)


def training_of(config: PretrainConfig | AlignConfig, items: np.ndarray = ITEMS):
    """The training on items, whose batches are the arguments that they would be made from."""
    day = SimpleNamespace(options=SimpleNamespace(seed=3), state=SimpleNamespace(uri="state"))
    parts = {"task": None, "save": None}
    return _text_training(
        day, "runs/dap", "inputs", items, config, 2, "float32", None, lambda *of: of, {"items": 5}, **parts
    )


def test_held_out_items_are_not_trained_on():
    training = training_of(PretrainConfig(batch_size=100, valid_share=0.3, patience=2, clip_norm=0.5, max_length=9))
    trained, *rest = training.batches(1, 2, 7)
    held, *valid = training.valid_batches(1, 2, 0)
    assert sorted([*trained, *held]) == ITEMS.tolist() and 250 < len(held) < 350
    assert rest == [100, 9, 3, 2, 1, 2, 7] and valid == [100, 9, 3, 1, 1, 2, 0]
    loop = training.loop
    assert (loop.steps_per_epoch, loop.epochs, loop.patience, loop.clip_norm) == (-(-len(trained) // 100), 2, 2, 0.5)
    assert training.facts == {"rows": len(trained), "items": 5}


def test_nothing_is_held_out_by_default():
    training = training_of(AlignConfig(batch_size=128))
    assert training.valid_batches is None and training.batches(0, 1, 0)[0].tolist() == ITEMS.tolist()
    assert training.loop.steps_per_epoch == 8 and training.loop.patience == 0 and training.loop.clip_norm == 1.0


def test_a_share_that_holds_nothing_out_is_refused():
    with pytest.raises(UserError, match="valid_share 0.001: 0 of 3 items are held out"):
        training_of(AlignConfig(valid_share=0.001), ITEMS[:3])
