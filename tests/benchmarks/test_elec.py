"""The benchmark of ELEC trains what it says: a backbone, and a pair whose vanilla network is a model of its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from benchmarks import elec
from benchmarks.cells import language, study
from benchmarks.cells.options import LogOptions
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.errors import UserError
from ctrdist.language.encode import EncodeConfig
from ctrdist.language.model import load_tokenizer
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.distill import DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_training import LanguageModelConfig


@pytest.fixture
def options(tmp_path: Path, tiny_lm: Path, cells_here) -> elec.Options:
    prepare(SyntheticConfig(users=60, items=40, days=6, rows_per_day=300), str(tmp_path / "data"))
    cells_here(elec)
    return elec.Options(
        log=LogOptions(tmp_path / "data", date="2024-01-04", train_days=4, test_days=2),
        lm=LanguageModelConfig(name=str(tiny_lm), precision="float32"),
        seeds=(0, 1),
        keep=tmp_path / "kept",
        ctr=ClickConfig(backbone="dnn", dim=4, epochs=1, batch_size=256),
        m_llm=MLLMConfig(hidden=(8, 4), epochs=1, batch_size=256),
        pretrain=PretrainConfig(max_length=16, epochs=1),
        encode=EncodeConfig(max_length=16, precision="float32"),
    )


def measured(options: elec.Options, capsys) -> tuple[dict, dict]:
    """The JSON line, and its rows by model, language model, variant and seed."""
    elec.main(options)
    found = json.loads(capsys.readouterr().out.rstrip().splitlines()[-1])
    return found, {(r["model"], r["lm"], r["variant"], r["seed"]): r for r in found["rows"]}


def test_without_distillation_the_vanilla_network_is_its_backbone(options, capsys):
    untaught, rows = measured(replace(options, distill=DistillConfig(score="none", mse_weight=0.0)), capsys)
    assert list(rows) == [("backbone", "", "", 0), ("backbone", "", "", 1), ("m_llm", "plain", "", 0)] + [
        (model, "plain", "elec", seed) for seed in (0, 1) for model in ("gain", "vanilla")
    ]
    for seed in (0, 1):
        alone, vanilla, gain = (
            rows[key]["auc"]
            for key in (("backbone", "", "", seed), ("vanilla", "plain", "elec", seed), ("gain", "plain", "elec", seed))
        )
        assert vanilla == alone != gain
    assert untaught["ratios"]["auc_vanilla_less_backbone"] == 0
    taught, rows = measured(replace(options, distill=DistillConfig(mse_weight=1.0)), capsys)
    gain = [rows["vanilla", "plain", "elec", s]["auc"] - rows["backbone", "", "", s]["auc"] for s in (0, 1)]
    assert taught["ratios"]["auc_vanilla_less_backbone"] == pytest.approx(sum(gain) / 2) != 0


def test_tables_3_and_4_and_a_rerun_computes_nothing(options, tiny_lm, capsys, monkeypatch):
    lms = ("plain", "dap", "first-1", "random", str(tiny_lm))
    options = replace(options, seeds=(0,), lms=lms, variants=tuple(elec.VARIANTS))
    found, rows = measured(options, capsys)
    vanilla = [(lm, variant) for model, lm, variant, _ in rows if model == "vanilla"]
    assert vanilla == [(lm, "elec") for lm in lms] + [("plain", v) for v in elec.VARIANTS if v != "elec"]
    layers = {lm: rows["m_llm", lm, "", 0]["auc"] for lm in lms}
    assert layers[str(tiny_lm)] == layers["plain"] and len(set(layers.values())) == 4
    scores = {variant: rows["vanilla", "plain", variant, 0]["log_loss"] for variant in elec.VARIANTS}
    assert len(set(scores.values())) == len(elec.VARIANTS)
    less = rows["vanilla", "plain", "without-mse", 0]["auc"] - rows["backbone", "", "", 0]["auc"]
    assert found["ratios"]["auc_vanilla_less_backbone_without_mse"] == pytest.approx(less)
    with monkeypatch.context() as patched:
        patched.setattr(study, "once", None)
        assert measured(options, capsys)[0] == found
    with pytest.raises(SystemExit, match="unknown nothing"):
        elec.main(replace(options, variants=("nothing",)))


def test_first_layers_and_random_weights_of_a_language_model(tiny_lm: Path, tmp_path: Path):
    whole, tokens = (
        AutoModel.from_pretrained(tiny_lm).eval(),
        load_tokenizer(str(tiny_lm))("old sad film", return_tensors="pt"),
    )
    language.first_layers(str(tiny_lm), 1, tmp_path / "first")
    language.random_weights(str(tiny_lm), 0, tmp_path / "random")
    first, random = (AutoModel.from_pretrained(tmp_path / name).eval() for name in ("first", "random"))
    with torch.no_grad():
        expected = whole(**tokens, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(first(**tokens).last_hidden_state, expected)
    assert random.config.num_hidden_layers == 2
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(random.state_dict()[name], whole.state_dict()[name])
    assert load_tokenizer(str(tmp_path / "random"))("old sad film")["input_ids"] == tokens["input_ids"][0].tolist()
    with pytest.raises(UserError, match="--lms first-3: .* has 2 layers"):
        language.first_layers(str(tiny_lm), 3, tmp_path / "none")
