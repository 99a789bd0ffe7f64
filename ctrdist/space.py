"""Search spaces: which options a sweep draws, and from where, by the name of the field."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import yaml

from ctrdist.config import from_dict
from ctrdist.errors import UserError, nearest

T = TypeVar("T")
Values = dict[str, Any]
"""A trial's values, by the name of the field: {"align.temperature": 0.3}."""

ARGUMENTS = {"uniform": "low,high", "loguniform": "low,high", "quniform": "low,high,step", "randint": "low,high"}
"""The distributions of numbers, named as in Ray Tune, and what they take; `choice` takes any values."""
EDGE = 0.05
"""Share of a range, at either end, that counts as its edge."""


@dataclass(frozen=True)
class Dimension:
    """One field of a space.

    Args:
        field: its dotted name, such as `align.temperature`.
        kind: `uniform`, `loguniform`, `quniform`, `randint` (`high` itself is not drawn) or `choice`.
        arguments: of the distribution; the values, of a choice.
    """

    field: str
    kind: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.field}={self.kind}({','.join(map(str, self.arguments))})"

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that must be right for all to be: both ends of a range, every value of a choice."""
        if self.kind == "choice":
            return self.arguments
        low, high = self.arguments[:2]
        return low, high - 1 if self.kind == "randint" else high

    @property
    def count(self) -> float:
        """How many different values it has; infinity for a range of real numbers."""
        if self.kind == "choice":
            return len(self.arguments)
        return self.arguments[1] - self.arguments[0] if self.kind == "randint" else math.inf

    def draw(self, random: np.random.Generator) -> Any:
        """One value."""
        if self.kind == "choice":
            return self.arguments[random.integers(len(self.arguments))]
        low, high = self.arguments[:2]
        if self.kind == "randint":
            return int(random.integers(low, high))
        if self.kind == "loguniform":
            return math.exp(random.uniform(math.log(low), math.log(high)))
        value = random.uniform(low, high)
        if self.kind == "quniform":
            step = self.arguments[2]
            value = min(max(float(np.round(value / step) * step), low), high)
        return value

    def edge(self, value: Any) -> str:
        """`lower` or `upper` where a value lies at that end of the range, or beyond it; else ""."""
        ends = sorted(self.ends) if all(map(_is_number, self.ends)) else []
        if len(ends) < 2 or not _is_number(value):
            return ""
        if self.kind in ("choice", "randint"):
            at = (value - ends[0], value - ends[-1])
        else:
            scale = math.log if self.kind == "loguniform" and value > 0 else float
            low, high = (scale(end) for end in (ends[0], ends[-1]))
            margin = EDGE * (high - low)
            at = (scale(value) - low - margin, scale(value) - high + margin)
        return "lower" if at[0] <= 0 else "upper" if at[1] >= 0 else ""


def parse_space(texts: Collection[str], named: dict[str, str], base: Any, fixed: Collection[str]) -> list[Dimension]:
    """A space from the command line, checked against the options that it draws.

    Args:
        texts: each `FIELD=DISTRIBUTION(ARGUMENTS)`, or one of `named`; none takes all of `named`.
        named: spaces by name, written alike.
        base: the options, a dataclass of dataclasses; whatever is not drawn is as it says.
        fixed: its own fields that are no hyper-parameters.

    Raises:
        UserError: no such field, distribution or name, or a value that the field does not take.
    """
    space = [_parse(named.get(text, text), named) for text in (texts or named)]
    for number, dimension in enumerate(space):
        if dimension.field in {other.field for other in space[:number]}:
            raise UserError(f"--space {dimension}: {dimension.field} has a space already; leave one of them out")
        space[number] = _checked(dimension, base, fixed)
    return space


def _parse(text: str, named: dict[str, str]) -> Dimension:
    found = re.fullmatch(r"\s*([\w.-]+)\s*=\s*(\w+)\s*\((.*)\)\s*", text)
    if not found:
        known = f"; or a name: {nearest(text, named)}" if named else ""
        raise UserError(
            f"--space {text}: expected FIELD=DISTRIBUTION(...), such as ctr.lr=loguniform(1e-4,1e-2){known}"
        )
    field, kind, inner = found[1].replace("-", "_"), found[2], found[3]
    parts = [part.strip() for part in inner.split(",")] if inner.strip() else []
    if kind == "choice":
        if "[" in inner:
            raise UserError(f"--space {text}: choice takes single values; sweep once for each list")
        values = tuple(yaml.safe_load(part) for part in parts)
        if len(set(map(str, values))) < max(len(values), 2) or "" in parts:
            raise UserError(f"--space {text}: choice takes two values or more, each once, such as choice(1,3,5)")
        return Dimension(field, kind, values)
    if kind not in ARGUMENTS:
        raise UserError(f"--space {text}: no distribution '{kind}'; {nearest(kind, [*ARGUMENTS, 'choice'])}")
    wanted = f"{kind}({ARGUMENTS[kind]})"
    try:
        arguments = tuple(map(int if kind == "randint" else float, parts))
    except ValueError:
        raise UserError(f"--space {text}: {wanted} takes {'whole ' * (kind == 'randint')}numbers") from None
    if len(arguments) != len(ARGUMENTS[kind].split(",")) or not all(map(math.isfinite, arguments)):
        raise UserError(f"--space {text}: expected {wanted}")
    if arguments[0] >= arguments[1]:
        raise UserError(f"--space {text}: {wanted} with low under high")
    if kind == "loguniform" and arguments[0] <= 0:
        raise UserError(f"--space {text}: loguniform with low over 0; uniform takes 0")
    if kind == "quniform" and not 0 < arguments[2] <= arguments[1] - arguments[0]:
        raise UserError(f"--space {text}: quniform with a step over 0 and at most high - low")
    return Dimension(field, kind, arguments)


def _checked(dimension: Dimension, base: Any, fixed: Collection[str]) -> Dimension:
    """The dimension, values of a choice as the options have them: YAML takes 1e-3 for a word."""
    if dimension.field.split(".")[-1] == "batch_size":
        raise UserError(
            f"--space {dimension}: a batch size is not swept: with another one the learning rates mean something else. "
            f"Set it once, with --{dimension.field.replace('_', '-')}"
        )
    if dimension.field.split(".")[0] in fixed:
        raise UserError(f"--space {dimension}: {dimension.field} is no hyper-parameter; give it as an option")
    try:
        taken = [value_of(override(base, {dimension.field: value}), dimension.field) for value in dimension.ends]
    except UserError as error:
        raise UserError(f"--space {dimension}: {error}") from None
    if dimension.kind != "choice":
        return dimension
    if len(set(map(str, taken))) < len(taken):
        raise UserError(f"--space {dimension}: two of its values are one")
    return replace(dimension, arguments=tuple(taken))


def override(base: T, values: Values) -> T:
    """`base`, a dataclass of dataclasses, with values by dotted name.

    Raises:
        UserError: no such field, or a value that it does not take.
    """
    nested: dict[str, Any] = {}
    for field, value in values.items():
        *groups, name = field.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return from_dict(base, nested, "options")


def value_of(options: Any, field: str) -> Any:
    """What options have at a dotted name."""
    for name in field.split("."):
        options = getattr(options, name)
    return options


def draw(space: list[Dimension], trials: int, seed: int, base: Values) -> list[Values]:
    """The values of all trials, each another: `base` first, to compare with, then draws; the same for one seed, and
    of fewer trials those that more begin with. They are fewer than `trials` where the space has no more.

    Args:
        base: the space's fields as the options have them.
    """
    random = np.random.default_rng(seed)
    drawn, misses = [base], 0
    possible = math.prod(dimension.count for dimension in space)
    while len(drawn) < trials and misses < max(100, 20 * min(possible, 1e5)):
        values = {dimension.field: dimension.draw(random) for dimension in space}
        if values in drawn:
            misses += 1
        else:
            drawn.append(values)
            misses = 0
    return drawn


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
