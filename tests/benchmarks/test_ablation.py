"""The ablation computes each thing once, and its figures are those of a paired test over the seeds."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation
from benchmarks.ablation import CELA, ID, VARIANTS, Options, lines, ratios
from benchmarks.cells import study
from benchmarks.cells.options import LogOptions
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.language.encode import EncodeConfig
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_training import LanguageModelConfig


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path) -> Options:
    folder = tmp_path_factory.mktemp("ablation")
    prepare(SyntheticConfig(users=60, items=40, days=6, rows_per_day=300), str(folder / "data"))
    return Options(
        log=LogOptions(folder / "data", date="2024-01-04", train_days=4, test_days=2),
        variants=(CELA, "without-roma"),
        seeds=(0, 1),
        lm_seeds=(0, 1),
        processes=1,
        keep=folder / "kept",
        lm=LanguageModelConfig(name=str(tiny_lm), pooling="mean", precision="float32"),
        ctr=ClickConfig(backbone="dnn", dim=4, epochs=1, batch_size=256),
        pretrain=PretrainConfig(max_length=16),
        align=AlignConfig(epochs=1, batch_size=16, max_length=16),
        encode=EncodeConfig(max_length=16, precision="float32"),
    )


def outcome(options: Options, capsys) -> dict:
    ablation.main(options)
    return json.loads(capsys.readouterr().out.rstrip().splitlines()[-1])


def outputs(options: Options) -> dict[str, str]:
    """By kind and name, each output's own folder, which another try would give another name."""
    found = (options.keep / "ablation").glob("*/*.json")
    return {f"{p.parent.name}/{p.stem}": json.loads(p.read_text())["folder"] for p in found}


def test_a_rerun_computes_nothing_and_another_backbone_only_what_depends_on_it(options, capsys, monkeypatch):
    first = outcome(options, capsys)
    assert [(r["variant"], r["lm_seed"], r["seed"]) for r in first["rows"]] == [
        (ID, None, 0), (ID, None, 1), (CELA, 0, 0), (CELA, 0, 1), (CELA, 1, 0), (CELA, 1, 1),
        ("without-roma", 0, 0), ("without-roma", 0, 1),
    ]  # fmt: skip
    done = outputs(options)
    kinds = [name.split("/")[0] for name in done]
    # DAP of each run serves both variants: two runs of DAP and of ROMA, three tables, 2 + 4 + 2 models.
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"dap": 2, "roma": 2, "tables": 3, "cells": 8}
    aucs = {(r["variant"], r["lm_seed"]): r["auc"] for r in first["rows"] if r["seed"] == 0}
    assert len(set(aucs.values())) == 4

    with monkeypatch.context() as patched:
        patched.setattr(study, "once", None)
        patched.setattr(study, "run", None)
        assert outcome(options, capsys) == first
    assert outputs(options) == done

    # On another backbone DAP is the same; the ID model, its alignment, its table and MF² are not.
    five = outcome(replace(options, table=5, backbones=("dnn", "deepfm"), seeds=(1,), lm_seeds=(1,)), capsys)
    assert [(r["backbone"], r["variant"]) for r in five["rows"]] == [
        ("dnn", ID), ("dnn", CELA), ("deepfm", ID), ("deepfm", CELA)
    ]  # fmt: skip
    assert five["rows"][:2] == [first["rows"][1], first["rows"][5]]
    gain = five["rows"][3]["auc"] - five["rows"][2]["auc"]
    assert five["ratios"]["gain_auc_deepfm"] == pytest.approx(gain)
    new = sorted(name.split("/")[0] for name in set(outputs(options)) - set(done))
    assert new == ["cells", "cells", "roma", "tables"]


def test_lines_are_means_over_seeds_and_a_paired_test():
    draw = np.random.default_rng(0)
    rows = []
    for variant, lm_seed in ((ID, None), (CELA, 0), (CELA, 1), ("cosine", 0)):
        for seed in (3, 5, 8, 9):
            scores = {name: float(draw.random()) for name in ("auc", "log_loss", "auc_cold", "seconds")}
            rows.append({"backbone": "din", "variant": variant, "lm_seed": lm_seed, "seed": seed, "lm_seconds": 7.0}
                        | scores)  # fmt: skip
    found = lines(rows, (3, 5, 8, 9))
    assert [(line["variant"], line["lm_seed"]) for line in found] == [
        (ID, None), (CELA, 0), (CELA, 1), (CELA, "all"), ("cosine", 0)
    ]  # fmt: skip
    auc = np.array([row["auc"] for row in rows]).reshape(4, 4)
    assert found[3]["auc"] == pytest.approx((auc[1] + auc[2]) / 2)
    gain = auc[3] - auc[0]
    assert found[4]["gain_auc"] == pytest.approx(gain)
    # Student's t with 3 degrees of freedom has a closed distribution function.
    t = abs(gain.mean()) / (gain.std(ddof=1) / 2)
    inside = 2 / math.pi * (t / math.sqrt(3) / (1 + t * t / 3) + math.atan(t / math.sqrt(3)))
    assert found[4]["p_auc"] == pytest.approx(1 - inside)
    told = ratios(found, 4)
    assert told["gain_auc_cela"] == pytest.approx((auc[1] / 2 + auc[2] / 2 - auc[0]).mean())
    assert told["sd_of_lm_runs_auc"] == pytest.approx(abs(auc[1].mean() - auc[2].mean()) / math.sqrt(2))


def test_variants_change_options_that_exist():
    for variant in VARIANTS:
        Options().of(variant)
    assert not Options().of("plain-lm").pretrain.epochs and not Options().of("plain-lm").align.epochs
    plan = list(Options(table=5).plan())
    assert plan[:3] == [("autoint", ID, (0,)), ("autoint", CELA, (0,)), ("dcnv2", ID, (0,))] and len(plan) == 8
    with pytest.raises(SystemExit, match="unknown nothing"):
        ablation.main(Options(variants=("nothing",)))
