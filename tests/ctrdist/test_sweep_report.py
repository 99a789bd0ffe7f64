"""What a sweep leaves behind: its table, its page, and the options of the best as the daily job reads them."""

from dataclasses import replace

import pytest

from ctrdist.config import load_yaml
from ctrdist.space import Dimension, override
from ctrdist.sweep_report import best_options, parallel_coordinates, sensitivity, sweep_page, sweep_table
from ctrdist.tasks.click import ClickConfig
from ctrdist.trials import Trial, rank
from jobs.cela_daily import CelaOptions

SPACE = [
    Dimension("align.temperature", "loguniform", (0.01, 10.0)),
    Dimension("align.similarity", "choice", ("dot", "cosine")),
]


@pytest.fixture
def trials() -> list[Trial]:
    found = []
    for number, (rate, kind, auc, status) in enumerate(
        [
            (1.0, "dot", 0.7, "done"),
            (0.1, "cosine", 0.8, "done"),
            (0.02, "dot", 0.6, "stopped"),
            (5.0, "dot", None, "failed"),
        ]
    ):
        values = {"align.temperature": rate, "align.similarity": kind}
        curve = {1: auc} if auc else {}
        found.append(Trial(number, values, 0, 0, status, curve, auc))
    again = [replace(found[1], seed=seed, repeat=seed, auc=0.7 + 0.02 * seed, curve={1: 0.7}) for seed in (1, 2)]
    return found + again


def test_the_table_has_mean_and_spread(trials):
    lines = sweep_table(rank(trials), SPACE).splitlines()
    assert lines[0].split()[:4] == ["place", "trial", "align.temperature", "align.similarity"]
    assert lines[1].split() == ["1", "1", "0.1", "cosine", "0.8000", "0.7300", "0.0141", "2", "1"]
    assert lines[2].split()[:5] == ["2", "0", "1", "dot", "0.7000"] and lines[2].endswith("the options' own values")
    assert lines[3].endswith("stopped early") and len(lines) == 4


def test_the_plots_show_every_trial_with_an_auc(trials):
    drawn = [trial for trial in trials if trial.auc is not None]
    axes = {axis["label"]: axis for axis in parallel_coordinates(drawn, SPACE).data[0]["dimensions"]}
    assert list(axes["validation AUC"]["values"]) == [0.7, 0.8, 0.6, 0.72, 0.74]
    assert list(axes["align.temperature"]["values"]) == pytest.approx([0.0, -1.0, -1.69897, -1.0, -1.0], abs=1e-5)
    assert list(axes["align.similarity"]["values"]) == [0, 1, 0, 1, 1]
    points = {
        (x, y) for trace in sensitivity(drawn, SPACE).data[:3] for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert points == {(trial.values["align.temperature"], trial.auc) for trial in drawn}


def test_the_page_needs_no_network_and_escapes_what_it_shows(trials):
    page = sweep_page("Sweep <x>", "a < b", trials, SPACE, ["at the edge"])
    assert "Sweep &lt;x&gt;" in page and "a &lt; b" in page and "Warning: at the edge" in page
    assert "<script src=" not in page and page.count("Plotly.newPlot(") >= 2 and len(page) > 1_000_000


def test_the_daily_job_takes_the_best_options_as_they_are(tmp_path):
    import datetime as dt

    base = CelaOptions(
        data="/d", state="/s", date=dt.date(2024, 1, 4), train_days=4, from_scratch=True, config="own.yaml", seed=3,
        tracking_uri="http://user:secret@host", workers=2, ctr=ClickConfig(backbone="dcnv2", lr=1e-5),
    )  # fmt: skip
    values = {"align.temperature": 1 / 3, "align.similarity": "dot", "pretrain.simcse_temperature": 1e-5}
    chosen = override(base, values)
    text = best_options(chosen, values, "cela_daily", "sweep x")
    (tmp_path / "best.yaml").write_text(text)
    taken = load_yaml(CelaOptions(), tmp_path / "best.yaml")
    assert taken == replace(chosen, date=None, from_scratch=False, config=None, tracking_uri=None, workers=0)
    assert taken.align.temperature == 1 / 3 and "similarity: dot" in text and "secret" not in text
    assert "# sweep x" in text and "--config THIS_FILE --tracking-uri URI" in text and "epochs" not in text
    assert "--tracking-uri" not in best_options(replace(chosen, tracking_uri="http://host"), values, "cela_daily", "x")
