import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import encode, prompt_step
from ctrdist.backbones import BackboneConfigs, dcnv2
from ctrdist.tasks.click import ClickConfig


def test_every_step_is_measured_beside_the_plain_one(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(encode, "peak", lambda _: {"float32": 1e12, "bfloat16": 2e12})
    small = ClickConfig(backbone="dcnv2", dim=4, networks=BackboneConfigs(dcnv2=dcnv2.Config(hidden=(8,))))
    options = prompt_step.Options(lm=str(tiny_lm), rows=8, length=9, users=30, items=20, steps=2, ctr=small)
    prompt_step.main(replace(options, precision="float32"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "prompt_step"
    assert [row["step"] for row in found["rows"]] == ["mlm", "pretrain", "with_plm", "without_plm"]
    assert found["rows"][0]["cost_of_mlm"] == 1 and all(0 < row["peak_share"] < 1 for row in found["rows"])
    assert set(found["ratios"]) == {
        *(f"{name}_over_mlm" for name in ("pretrain", "with_plm", "without_plm")),
        *(f"peak_share_{name}" for name in ("mlm", "pretrain", "with_plm", "without_plm")),
    }
    plain, prompted = (row["peak_share"] * row["ms"] for row in found["rows"][:2])
    assert prompted > plain  # the CTR model's and the writer's products beside those of the same texts
