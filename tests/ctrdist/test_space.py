"""Search spaces from the command line: what is read, what is refused, and what is drawn."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from ctrdist.errors import UserError
from ctrdist.space import Dimension, draw, override, parse_space, value_of


@dataclass(frozen=True)
class Part:
    rate: float = 0.5
    count: int = 3
    batch_size: int = 8
    kind: Literal["dot", "cosine"] = "dot"
    on: bool = False

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise UserError(f"part.rate: {self.rate} is not over 0")


@dataclass(frozen=True)
class Options:
    data: str = "here"
    rounds: int = 1
    part: Part = field(default_factory=Part)


NAMED = {"tau": "part.rate=loguniform(0.001,0.1)", "K": "part.count=choice(1,3)"}


def parse(*texts: str) -> list[Dimension]:
    return parse_space(texts, NAMED, Options(), {"data"})


def test_every_distribution_is_read_and_written_alike():
    texts = ["part.rate=uniform(0.1,1.5)", "rounds=randint(1,4)", "part.kind=choice(dot,cosine)"]
    assert [str(dimension).replace(" ", "") for dimension in parse(*texts)] == texts
    assert parse("part.rate=quniform(0.25, 1, 0.25)") == [Dimension("part.rate", "quniform", (0.25, 1.0, 0.25))]
    assert parse(" part.on = choice( true, false ) ") == [Dimension("part.on", "choice", (True, False))]
    assert parse("part.rate=choice(1e-5,1)")[0].field == "part.rate"


def test_the_papers_ranges_have_names_and_are_all_taken_where_none_is_given():
    assert list(map(str, parse())) == list(NAMED.values()) == list(map(str, parse("tau", "K")))
    assert list(map(str, parse("K", "rounds=choice(1,2)"))) == [NAMED["K"], "rounds=choice(1,2)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("part.rat=uniform(1,2)", "unknown option 'rat'; did you mean 'rate'"),
        ("prt.rate=uniform(1,2)", "unknown option 'prt'; did you mean 'part'"),
        ("part=uniform(1,2)", "expected 'option: value' lines"),
        ("part.rate=lognormal(1,2)", "no distribution 'lognormal'; did you mean 'loguniform'"),
        ("part.rate", "expected FIELD=DISTRIBUTION"),
        ("taus", "did you mean 'tau'"),
        ("part.rate=uniform(2,1)", "with low under high"),
        ("part.rate=uniform(1)", "expected uniform\\(low,high\\)"),
        ("part.rate=uniform(a,b)", "takes numbers"),
        ("part.rate=uniform(0,inf)", "expected uniform"),
        ("part.rate=loguniform(0,1)", "loguniform with low over 0"),
        ("part.rate=quniform(1,2,5)", "a step over 0"),
        ("part.rate=uniform(-1,2)", "part.rate: -1.0 is not over 0"),
        ("part.count=uniform(1,5)", "part: count: expected int, found 1.0"),
        ("rounds=randint(1.5,3)", "takes whole numbers"),
        ("part.kind=choice(dot,dots)", "did you mean 'dot'"),
        ("part.rate=choice(1)", "two values or more"),
        ("part.kind=choice([64,32],[128])", "choice takes single values"),
        ("part.rate=choice(1,1)", "two values or more, each once"),
        ("part.batch_size=choice(8,16)", "a batch size is not swept.* --part.batch-size"),
        ("data=choice(a,b)", "data is no hyper-parameter"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(text, message):
    with pytest.raises(UserError, match=f"^--space .*{message}"):
        parse(text)


def test_values_of_a_choice_are_those_that_the_options_have():
    """YAML takes 1e-3 for a word; the options' own value is then drawn once, not twice."""
    space = parse("part.rate=choice(5e-1,1e-2)")
    assert space[0].arguments == (0.5, 0.01)
    assert draw(space, 9, 0, {"part.rate": 0.5}) == [{"part.rate": 0.5}, {"part.rate": 0.01}]
    with pytest.raises(UserError, match="two of its values are one"):
        parse("part.rate=choice(1e-3,0.001)")


def test_a_field_has_one_space():
    with pytest.raises(UserError, match="part.rate has a space already"):
        parse("tau", "part.rate=uniform(1,2)")


def test_draws_follow_their_distributions():
    random = np.random.default_rng(0)
    many = {
        kind: np.array([Dimension("x", kind, arguments).draw(random) for _ in range(4000)])
        for kind, arguments in {
            "uniform": (2.0, 4.0),
            "loguniform": (0.01, 100.0),
            "quniform": (0.0, 1.0, 0.25),
            "randint": (1, 4),
            "choice": (1, 3, 5, 10),
        }.items()
    }
    assert many["uniform"].min() >= 2 and many["uniform"].max() <= 4
    assert many["uniform"].mean() == pytest.approx(3, abs=0.05)
    logs = np.log10(many["loguniform"])
    assert logs.min() >= -2 and logs.max() <= 2 and logs.mean() == pytest.approx(0, abs=0.1)
    assert logs.std() == pytest.approx(4 / math.sqrt(12), rel=0.05)
    assert set(many["quniform"]) == {0.0, 0.25, 0.5, 0.75, 1.0} and set(many["randint"]) == {1, 2, 3}
    counts = np.unique(many["choice"], return_counts=True)
    assert counts[0].tolist() == [1, 3, 5, 10] and abs(counts[1] - 1000).max() < 150


def test_trials_are_drawn_by_the_seed_and_more_of_them_begin_alike():
    space = parse("tau", "rounds=randint(1,9)")
    base = {"part.rate": 0.5, "rounds": 1}
    few, more = draw(space, 5, 3, base), draw(space, 12, 3, base)
    assert few[0] == base and more[:5] == few and draw(space, 5, 4, base)[1:] != few[1:]
    assert len({str(values) for values in more}) == 12


def test_a_space_of_few_values_is_drawn_whole_and_no_further():
    drawn = draw(parse("K", "part.on=choice(true,false)"), 50, 0, {"part.count": 3, "part.on": False})
    assert sorted((v["part.count"], v["part.on"]) for v in drawn) == [(1, False), (1, True), (3, False), (3, True)]


def test_values_go_into_options_and_come_out_again():
    options = override(Options(), {"part.rate": 0.1, "part.kind": "cosine", "rounds": 2})
    assert options == Options(rounds=2, part=Part(rate=0.1, kind="cosine"))
    assert value_of(options, "part.rate") == 0.1 and value_of(options, "rounds") == 2


@pytest.mark.parametrize(
    ("kind", "arguments", "value", "edge"),
    [
        ("uniform", (0.0, 1.0), 0.04, "lower"),
        ("uniform", (0.0, 1.0), 0.06, ""),
        ("uniform", (0.0, 1.0), 1.7, "upper"),
        ("loguniform", (0.01, 1.0), 0.011, "lower"),
        ("loguniform", (0.01, 1.0), 0.02, ""),
        ("loguniform", (0.01, 1.0), 0.9, "upper"),
        ("randint", (1, 4), 3, "upper"),
        ("randint", (1, 4), 2, ""),
        ("choice", (5, 1, 3), 1, "lower"),
        ("choice", (5, 1, 3), 3, ""),
        ("choice", ("din", "dnn"), "din", ""),
        ("choice", (True, False), True, ""),
    ],
)
def test_the_edge_of_a_range(kind, arguments, value, edge):
    assert Dimension("x", kind, arguments).edge(value) == edge
