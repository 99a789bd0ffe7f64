"""The benchmark of ELEC trains what it says: a backbone, and a pair whose vanilla network is a model of its own."""

import json
from pathlib import Path

import pytest

from benchmarks import elec
from benchmarks.cells.options import LogOptions
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.language.encode import EncodeConfig
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.distill import DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig


def measured(folder: Path, tiny_lm: Path, capsys, **distill) -> dict:
    options = elec.Options(
        log=LogOptions(folder / "data", date="2024-01-04", train_days=4, test_days=2),
        lm=str(tiny_lm),
        seeds=(0, 1),
        ctr=ClickConfig(backbone="dnn", dim=4, epochs=1, batch_size=256),
        m_llm=MLLMConfig(hidden=(8, 4), epochs=1, batch_size=256),
        distill=DistillConfig(**distill),
        encode=EncodeConfig(max_length=16, precision="float32"),
    )
    elec.main(options)
    return json.loads(capsys.readouterr().out.rstrip().splitlines()[-1])


def test_without_distillation_the_vanilla_network_is_its_backbone(tmp_path, tiny_lm, capsys):
    prepare(SyntheticConfig(users=60, items=40, days=6, rows_per_day=300), str(tmp_path / "data"))
    untaught = measured(tmp_path, tiny_lm, capsys, score="none", mse_weight=0.0)
    rows = {(row["model"], row["seed"]): row for row in untaught["rows"]}
    assert list(rows) == [("m_llm", 0)] + [(m, s) for s in (0, 1) for m in ("backbone", "gain", "vanilla")]
    for seed in (0, 1):
        assert rows["vanilla", seed]["auc"] == rows["backbone", seed]["auc"] != rows["gain", seed]["auc"]
    assert untaught["ratios"]["auc_vanilla_less_backbone"] == 0
    taught = measured(tmp_path, tiny_lm, capsys, mse_weight=1.0)
    rows = {(row["model"], row["seed"]): row for row in taught["rows"]}
    gain = [rows["vanilla", seed]["auc"] - rows["backbone", seed]["auc"] for seed in (0, 1)]
    assert taught["ratios"]["auc_vanilla_less_backbone"] == pytest.approx(sum(gain) / 2) != 0
