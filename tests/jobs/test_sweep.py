"""The sweep of each method in one process, on a small world and a tiny language model, and its command line."""

import datetime as dt
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctrdist.backbones import BackboneConfigs, dcnv2
from ctrdist.config import load_yaml
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.errors import UserError
from ctrdist.interaction_text import TextConfig
from ctrdist.language.encode import EncodeConfig
from ctrdist.language.prompts import PromptConfig
from ctrdist.space import override, parse_space
from ctrdist.storage import State
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.m_llm import MLLMConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.tasks.prompted import PromptPretrainConfig
from ctrdist.text_field import FuseConfig
from ctrdist.text_training import LanguageModelConfig
from jobs import cela_daily, clickprompt_daily, elec_daily
from jobs import sweep as JOB
from raycluster import planning, tuner
from raycluster.day import Day
from raycluster.sharing import TrialTracker
from raycluster.stages.elec import FrozenLanguageModelConfig
from raycluster.sweep import SweepOptions, sweep

DATE = dt.date(2024, 1, 3)
SWEEP = SweepOptions(name="s", trials=2, finalists=1, seeds=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three days, and one to test on that cannot be read."""
    out = tmp_path_factory.mktemp("sweep") / "data"
    prepare(SyntheticConfig(users=40, items=50, days=4, rows_per_day=150), out)
    for file in (out / "interactions" / "dt=2024-01-04").glob("*.parquet"):
        file.write_bytes(b"not to be opened")
    return out


@pytest.fixture
def bases(data, tiny_lm, tmp_path) -> dict[str, Any]:
    """Options of each job."""
    day = {"data": str(data), "state": str(tmp_path / "state"), "date": DATE, "train_days": 3, "workers": 1}
    ctr = ClickConfig(backbone="dcnv2", epochs=2, batch_size=128, dim=4, unknown_share=0.0,
                      networks=BackboneConfigs(dcnv2=dcnv2.Config(hidden=(8,), dropout=0.0)))  # fmt: skip
    lm = LanguageModelConfig(name=str(tiny_lm), pooling="mean", precision="float32")
    encode = EncodeConfig(max_length=16, shard_items=64, precision="float32")
    return {
        "cela": cela_daily.CelaOptions(
            **day, ctr=ctr, lm=lm, encode=encode, pretrain=PretrainConfig(max_length=16),
            align=AlignConfig(epochs=1, max_length=16, batch_size=32), fuse=FuseConfig(dropout=0.0)),
        "elec": elec_daily.ElecOptions(
            **day, ctr=ctr, encode=encode, lm=FrozenLanguageModelConfig(name=str(tiny_lm)), text=TextConfig(),
            text_granularity="interaction", m_llm=MLLMConfig(hidden=(8, 4), epochs=1, batch_size=128)),
        "clickprompt": clickprompt_daily.ClickPromptOptions(
            **day, ctr=ctr, lm=lm, prompts=PromptConfig(count=2),
            pretrain=PromptPretrainConfig(epochs=1, batch_size=64)),
    }  # fmt: skip


@pytest.fixture
def here(in_one_process, monkeypatch) -> list[str]:
    """Trials in turn in this process, in place of Ray Tune; and the stages that they make."""
    made: list[str] = []
    make = Day._make

    def counted(self: Day, stage: str, *rest: Any):
        made.append(stage)
        return make(self, stage, *rest)

    def run_trials(work, trials, scheduler, at_once, retries, follower) -> None:
        for trial in trials:
            follower.started(trial)
            tracker = TrialTracker(work.options[trial.name].served_stage, lambda _: None, lambda _: None)
            served = tuner.train_trial(work, trial.name, tracker, nullcontext)
            trial.curve = dict(served.facts["valid_auc"])
            trial.end("done", keeps_best=False)
            follower.ended(trial)

    monkeypatch.setattr(Day, "_make", counted)
    monkeypatch.setattr(tuner, "run_trials", run_trials)
    monkeypatch.setattr(tuner, "new_turns", lambda: None)
    monkeypatch.setattr(planning, "plan_trials", lambda *_: (planning.Plan(1, 0, 1.0, 1), 1))
    return made


CASES = {  # what is swept, and how often each stage is made for two sets of values and one more seed
    "cela": ("tau2", {"read": 1, "id": 2, "dap": 2, "roma": 3, "encode": 3, "mf2": 3}),
    "elec": ("alpha", {"read": 1, "encode": 1, "m_llm": 2, "represent": 2, "distill": 3}),
    "clickprompt": ("prompts.count=choice(2,1)", {"read": 1, "tokens": 1, "pretrain": 3, "without_plm": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_shares_stages_and_ends_in_options_for_the_daily_job(name, bases, here, capsys):
    space, expected = CASES[name]
    method, daily, _ = JOB.METHODS[name]
    base = bases[name]
    sweep(method, base, SWEEP, (space,))
    assert Counter(here) == expected
    state = State(base.state)
    trials = [state.find(trial).facts for trial in state.names("sweeps/s/trials")]
    assert [len(facts["curve"]) for facts in trials] == [2, 2, 2] and {facts["status"] for facts in trials} == {"done"}
    best = state.find("sweeps/s/result").facts
    taken = load_yaml(daily(), Path(base.state) / "sweeps" / "s" / "best.yaml")
    assert taken == replace(override(base, best["values"]), date=None, workers=0)
    assert "the options' own values" in capsys.readouterr().out and not state.folders("runs")
    # Run again, nothing is trained; with more trials, those that ended are taken as they are.
    here.clear()
    sweep(method, base, SWEEP, (space,))
    assert here == [] and "done before" in capsys.readouterr().out


def test_a_sweep_cut_off_goes_on(bases, here, monkeypatch):
    base, options = bases["cela"], replace(SWEEP, finalists=0)
    whole = JOB.CELA.train

    def dies(day: Day, trial: cela_daily.CelaOptions) -> None:
        if trial.align.temperature != base.align.temperature:
            monkeypatch.setattr("jobs.cela_daily.train_click", interrupted)
        whole(day, trial)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    train_click = cela_daily.train_click
    with pytest.raises(KeyboardInterrupt):
        sweep(replace(JOB.CELA, train=dies), base, options, ("tau2",))
    monkeypatch.setattr("jobs.cela_daily.train_click", train_click)
    sweep(JOB.CELA, base, options, ("tau2",))
    assert Counter(here) == {"read": 1, "id": 1, "dap": 1, "roma": 2, "encode": 2, "mf2": 2}


def test_another_search_does_not_take_a_complete_sweeps_name(bases, here):
    base, options = bases["elec"], replace(SWEEP, trials=1, finalists=0)
    sweep(JOB.ELEC, base, options, ())
    sweep(JOB.ELEC, base, options, ())  # the same again
    for other, spaces in ((options, ("distill.mse_weight=choice(0.1,0.2)",)), (replace(options, grace=2), ())):
        with pytest.raises(UserError, match="sweep s is complete, with .*: give this one another name"):
            sweep(JOB.ELEC, base, other, spaces)


def test_the_command_line(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(JOB, "sweep", lambda *arguments: asked.append(arguments))
    (tmp_path / "ctr.yaml").write_text("data: /d\nalign: {temperature: 0.5}\nsweep: {trials: 7}\n")
    JOB.main(["cela", "--space", "alpha", "--space", "align.lr=loguniform(1e-6,1e-4)", "--sweep.seeds", "2"])
    method, base, options, spaces = asked[0]
    assert method is JOB.CELA and spaces == ("alpha", "align.lr=loguniform(1e-6,1e-4)")
    assert base == cela_daily.CelaOptions(data="/d", align=AlignConfig(temperature=0.5))
    assert options == SweepOptions(trials=7, seeds=2)
    with pytest.raises(SystemExit):
        JOB.main(["cella"])
    assert "one of cela, elec, clickprompt" in capsys.readouterr().out


def test_what_makes_no_sense_is_refused_before_anything_runs(bases):
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        sweep(JOB.CELA, bases["cela"], SWEEP, ("align.temprature=uniform(1,2)",))
    with pytest.raises(UserError, match="no such backbone"):
        sweep(JOB.CELA, bases["cela"], SWEEP, ("ctr.backbone=choice(din,dinn)",))
    with pytest.raises(UserError, match="date is no hyper-parameter"):
        sweep(JOB.ELEC, bases["elec"], SWEEP, ("date=choice(2024-01-01,2024-01-02)",))
    with pytest.raises(UserError, match="--sweep.at-once -1: 0 or more"):
        sweep(JOB.CELA, bases["cela"], replace(SWEEP, at_once=-1), ())
    for method in ("cela", "elec", "clickprompt"):  # the papers' ranges fit their options
        assert parse_space((), JOB.METHODS[method][0].spaces, bases[method], ())
