"""The daily job of ClickPrompt, whole, on a small world and a tiny language model."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ctrdist.backbones import BackboneConfigs, dcnv2
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.errors import UserError
from ctrdist.export import load_click_model
from ctrdist.language.prompts import PromptConfig
from ctrdist.log import log_columns
from ctrdist.prompted import load_scorer
from ctrdist.row_texts import RowTextConfig
from ctrdist.schema import Field, Schema
from ctrdist.storage import State
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.prompted import PromptPretrainConfig
from ctrdist.tasks.prompted_click import PromptedClick, PromptFinetuneConfig
from ctrdist.text_training import LanguageModelConfig
from jobs import clickprompt_daily as JOB

FIRST = date(2024, 1, 4)
MODELS = ["backbone", "with_plm", "without_plm"]


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_lm):
    data = tmp_path_factory.mktemp("clickprompt") / "data"
    prepare(SyntheticConfig(users=60, items=90, days=5, rows_per_day=200), data)
    return JOB.ClickPromptOptions(
        data=str(data), state=str(data.parent / "state"), date=FIRST, train_days=4, test_days=1, workers=1,
        lm=LanguageModelConfig(name=str(tiny_lm)), prompts=PromptConfig(count=2), text=RowTextConfig(max_length=32),
        ctr=ClickConfig(backbone="dcnv2", epochs=1, batch_size=128, dim=8, patience=1,
                        networks=BackboneConfigs(dcnv2=dcnv2.Config(hidden=(16,), dropout=0.0))),
        pretrain=PromptPretrainConfig(epochs=1, batch_size=64),
        finetune=PromptFinetuneConfig(epochs=1, batch_size=128, patience=1),
    )  # fmt: skip


def report_of(options) -> dict:
    return json.loads((Path(options.state) / "releases" / str(FIRST) / "report.json").read_text())


@pytest.fixture(scope="module")
def first_day(ray_cluster, options) -> dict:
    JOB.run(options)
    return report_of(options)


def test_the_report_compares_all_three_on_the_same_rows(first_day, options):
    assert list(first_day["models"]) == [*MODELS, "best"]
    stages = ["tokens", "pretrain", "without_plm", "backbone", "with_plm", "evaluate", "inference"]
    assert list(first_day["stages"]) == stages
    assert all(stage["seconds"] > 0 and stage["rows"] > 0 for stage in first_day["stages"].values())
    scored = pq.read_table(State(options.state).local(f"runs/{FIRST}/evaluate") / "predictions.parquet")
    assert scored.num_rows == first_day["rows"]["test"] == 200
    for name in MODELS:
        model = first_day["models"][name]
        assert model["auc"] == pytest.approx(roc_auc_score(scored["label"], scored[name]))
        assert model["batch_ms"] > 0 and 0 < model["log_loss"] < 3
    assert len({first_day["models"][name]["auc"] for name in MODELS}) == 3
    assert first_day["models"]["with_plm"]["batch_ms"] > first_day["models"]["without_plm"]["batch_ms"]
    assert {"auc", "auc_p", "cold"} <= set(first_day["gain"])
    for name in ("backbone", "without_plm", "with_plm"):
        assert len(first_day["stages"][name]["valid_auc"]) == 1
    assert first_day["stages"]["pretrain"]["valid_loss"] == []


def test_quadrants_are_counted_from_the_training_rows(first_day, options):
    paths = sorted((Path(options.data) / "interactions").rglob("*.parquet"))
    train = [row for path in paths[:3] for row in pq.ParquetFile(path).read().to_pylist()]
    test = pq.ParquetFile(paths[4]).read().to_pylist()

    def tails(name: str) -> list[bool]:
        counts = {}
        for row in train:
            counts[row[name]] = counts.get(row[name], 0) + 1
        edge = sorted(counts.values())[-(-len(counts) // 10) - 1]
        return [counts.get(row[name], 0) <= edge for row in test]

    users, items = np.array(tails("user_id")), np.array(tails("item_id"))
    found = {(q["users"], q["items"]): q["rows"] for q in first_day["quadrants"]}
    expected = {
        (u, i): int(((users == (u == "tail")) & (items == (i == "tail"))).sum())
        for u in ("tail", "head")
        for i in ("tail", "head")
    }
    assert found == expected and sum(found.values()) == 200
    assert set(first_day["quadrants"][-1]["auc"]) == set(MODELS)


def test_attention_on_prompts_is_told_by_field(first_day, options):
    schema = Schema.load(Path(options.data) / "schema.yaml")
    assert list(first_day["attention"]) == [field.name for field in schema.row_fields + schema.item] + ["text"]
    for shares in first_day["attention"].values():
        assert len(shares) == 2 and sum(shares) == pytest.approx(1)


def test_what_is_released_is_the_plain_backbone(first_day, options):
    import mlflow

    state, schema = State(options.state), Schema.load(Path(options.data) / "schema.yaml")
    release = state.find(f"releases/{FIRST}")
    assert {name for name in release.files if name.startswith("clickprompt/")} == {
        "clickprompt/model.safetensors", "clickprompt/model.json"
    }  # fmt: skip
    folders = [state.local(f"runs/{FIRST}/{name}") for name in ("without_plm", "backbone")]
    assert (folders[0] / "model.json").read_bytes() == (folders[1] / "model.json").read_bytes()
    models = [load_click_model(folder, schema).state_dict() for folder in folders]
    assert [(name, value.shape) for name, value in models[0].items()] == [
        (name, value.shape) for name, value in models[1].items()
    ]
    assert isinstance(load_scorer(state.local(f"runs/{FIRST}/with_plm"), schema), PromptedClick)

    mlflow.set_tracking_uri(f"sqlite:///{options.state}/mlflow.db")
    served = mlflow.pyfunc.load_model("models:/clickprompt/1")
    scored = pq.read_table(state.local(f"runs/{FIRST}/evaluate") / "predictions.parquet")
    path = Path(options.data) / "interactions" / "dt=2024-01-05"
    rows = pq.read_table(path, columns=log_columns(schema), partitioning=None)
    names = [column.name for column in served.metadata.get_input_schema()]
    found = served.predict(rows.to_pandas()[names])["probability"].to_numpy()
    np.testing.assert_allclose(np.sort(found), np.sort(scored["without_plm"].to_numpy()), atol=1e-5)


def test_a_run_cut_off_goes_on_and_ends_alike(first_day, options, capsys):
    state = State(options.state)
    for name in (f"runs/{FIRST}/evaluate", f"releases/{FIRST}"):
        state.remove(name)
    JOB.run(options)
    out = capsys.readouterr().out
    for stage in ("backbone", "tokens", "pretrain", "without_plm", "with_plm", "inference"):
        assert f"{stage:10} done before" in out
    assert report_of(options)["models"] == first_day["models"]


@pytest.mark.parametrize("case", ["first", "goes on", "week", "other", "without"])
def test_what_is_trained_from_what(case: str, options, monkeypatch):
    """The stages as the job calls them, in place of the stages themselves."""
    called = {}

    def stage(name: str):
        def call(*arguments, **rest):
            called[arguments[1] if name == "train_click" else name] = (arguments, rest)
            facts = {"batch_ms": {}}
            return SimpleNamespace(name=arguments[1] if name == "train_click" else name, facts=facts)

        return call

    for name in ("tokens", "pretrain", "finetune", "train_click", "inference_times"):
        monkeypatch.setattr(JOB, name, stage(name))
    monkeypatch.setattr(JOB, "read_log", lambda *_, **rest: SimpleNamespace(train=("new",), output=None, **rest))
    monkeypatch.setattr(JOB, "evaluate", lambda *_, **__: {"models": {}})
    monkeypatch.setattr(JOB, "quadrants", lambda *_: [])
    monkeypatch.setattr(JOB, "prompt_attention", lambda *_: {})
    monkeypatch.setattr(JOB.reporting, "assemble", lambda *_, **__: {})
    monkeypatch.setattr(JOB.registry, "release", stage("release"))
    if case == "without":
        options = replace(options, pretrain=replace(options.pretrain, epochs=0))
    before = {"meaning": "other" if case == "other" else options.meaning(), "pretrained": "2024-01-01"}
    today = date(2024, 1, 8) if case == "week" else date(2024, 1, 7)
    day = SimpleNamespace(
        previous=None if case == "first" else SimpleNamespace(facts=before), date=today,
        schema=Schema(user=(), item=(Field("item_id"),), text=("{title}",)),
        window=SimpleNamespace(train=("old", "new")), earlier=lambda part: f"earlier {part}",
    )  # fmt: skip
    JOB.clickprompt(day, options)
    alone, together = called["without_plm"][1], called["finetune"]
    facts = called["release"][0][4]
    assert facts["meaning"] == options.meaning()
    beside = called["backbone"][1]
    assert (beside["days"], beside["warm"]) == (alone["days"], alone["warm"]), "the backbone is trained alike"
    assert beside["start"] == ("earlier backbone" if alone["warm"] else None)
    if case in ("goes on", "without"):
        assert "pretrain" not in called and facts["pretrained"] == "2024-01-01"
        assert (alone["start"], alone["days"], alone["warm"]) == ("earlier clickprompt", ("new",), True)
        assert together[0][5:7] == ("earlier with_plm", ("new",)) and together[1]["warm"]
    else:
        assert called["pretrain"][0][5] == ("old", "new") and facts["pretrained"] == str(today)
        assert (alone["start"].name, alone["days"], alone["warm"]) == ("pretrain", ("old", "new"), False)
        assert together[0][5].name == "pretrain" and together[0][6] == ("old", "new") and not together[1]["warm"]
    assert list(called["release"][0][2]) == ["clickprompt"]


def test_a_second_day_goes_on_from_the_first_on_new_rows_alone(in_one_process, options, tmp_path):
    """With learning rates of nothing, the second day ends with the first one's weights."""
    first = replace(options, state=str(tmp_path), date=date(2024, 1, 3), train_days=3)
    still = {"lr": 1e-30, "table_lr": 1e-30, "weight_decay": 0.0}
    second = replace(first, date=FIRST, ctr=replace(first.ctr, **still),
                     finetune=replace(first.finetune, **still, lm_lr=0.0, prompt_lr=1e-30))  # fmt: skip
    JOB.run(first)
    JOB.run(second)
    state, report, schema = State(str(tmp_path)), report_of(second), Schema.load(Path(options.data) / "schema.yaml")
    assert list(report["stages"]) == ["tokens", "without_plm", "backbone", "with_plm", "evaluate", "inference"]
    assert {report["stages"][stage]["rows"] for stage in ("without_plm", "backbone", "with_plm")} == {200}
    assert state.find(f"releases/{FIRST}").facts["pretrained"] == "2024-01-03" and "attention" not in report
    for stage in ("without_plm", "backbone", "with_plm"):
        before, after = (load_scorer(state.local(f"runs/{day}/{stage}"), schema) for day in (first.date, FIRST))
        old, new = before.state_dict(), after.state_dict()
        same = [name for name in old if "tables" not in name and "exp_avg" not in name]
        for name in same:
            torch.testing.assert_close(new[name], old[name], msg=f"{stage} {name}")
        assert len(same) > 5
    # The new day's users and items have rows and texts of their own.
    tables = [load_click_model(state.local(f"runs/{day}/without_plm"), schema).tables for day in (first.date, FIRST)]
    assert any(tables[1][name].rows > table.rows for name, table in tables[0].items())
    for name, table in tables[0].items():
        torch.testing.assert_close(tables[1][name].weight[: table.rows], table.weight)


