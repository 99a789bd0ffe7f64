"""The cost benchmark adds up what it measured, and its interaction-level alignment is the contrast that it names."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from benchmarks import cost
from benchmarks.cells.interaction import InteractionAlignment, interaction_batches, interaction_texts
from benchmarks.cells.options import LogOptions
from benchmarks.cost import Options, ratios, whole
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.language.encode import EncodeConfig
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokenizer import token_ids
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_training import LanguageModelConfig

CTR = ClickConfig(backbone="dnn", dim=4, epochs=1, batch_size=256, unknown_share=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost") / "data"
    prepare(SyntheticConfig(users=60, items=40, days=6, rows_per_day=200), str(folder))
    return folder


@pytest.fixture(scope="module")
def days(data: Path) -> LogOptions:
    return LogOptions(data, date="2024-01-04", train_days=4, test_days=2)


def test_an_interaction_as_text(days: LogOptions, data: Path, tmp_path: Path):
    log = days.open(tmp_path, raw=True)
    rows = log.train.slice(100, 40)
    texts = interaction_texts(log, str(data), rows)
    histories = rows["history"].to_pylist()
    assert max(map(len, texts)) > 100 and any(not any(history) for history in histories)
    for number, text in enumerate(texts):
        row = {name: rows[name][number].as_py() for name in rows.column_names}
        item = log.texts[row["item"]].as_py()
        assert text.startswith(f"user_id is {row['raw.user_id']}. ") and text.endswith(item)
        names = [log.texts[at].as_py().split(". ")[0] for at in row["history"] if at]
        assert all(name.rstrip(".") in text for name in names)
        assert ("history is" in text) == bool(names)


def test_the_contrast_of_interactions(days: LogOptions, tiny_lm: Path, tmp_path: Path):
    log = days.open(tmp_path)
    torch.manual_seed(0)
    lm = LanguageModel.load(str(tiny_lm), "mean").eval()
    model = ClickModel(log.schema, log.sizes, CTR)
    task = InteractionAlignment(lm, model, AlignConfig(), temperature=0.5, width=8).eval()
    texts = [" ".join("red blue old new long".split()[:n]) for n in (5, 1, 3, 2, 4, 2, 1, 5)]
    tokens = token_ids(lm.tokenizer, texts, 16)
    first, second = interaction_batches(log, log.train.slice(20, 8), tokens, 0, 5)
    assert (len(first), len(second)) == (5, 3)
    ids = [torch.tensor([lm.tokenizer(text)["input_ids"]]) for text in texts[:5]]
    vectors = [task.from_text(lm(each, torch.ones_like(each))) for each in ids]
    table = task.from_table(model.backbone.represent(model.inputs(first.rows))[0])
    logits = F.normalize(torch.cat(vectors), dim=1) @ F.normalize(table, dim=1).T / 0.5
    own = torch.arange(5)
    expected = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    assert task(first)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    named = {id(p) for group in task.parameter_groups() for p in group["params"]}
    assert {id(p) for p in (*task.from_text.parameters(), *model.backbone.mlp.parameters())} <= named


FOUND = {
    "id": {"epoch": 2.0, "epochs": [2.0], "later": 0.5},
    "dap": {"epoch": 10.0, "once": 1.0},
    "roma": {"epoch": 6.0, "once": 2.0, "tokens": 300, "items": 10},
    "encode": {"seconds": 4.0, "new": 0.25},
    "mf2": {"epoch": 2.5, "epochs": [2.5], "later": 0.75},
    "ctrl": {"epoch": 100.0, "tokens": 4000},
    "latency": {"id": np.arange(1.0, 102.0), "fused": np.arange(1.0, 102.0) * 1.5},
}


def test_whole_costs_add_up():
    assert whole(FOUND, (1, 2, 4), 2) == {
        "id": 8.0, "dap": 11.0, "roma": 14.0, "encode": 4.0, "mf2": 10.0, "cela": 47.0, "ctrl_1": 200.0, "ctrl": 208.0
    }  # fmt: skip
    assert ratios(FOUND, Options(paper_epochs=(10, 10, 10), ctrl_epochs=10)) == pytest.approx({
        "mf2_over_id": 1.25, "latency_fused_over_id_p50": 1.5, "latency_fused_over_id_p99": 1.5,
        "cela_over_id": 47 / 8, "cela_over_ctrl": 47 / 208,
        "cela_over_id_papers_epochs": (20 + 101 + 62 + 4 + 25) / 20, "cela_over_ctrl_papers_epochs": 212 / 1020,
        "roma_over_ctrl_epoch": 0.06, "item_tokens_over_interaction_tokens": 0.075, "roma_over_ctrl_over_tokens": 0.8,
        "later_day_over_id": (6 + 2 + 4 + 0.5 + 0.75) / 8,
        "later_day_not_aligned_over_id": (0.5 + 0.75 + 1.0) / 8,
    })  # fmt: skip


def test_a_whole_run(days: LogOptions, tiny_lm: Path, capsys):
    threads = torch.get_num_threads()
    cost.main(Options(
        log=days, rounds=2, ctrl_rows=64, ctrl_length=24, candidates=16, requests=10, ctr=CTR,
        lm=LanguageModelConfig(name=str(tiny_lm), pooling="mean", precision="float32"),
        pretrain=PretrainConfig(max_length=16), align=AlignConfig(batch_size=16, max_length=16),
        encode=EncodeConfig(max_length=16, precision="float32"),
    ))  # fmt: skip
    told = capsys.readouterr().out
    found = json.loads(told.rstrip().splitlines()[-1])
    assert "extrapolated from 64 interactions" in told and torch.get_num_threads() == threads
    assert all(math.isfinite(value) and value > 0 for value in found["ratios"].values())
    stages = {row["stage"]: row for row in found["rows"]}
    assert stages["encode"]["items"] == 40 and stages["roma"]["items"] <= stages["dap"]["items"] == 40
    assert 5 < stages["ctrl"]["mean_tokens"] <= 24 and len(stages["mf2"]["epochs"]) == 2
    assert stages["latency fused"]["p99_ms"] >= stages["latency fused"]["p50_ms"] > 0


def test_a_stage_left_out_is_refused():
    with pytest.raises(SystemExit, match="at least 1 each"):
        cost.main(Options(align=AlignConfig(epochs=0)))


def test_rows_without_raw_values_are_as_before(days: LogOptions, tmp_path: Path):
    bare, raw = days.open(tmp_path), days.open(tmp_path, raw=True)
    kept = [name for name in raw.train.column_names if not name.startswith("raw.")]
    assert raw.train.select(kept).equals(bare.train) and "raw.user_id" in raw.train.column_names
    assert isinstance(raw.train, pa.Table) and bare.fingerprint != raw.fingerprint
    assert days.open(tmp_path).fingerprint == bare.fingerprint
    fewer = bare.with_texts_of(0.5)
    assert 5 < len(fewer.items_with_text) < 35 and len(bare.items_with_text) == 40
    assert fewer.fingerprint != bare.fingerprint and fewer.text_fingerprint != bare.text_fingerprint
