from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctrdist.errors import UserError
from ctrdist.language.encoder import HEAD
from ctrdist.language.lora import LoraConfig
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_training import LanguageModelConfig, pretraining_task
from raycluster.stages import language
from raycluster.stages.language import _align_task, _text_training, align

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
    assert rest == [100, 3, 2, 1, 2, 7] and valid == [100, 3, 1, 1, 2, 0]
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


def test_the_language_model_goes_from_stage_to_stage_as_a_plain_one(lm_family, tmp_path: Path, monkeypatch):
    lm = LanguageModelConfig(name=str(lm_family("gpt2")), pooling="top-2", gradient_checkpointing=True)
    pretrained = pretraining_task(lm, PretrainConfig(), seed=1)
    assert pretrained.language_model.lora == LoraConfig() and pretrained.language_model.has_head
    language._save_language_model(pretrained, tmp_path / "dap")

    monkeypatch.setattr(language, "State", lambda uri: SimpleNamespace(local=lambda name: tmp_path / name))
    monkeypatch.setattr(language, "item_embeddings", lambda *_: torch.ones(9, 6))

    def aligned(start: str, config: AlignConfig, out: str):
        task = _align_task("state", "read", start, "model", config, lm, np.arange(9), seed=1)
        language._save_encoder(task, tmp_path / out)
        return task

    first = aligned("dap", AlignConfig(popularity_power=1.0), "roma")
    assert first.encoder.language_model.pooling == "top-2" and first.encoder.language_model.lora
    assert first.encoder.language_model.fingerprint() == pretrained.language_model.fingerprint()
    assert first.counts.tolist() == list(range(9)) and (tmp_path / "roma" / HEAD).exists()
    # The head goes on where it was; another kind of head is drawn anew.
    second, other = aligned("roma", AlignConfig(), "roma_2"), aligned("roma", AlignConfig(head_norm=True), "roma_3")
    assert second.encoder.fingerprint() == first.encoder.fingerprint() and not second.encoder.norm
    assert other.encoder.norm and other.encoder.fingerprint() != first.encoder.fingerprint()
    frozen = aligned("roma", AlignConfig(freeze_language_model=True), "roma_4").encoder
    assert frozen.into_table and frozen.language_model.lora is None and not first.encoder.into_table


def test_no_epochs_leave_the_alignment_out(capsys):
    lm = object()
    for config, warm in (
        (AlignConfig(epochs=0), False),
        (AlignConfig(epochs=0), True),
        (AlignConfig(warm_epochs=0), True),
    ):
        assert align(None, "roma", None, lm, None, config, None, warm) is lm
    assert capsys.readouterr().out.count("roma       left out") == 3
