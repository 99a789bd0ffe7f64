"""CELA on MovieTweetings: the daily job over several seeds, beside a logistic regression on the job's own rows.

The regression sees what the job sees: the same training days, the same test rows, ids and texts. The first seed is a
whole run of `jobs/cela_daily.py` with its defaults. The others start from the first one's pre-trained language model
(DAP is half the time) and do all the rest, alignment included, on their own.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from ctrdist.metrics import auc, log_loss
from ctrdist.schema import Schema
from ctrdist.storage import State
from ctrdist.texts import join_texts

ROOT = Path(__file__).parents[1]
STRENGTH = 3.0
"""The regression's C: the best of .1, .3, 1, 3 and 10 on two windows of training days that end before, 2013-07-31 and
08-31."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        source: folder with the dataset's `ratings.dat` and `movies.dat`.
        item_text: JSON lines with `item_id` and `text`; the file `extracts.jsonl` of `source` if there.
        seeds: seeds of the job, one run each.
        date: last day of the training window.
        train_days: calendar days of the window.
        test_days: days after it to test on.
        keep: folder for the data and the states; a temporary one if not given. Complete days in it are not run again.
        arguments: more options of the job, as one string.
    """

    source: Path = ROOT.parent / "shared" / "data" / "movietweetings"
    item_text: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    date: str = "2013-09-30"
    train_days: int = 200
    test_days: int = 30
    keep: Path | None = None
    arguments: str = ""


def run_job(options: Options, data: Path, state: Path, seed: int, pretrained: Path | None = None) -> dict:
    """One run of the daily job, without DAP if there is a pre-trained language model; its report."""
    command = [sys.executable, str(ROOT / "jobs" / "cela_daily.py"), "--data", str(data), "--state", str(state)]
    command += ["--date", options.date, "--train-days", str(options.train_days), "--test-days", str(options.test_days)]
    command += ["--seed", str(seed), *options.arguments.split()]
    if pretrained:
        command += ["--lm.name", str(pretrained), "--pretrain.epochs", "0"]
    subprocess.run(command, check=True, cwd=data.parent, stdout=sys.stderr)
    return json.loads((state / "releases" / options.date / "report.json").read_text())


def regression(data: Path, report: dict, texts: bool) -> dict:
    """Logistic regression on one-hot ids, and TF-IDF of words and word pairs of the item's text."""
    schema = Schema.load(data / "schema.yaml")
    log = pq.read_table(data / "interactions", columns=["user_id", "item_id", "label", "dt"])
    days = pc.cast(log["dt"], pa.string())
    parts = {}
    for name in ("train", "test"):
        first, last = report["window"][name]
        inside = pc.and_(pc.greater_equal(days, first), pc.less_equal(days, last))
        parts[name] = log.filter(inside).to_pandas()
    ids = OneHotEncoder(handle_unknown="ignore")
    columns = {name: [part[["user_id", "item_id"]]] for name, part in parts.items()}
    features = {"train": ids.fit_transform(columns["train"][0]), "test": ids.transform(columns["test"][0])}
    if texts:
        items = pq.read_table(data / "items")
        of_item = dict(zip(items["item_id"].to_pylist(), join_texts(items, schema.text).to_pylist(), strict=True))
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
        words.fit(of_item.values())
        for name, part in parts.items():
            features[name] = hstack([features[name], words.transform(part["item_id"].map(of_item))]).tocsr()
    model = LogisticRegression(C=STRENGTH, max_iter=300).fit(features["train"], parts["train"]["label"])
    score = model.predict_proba(features["test"])[:, 1]
    label = parts["test"]["label"].to_numpy()
    seen = parts["test"]["item_id"].map(parts["train"]["item_id"].value_counts()).fillna(0).to_numpy()
    assert report["rows"]["quarantined"] or (len(label), (seen < 5).sum()) == tuple(
        report["rows"][name] for name in ("test", "cold")
    )
    return {
        "auc": auc(label, score),
        "log_loss": log_loss(label, score),
        "auc_cold": auc(label[seen < 5], score[seen < 5]),
    }


def main(options: Options) -> None:
    """Prepare, run every seed, fit the regressions, print a table and the JSON line."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        data = folder / "data"
        texts = options.item_text or options.source / "extracts.jsonl"
        if not (data / "schema.yaml").exists():
            if not options.source.is_dir():
                raise SystemExit(f"{options.source}: no such folder; --source names the dataset's own files")
            prepare = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "movietweetings", "--source"]
            subprocess.run([*prepare, str(options.source), "--item-text", str(texts), "--out", str(data)], check=True)
        states = [folder / f"state-{seed}" for seed in options.seeds]
        reports = [run_job(options, data, states[0], options.seeds[0])]
        pretrained = State(states[0]).local(f"runs/{options.date}/dap")
        for seed, state in list(zip(options.seeds, states, strict=True))[1:]:
            reports.append(run_job(options, data, state, seed, pretrained))
        plain, with_text = (regression(data, reports[0], texts) for texts in (False, True))
    rows = []
    for seed, report in zip(options.seeds, reports, strict=True):
        for model in ("id", "cela"):
            scores = {name: report["models"][model][name] for name in ("auc", "log_loss", "auc_cold", "gauc")}
            rows.append({"model": model, "seed": seed, **scores})
        rows[-1] |= {"seconds": sum(s["seconds"] for s in report["stages"].values()),
                     "peak_gib": report["peak_memory_bytes"] / 2**30}  # fmt: skip
    rows += [{"model": "regression, ids", "seed": None, **plain},
             {"model": "regression, ids + text", "seed": None, **with_text}]  # fmt: skip
    show(rows, reports[0])
    gains = {
        name: [r["models"]["cela"][name] - r["models"]["id"][name] for r in reports] for name in ("auc", "auc_cold")
    }
    ratios = {f"gain_{name}_{kind}": value for name, gain in gains.items()
              for kind, value in (("mean", np.mean(gain)), ("least", min(gain)), ("sd", np.std(gain)))}  # fmt: skip
    print(json.dumps({"benchmark": "movietweetings", "rows": rows, "ratios": ratios}))


def show(rows: list[dict], report: dict) -> None:
    """The table for people."""
    counts = report["rows"]
    table = Table(title=f"{counts['train']:,} training, {counts['test']:,} test rows, {counts['cold']:,} of them cold")
    for name in ("model", "seed", "AUC", "log loss", "AUC cold", "GAUC", "seconds", "peak GiB"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        numbers = [row.get(name) for name in ("auc", "log_loss", "auc_cold", "gauc")]
        shown = ["" if number is None else f"{number:.4f}" for number in numbers]
        cost = [f"{row['seconds']:.0f}", f"{row['peak_gib']:.1f}"] if "seconds" in row else ["", ""]
        table.add_row(row["model"], "" if row["seed"] is None else str(row["seed"]), *shown, *cost)
    Console(width=100).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
