"""What a sweep knows of its trials: how they went, which are the best, and by how much."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ctrdist.space import Dimension, Values

Status = Literal["waiting", "done", "stopped", "failed"]
"""`stopped`: worse than others after as many epochs; `failed`: it died, or could not be trained, in every try."""


@dataclass
class Trial:
    """One training of the whole method with one set of values.

    Args:
        number: of the values, from 0, which are the options' own.
        values: what is drawn, by the name of the field.
        seed: decides every draw of the training.
        repeat: how often a finalist has been trained before with another seed; 0 for the search itself.
        status: how it ended.
        curve: validation AUC of the served model by epoch, from 1.
        auc: that of the weights that are kept; None without any.
        seconds: from its beginning to its end, waiting for stages that other trials make included.
        error: why it failed.
    """

    number: int
    values: Values
    seed: int
    repeat: int = 0
    status: Status = "waiting"
    curve: dict[int, float] = field(default_factory=dict)
    auc: float | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        """What people call it."""
        return f"trial {self.number}" + (f" seed {self.seed}" if self.repeat else "")

    @property
    def ended(self) -> bool:
        """Whether it need not be run again: a trial that failed is, when the sweep is."""
        return self.status in ("done", "stopped")

    def end(self, status: Status, keeps_best: bool) -> None:
        """Take down how it ended.

        Args:
            keeps_best: whether the weights of the best epoch are kept, and not those of the last.
        """
        self.status = status
        if self.curve:
            auc = max(self.curve.values()) if keeps_best else self.curve[max(self.curve)]
            self.auc = auc if math.isfinite(auc) else None
        if self.auc is None and status != "failed":
            self.status, self.error = "failed", "its validation rows have no AUC: all have one label"

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"curve": sorted([epoch, auc] for epoch, auc in self.curve.items())}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Trial":
        """As `facts` gave it."""
        return cls(**facts | {"curve": {epoch: auc for epoch, auc in facts["curve"]}})


@dataclass
class Standing:
    """Where a set of values stands.

    Args:
        trial: of the search.
        repeats: validation AUC of the same values with other seeds.
    """

    trial: Trial
    repeats: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean validation AUC over the other seeds, by which nothing was chosen; that of the search without any."""
        return statistics.fmean(self.repeats) if self.repeats else self.trial.auc

    @property
    def spread(self) -> float | None:
        """Standard deviation over the other seeds; None of less than two."""
        return statistics.stdev(self.repeats) if len(self.repeats) > 1 else None


def rank(trials: list[Trial]) -> list[Standing]:
    """The sets of values, the best first: finalists by their mean, then trials that ran to their end, then the others,
    by validation AUC. Those without one are left out."""
    standings = {t.number: Standing(t) for t in trials if not t.repeat and t.ended and t.auc is not None}
    for trial in trials:
        if trial.repeat and trial.status == "done" and trial.number in standings:
            standings[trial.number].repeats.append(trial.auc)
    return sorted(
        standings.values(),
        key=lambda s: (bool(s.repeats), s.trial.status == "done", s.mean, -s.trial.number),
        reverse=True,
    )


def at_the_edge(space: list[Dimension], values: Values) -> list[str]:
    """A warning for each field whose value lies at an edge of its range: the best may lie beyond."""
    return [
        f"{dimension.field} {shown(values[dimension.field])} lies at the {edge} edge of its range ({dimension}): the "
        "best may lie beyond; sweep again with a wider one"
        for dimension in space
        if (edge := dimension.edge(values[dimension.field]))
    ]


def shown(value: Any) -> str:
    """A value as a person reads it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
