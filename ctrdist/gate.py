"""Whether a new release takes over from the one that serves: a decision on the scores that both gave the same rows."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctrdist.bootstrap import Drawn, paired_by_user
from ctrdist.errors import UserError
from ctrdist.metrics import auc, calibration, calibration_error, json_safe, log_loss

NOISE = 1e-6
"""A smaller difference is one of rounding: of AUCs, of log losses (nats), of a probability before and after reload."""


@dataclass(frozen=True)
class GateConfig:
    """What a new release may not do worse than the champion.

    Args:
        significance: it loses in AUC, or in log loss, where no more than this share of the resamples shows no loss.
        resamples: of the users, with replacement.
        calibration_ratio: its mean prediction may be the click rate times this, or divided by this, and no further off
            unless the champion's is as far off, or so few rows explain it.
        calibration_error: its expected calibration error may be this large, and no larger unless the champion's is, or
            so few rows explain it.
        coverage_drop: its share of known test users, or items, may be smaller than the champion's by this much.
    """

    significance: float = 0.05
    resamples: int = 1000
    calibration_ratio: float = 1.25
    calibration_error: float = 0.05
    coverage_drop: float = 0.05

    def check(self) -> None:
        """Raise a UserError for a value out of range."""
        if not 0 < self.significance < 0.5:
            raise UserError(f"--gate.significance {self.significance}: over 0 and under 0.5")
        least = math.ceil(2 / self.significance)
        if self.resamples < least:
            raise UserError(
                f"--gate.resamples {self.resamples}: at least {least}, or no loss could be significant at "
                f"--gate.significance {self.significance}"
            )
        if self.calibration_ratio < 1:
            raise UserError(f"--gate.calibration-ratio {self.calibration_ratio}: at least 1, which allows nothing")
        for name in ("calibration_error", "coverage_drop"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"--gate.{name.replace('_', '-')} {value}: 0 to 1")


@dataclass(frozen=True)
class Scores:
    """What one release made of the test rows.

    Args:
        probability: float [n].
        known_users: share of the test users that have a row of their own in its vocabulary.
        known_items: share of the test items that are in its catalog.
    """

    probability: NDArray
    known_users: float = 1.0
    known_items: float = 1.0


def decide(
    user: NDArray,
    label: NDArray,
    challenger: Scores,
    champion: Scores | None,
    click_rate: float,
    config: GateConfig,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether the challenger takes over.

    It does unless something speaks against it: scores that are not finite, a significant loss to the champion in AUC
    or log loss, calibration or coverage out of bounds. Without a champion, or where the champion's own scores are not
    finite, it must beat a constant click rate: significantly, in log loss.

    Args:
        user: integers [n] from 0.
        label: [n] 0 or 1.
        champion: None if there is none.
        click_rate: of the training rows, in (0, 1); what the first champion has to beat.
        seed: decides the resamples.

    Returns:
        What JSON holds: "promoted", "reasons" (what speaks against it), "against" ("champion" or "click rate"), "rows",
        "users", "click_rate" (of the test rows), "significance", "resamples", "seed"; where its scores are finite also
        "challenger" and "champion" or "constant" ("auc", "log_loss", "calibration_ratio", "calibration_error",
        "known_users", "known_items"), and "auc" and "log_loss": their difference (`ctrdist.bootstrap.Difference`).
    """
    if champion and not np.isfinite(champion.probability).all():
        champion = None  # what gives no probabilities is not to be defended
    against = "champion" if champion else "click rate"
    other = champion or Scores(np.full(label.size, click_rate))
    about = {
        "against": against,
        "rows": int(label.size),
        "users": int(np.unique(user).size),
        "click_rate": float((label > 0).mean()),
        "significance": config.significance,
        "resamples": config.resamples,
        "seed": seed,
    }
    if broken := int(np.count_nonzero(~np.isfinite(challenger.probability))):
        return about | refused(f"{broken:,} of its {label.size:,} scores are not finite")
    mine, theirs = _measures(label, challenger), _measures(label, other)
    drawn = paired_by_user(user, label, other.probability, challenger.probability, config.resamples, seed)
    if champion:
        reasons = _losses(mine, theirs, drawn, config)
    else:
        reasons = _gains(mine, theirs, drawn, config)
    reasons += _calibration(mine, theirs if champion else None, label, config)
    reasons += _coverage(mine, theirs, config) if champion else []
    about |= {"challenger": mine, "champion" if champion else "constant": theirs}
    about |= {"auc": drawn.auc._asdict(), "log_loss": drawn.log_loss._asdict()}
    return json_safe(about | {"promoted": not reasons, "reasons": reasons})


