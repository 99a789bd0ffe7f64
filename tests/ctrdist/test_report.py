import copy
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from ctrdist import metrics, report
from ctrdist.gate import GateConfig, Scores, decide


@pytest.fixture(scope="module")
def whole():
    """A report with every key, of a made day."""
    draw = np.random.default_rng(0)
    n = 30_000
    logit = draw.normal(-1.5, 1, n)
    label = (draw.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    trained = np.floor(draw.lognormal(3, 1.9, n)).astype(int)
    weak = 1 / (1 + np.exp(-logit - draw.normal(0, 1 + 3 / (1 + trained), n)))
    strong = 1 / (1 + np.exp(-logit - draw.normal(0, 0.9, n)))
    users = draw.integers(0, 900, n)
    evaluated = metrics.evaluate(users, trained, label, {"id": weak, "cela": strong})
    gate = decide(users, label, Scores(weak), Scores(strong), 0.2, GateConfig(resamples=40))
    losses = [[step, float(0.3 + 0.4 * np.exp(-step / 900) + draw.normal(0, 0.006))] for step in range(0, 4000, 20)]
    trained_stage = {"seconds": 184.2, "rows": 2_400_000, "skipped": False, "losses": losses,
                     "valid_auc": [[1, 0.702], [2, 0.724], [3, 0.7282], [4, 0.7279]]}  # fmt: skip
    return {
        "date": "2013-09-30",
        "rows": {"train": 1_200_000, "valid": 40_000, "quarantined": 17, **evaluated["rows"]},
        "window": {"train": ["2013-09-01", "2013-09-29"], "valid": ["2013-09-30"] * 2, "test": ["2013-10-01"] * 2},
        "quarantine": {"folder": "/state/2013-09-30/quarantine", "reasons": {"item_id <script> unknown": 12, "x": 5}},
        "models": evaluated["models"] | {"best": {"auc": 0.7401, "log_loss": 0.41, "auc_cold": None}},
        "gain": metrics.gain(trained, label, weak, strong),
        "gate": {"version": "7", "champion_version": "6"} | gate,
        "groups": evaluated["groups"],
        "quadrants": metrics.quadrants(trained // 7, trained, (1, 4), label, {"id": weak, "cela": strong}),
        "attention": {"user_id": [0.2, 0.5, 0.3], "text": [1.0, 0.0, 0.0]},
        "stages": {
            "id": trained_stage,
            "dap": {
                "data_wait": 0.0123,
                "seconds": 61.0,
                "rows": 90_000,
                "skipped": False,
                "losses": losses[:40],
                "valid_auc": [],
            },
            "roma": {"seconds": 44.1, "rows": 90_000, "skipped": False, "losses": losses[:12]},
            "encode": {"seconds": 0.2, "rows": 90_000, "skipped": True},
            "mf2": trained_stage,
            "evaluate": {"seconds": 3.3, "rows": n},
        },
        "text_table": {"items": 90_000, "dim": 384},
        "release": "/state/releases/2013-09-30",
        "peak_memory_bytes": 3_400_000_000,
        "config": {"ctr": {"backbone": "din", "lr": 0.001}},
        "versions": {"torch": "2.13.0", "python": "3.11"},
    }


def test_written_report_is_whole_and_stands_alone(whole, tmp_path):
    page = report.write_report(whole, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(whole))
    text = page.read_text()
    for shown in (f"{whole['models']['cela']['auc']:.4f}", "Item alignment", "17", "best possible", "/state/releases"):
        assert shown in text
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "src=" not in text and "@import" not in text and "url(http" not in text
    for svg in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg[: svg.index("</svg>")] + "</svg>")
    assert text.count("<svg") == 3 + 6 and "Attention on prompts" in text and "Long tail" in text
    assert "#0102" not in text
    assert "Gate: challenger" in text and whole["gate"]["reasons"][0] in text.replace("&#39;", "'")


def test_the_gates_table(whole):
    first, *rows = report.gate_table(whole["gate"], "version 7", "version 6").splitlines()
    assert "version 7" in first and len(rows) == 6
    auc, champion = (whole["models"][name]["auc"] for name in ("id", "cela"))
    assert f"{auc:.4f}" in rows[0] and f"{champion:.4f}" in rows[0] and report.signed(auc - champion) in rows[0]
    assert "p = 0.024" in rows[0] and "100.0%" in rows[5], "one of 41 shows no loss"


def test_plots_are_files_that_need_no_page(whole, tmp_path):
    report.write_plots(whole, tmp_path)
    names = {path.stem for path in tmp_path.glob("*.svg")}
    assert names == {
        "popularity",
        "calibration",
        "attention",
        "id_loss",
        "id_auc",
        "dap_loss",
        "roma_loss",
        "mf2_loss",
        "mf2_auc",
    }
    for path in tmp_path.iterdir():
        text = path.read_text()
        ElementTree.fromstring(text)
        assert "var(" not in text and "#0102" not in text


@pytest.mark.parametrize("dropped", "groups stages gain gate quarantine window text_table config rows versions".split())
def test_a_missing_part_is_left_out(whole, dropped):
    part = {key: value for key, value in whole.items() if key != dropped}
    assert "2013-09-30" in report.render_html(part) and report.console_table(part)


def test_the_least_report_renders():
    least = {"date": "2013-09-30", "models": {"id": {"auc": 0.7}}}
    assert "0.7000" in report.render_html(least)
    assert "0.7000" in report.console_table(least)


def test_undefined_metrics_are_dashes(whole):
    undefined = copy.deepcopy(whole)
    undefined["models"]["id"]["auc_cold"] = undefined["gain"]["cold"] = undefined["gain"]["auc_se"] = None
    for group in undefined["groups"]:
        group["auc"]["id"] = None
    undefined["stages"]["id"]["losses"] = [[1, None], [2, math.nan]]
    assert "None" not in report.render_html(undefined) and "None" not in report.console_table(undefined)


def test_console_table_fits_a_terminal(whole):
    text = report.console_table(whole)
    lines = text.splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 100
    for shown in (
        "1.2%",
        "best possible",
        "mf2",
        "skipped",
        "quarantined",
        "/state/releases/2013-09-30",
        "3.17 GiB",
        "13,029",
    ):
        assert shown in text
    assert "cold +0.1027 ± 0.0099 (p < 0.001)" in text


def test_numbers_for_people():
    assert [report.duration(s) for s in (None, 3.21, 245, 7380)] == ["-", "3.2 s", "4 min 5 s", "2 h 3 min"]
    assert [report.p_value(p) for p in (None, 1e-9, 0.0123)] == ["-", "p < 0.001", "p = 0.012"]
    assert report.signed(-0.00321) == "−0.0032"
    assert report.stage_title("roma_2") == "Item alignment (2)"