def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(in_one_process, killed_in_turn, options, tmp_path):
    whole, killed = (replace(options, state=str(tmp_path / name)) for name in "ab")
    outputs = ("read", "tokens", "pretrain", "without_plm", "backbone", "with_plm", "evaluate", "inference")
    JOB.run(whole)
    killed_in_turn(JOB.run, killed, [*(f"runs/{FIRST}/{output}" for output in outputs), f"releases/{FIRST}"])
    models = [report_of(one)["models"] for one in (whole, killed)]
    for model in (model for of_run in models for model in of_run.values()):
        model.pop("batch_ms", None)  # a time
    assert models[0] == models[1]


def test_pretraining_means_the_same_whenever_it_is_due_and_however_it_fits_the_memory(options):
    later = replace(options.pretrain, every_days=30, chunk=8)
    same = replace(options, pretrain=later, lm=replace(options.lm, gradient_checkpointing=True))
    other = replace(options, pretrain=replace(options.pretrain, mask_probability=0.3))
    assert same.meaning() == options.meaning() != other.meaning()
    slower = replace(options, ctr=replace(options.ctr, lr=1e-5))
    assert slower.meaning() == options.meaning(), "later days may go on at other rates"


def test_what_makes_no_sense_is_refused_before_anything_is_read(options, lm_family):
    other = replace(options, lm=LanguageModelConfig(name=str(lm_family("modernbert"))))
    with pytest.raises(UserError, match="modernbert reads no prompts; take one of bert"):
        JOB.run(other)
    shifted = replace(
        options, lm=LanguageModelConfig(name=str(lm_family("bart"))), prompts=PromptConfig(shift_positions=True)
    )
    with pytest.raises(UserError, match="prompts.shift_positions: not for bart"):
        JOB.run(shifted)
    for changed, message in (
        ({"lm": {"precision": "float64"}}, "float64 is of both models, or of none"),
        ({"ctr": {"precision": "float64"}}, "float64 is of both models, or of none"),
        ({"lm": {"gradient_checkpointing": True}, "finetune": {"lm_lr": 0.0}}, "give --finetune.chunk"),
    ):
        groups = {group: replace(getattr(options, group), **values) for group, values in changed.items()}
        with pytest.raises(UserError, match=message):
            JOB.run(replace(options, **groups))
    with pytest.raises(UserError, match="no such backbone; did you mean 'dcnv2'"):
        JOB.run(replace(options, ctr=replace(options.ctr, backbone="dcnv3")))