def refused(reason: str) -> dict[str, Any]:
    """The decision, as `decide` gives it, where nothing can be compared."""
    return {"promoted": False, "reasons": [reason]}


def _measures(label: NDArray, scores: Scores) -> dict[str, float]:
    clicks = float((label > 0).mean())
    return {
        "auc": auc(label, scores.probability),
        "log_loss": log_loss(label, scores.probability),
        "calibration_ratio": float(scores.probability.mean(dtype=np.float64)) / clicks if clicks else math.nan,
        "calibration_error": calibration_error(calibration(label, scores.probability)),
        "known_users": scores.known_users,
        "known_items": scores.known_items,
    }


def _losses(mine: dict, theirs: dict, drawn: Drawn, config: GateConfig) -> list[str]:
    """What the challenger loses to the champion, in sentences."""
    found = []
    if drawn.auc.value < -NOISE and drawn.auc.not_below <= config.significance:
        found.append(_lost("AUC", mine["auc"], theirs["auc"], drawn.auc.not_below))
    if drawn.log_loss.value > NOISE and drawn.log_loss.not_above <= config.significance:
        found.append(_lost("log loss", mine["log_loss"], theirs["log_loss"], drawn.log_loss.not_above))
    return found


def _lost(metric: str, mine: float, theirs: float, p: float) -> str:
    return f"{metric} {mine:.4f} is significantly worse than the champion's {theirs:.4f} (p = {p:.3f})"


def _gains(mine: dict, constant: dict, drawn: Drawn, config: GateConfig) -> list[str]:
    """What keeps a first champion from being one, in sentences."""
    p = drawn.log_loss.not_below
    if drawn.log_loss.value < -NOISE and p <= config.significance:
        return []
    return [
        f"log loss {mine['log_loss']:.4f} does not significantly beat {constant['log_loss']:.4f}, that of the constant "
        f"click rate (p = {p:.3f})"
    ]


def _calibration(mine: dict, theirs: dict | None, label: NDArray, config: GateConfig) -> list[str]:
    """Where the challenger predicts too much or too little, in sentences."""
    found, rate = [], float((label > 0).mean())
    # By chance the click rate of so many rows is off by this much (twice its standard error, relative to it), and that
    # of each of the ten bins by this much on average.
    by_chance = 2 * math.sqrt((1 - rate) / rate / label.size) if rate else 0.0
    in_bins = math.sqrt(2 / math.pi * rate * (1 - rate) / (label.size / 10))
    most = max(math.log(config.calibration_ratio) + by_chance, _off(theirs["calibration_ratio"]) if theirs else 0)
    if _off(mine["calibration_ratio"]) > most + NOISE:
        found.append(
            f"its mean prediction is {mine['calibration_ratio']:.3f} times the click rate "
            f"(--gate.calibration-ratio {config.calibration_ratio})"
        )
    most = max(config.calibration_error + in_bins, theirs["calibration_error"] if theirs else 0)
    if mine["calibration_error"] > most + NOISE:
        found.append(
            f"its calibration error is {mine['calibration_error']:.4f} (--gate.calibration-error "
            f"{config.calibration_error})"
        )
    return found


def _coverage(mine: dict, theirs: dict, config: GateConfig) -> list[str]:
    """What the challenger no longer knows, in sentences."""
    return [
        f"it knows {mine[known]:.1%} of the test {what}, the champion {theirs[known]:.1%} (--gate.coverage-drop "
        f"{config.coverage_drop})"
        for what in ("users", "items")
        if mine[known := f"known_{what}"] < theirs[known] - config.coverage_drop - NOISE
    ]


def _off(ratio: float) -> float:
    """How far a ratio is from one, in either direction; 0 where it is not defined, for then nothing was clicked."""
    return abs(math.log(max(ratio, 1e-9))) if math.isfinite(ratio) else 0.0
