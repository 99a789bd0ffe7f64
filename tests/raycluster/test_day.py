import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest

from ctrdist.config import to_dict
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.errors import UserError
from ctrdist.schema import Schema
from ctrdist.storage import State
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_training import LanguageModelConfig
from raycluster.day import DayOptions, latest_release, open_day
from raycluster.stages.language import align, alignment_due, pretraining_due

JANUARY = [dt.date(2024, 1, day) for day in range(1, 12)]
LM = LanguageModelConfig(name="some/model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("day") / "data"
    prepare(SyntheticConfig(users=20, items=30, days=11, rows_per_day=30), out)
    return out


@pytest.fixture
def options(data, tmp_path) -> DayOptions:
    """Options of the ninth day, over a state that released the third: trained on the first two, pre-trained on the
    first."""
    state = State(str(tmp_path / "state"))
    with state.create("schema", Schema.load(data / "schema.yaml").fingerprint):
        pass
    with state.create("runs/2024-01-01/dap", "x", {"date": "2024-01-01", "lm": to_dict(LM)}):
        pass
    with state.create("runs/2024-01-03/roma", "x", {"date": "2024-01-03"}):
        pass
    facts = {"trained_days": ["2024-01-01", "2024-01-02"], "dap": "runs/2024-01-01/dap", "lm": "runs/2024-01-03/roma"}
    with state.create("releases/2024-01-03", "x", facts):
        pass
    return DayOptions(data=str(data), state=state.uri, date=JANUARY[8], train_days=9, test_days=2)


def test_a_day_trains_on_what_no_earlier_day_has(options):
    day = open_day(options)
    assert day.previous.name == "releases/2024-01-03"
    assert day.window.train == tuple(JANUARY[:8]) and day.window.valid == (JANUARY[8],)
    assert day.new_days == tuple(JANUARY[2:8]) and day.trained_days == [str(d) for d in JANUARY[:8]]


def test_from_scratch_takes_the_whole_window(options):
    day = open_day(replace(options, from_scratch=True))
    assert day.previous is None and day.new_days == day.window.train


def test_a_window_without_a_new_day_says_the_way_out(options):
    with pytest.raises(UserError, match="has trained on every day .* 2024-01-01 to 2024-01-02; --from-scratch"):
        open_day(replace(options, date=JANUARY[3], train_days=4, valid_days=2))


def test_a_release_of_the_same_or_a_later_day_is_no_start(options):
    state = State(options.state)
    assert latest_release(state, JANUARY[2]) is None and latest_release(state, JANUARY[3]) is not None


@pytest.mark.parametrize(
    ("date", "every", "due"), [(6, 7, False), (7, 7, True), (8, 7, True), (8, 9, False), (4, 3, True), (8, 0, False)]
)
def test_pretraining_is_due_when_its_days_are_over(options, date, every, due):
    day = open_day(replace(options, date=JANUARY[date], train_days=date + 1))
    assert pretraining_due(day, LM, PretrainConfig(every_days=every)) == due


def test_a_language_model_that_is_taken_as_it_comes_stays_what_it_is(options):
    day = open_day(replace(options, date=JANUARY[9], train_days=10))
    assert not pretraining_due(day, LM, PretrainConfig(epochs=0)) and pretraining_due(day, LM, PretrainConfig())


def test_pretraining_is_due_for_another_language_model_or_from_scratch(options):
    config = PretrainConfig(every_days=0)
    assert pretraining_due(open_day(options), replace(LM, name="other/model"), config)
    assert pretraining_due(open_day(replace(options, from_scratch=True)), LM, config)


@pytest.mark.parametrize(
    ("date", "every", "warm", "due"),
    [(3, 1, True, True), (3, 2, True, False), (4, 2, True, True), (8, 0, True, False), (3, 9, False, True)],
)
def test_alignment_is_due_when_its_days_are_over_and_after_pretraining(options, date, every, warm, due):
    day = open_day(replace(options, date=JANUARY[date], train_days=date + 1))
    assert alignment_due(day, AlignConfig(every_days=every), warm) == due


def test_a_day_on_which_alignment_is_not_due_goes_on_with_its_language_model(options, capsys):
    day = open_day(options)
    lm = day.earlier("lm")
    found = align(day, "roma", None, lm, None, AlignConfig(every_days=30), LM, warm=True, due=False)
    assert found == lm and day.stages == {"roma": lm} and day.skipped == {"roma"}
    assert "not due: last on 2024-01-03, every 30 days" in capsys.readouterr().out
