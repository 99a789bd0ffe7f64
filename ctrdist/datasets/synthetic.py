"""A world with a known truth: users who click on items by interest, and texts that tell what items are about.

Every click is drawn from `p = sigmoid(strength * interest . topics + quality + bias + device + intercept)`, and p is
written beside the label, so a model can be judged against the best that is possible. New items come every day and
tell little by their ids. They favour words that no earlier item used, so that only a model that knows what words mean
can place them.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ctrdist.datasets.canonical import SECONDS_A_DAY, CanonicalWriter, Summary
from ctrdist.datasets.synthetic_words import ASIDES, ENDINGS, MIDDLES, OPENINGS, TITLES, TOPICS
from ctrdist.errors import UserError
from ctrdist.history import history_column, recent_behaviours
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, TIMESTAMP, USER_ID, Field, Schema

TRUTH = "probability"
STEPS = 1_000_000  # probabilities are whole millionths: the same on every machine, and the exact AUC is two counts
FIRST_GROUPS = 2  # word groups of a topic that the start catalogue uses; the others open one by one
INTERESTS = 4  # a user has at most this many topics
AGE_BANDS = ("18-24", "25-34", "35-49", "50-64", "65+")
DEVICES = ("phone", "desktop", "tablet")
DEVICE_EFFECT = np.array([0.1, -0.1, 0.0])
DEVICE_SHARE = np.array([0.6, 0.3, 0.1])
PUBLISHERS = 24


@dataclass(frozen=True)
class SyntheticConfig:
    """What the synthetic world is like. The same configuration gives the same tables.

    Args:
        users: users in total; some may never appear in a small log.
        items: items in total: a share at the start, the others in equal parts on every later day.
        days: days of the log.
        rows_per_day: rows of each day.
        start: first day, YYYY-MM-DD.
        history_length: at most this many of a user's latest earlier clicks in a history; 0 writes none.
        seed: decides every draw.
        start_share: share of the items that exist on the first day.
        new_share: share of a day's rows that show items of that same day.
        recent_share: share of a day's rows that show items by their age, newer ones more often.
        personal_share: share of the rows whose item is picked from the user's own topics.
        unseen_words_share: share of the new items that use the newest words of their topic.
        strength: weight of interest in the logit; 0 makes clicks independent of text.
        intercept: the logit of an item that is of no interest.
        quality: standard deviation of the items' own part of the logit.
        bias: standard deviation of the users' own part of the logit.
    """

    users: int = 2_000
    items: int = 1_500
    days: int = 16
    rows_per_day: int = 4_000
    start: str = "2024-01-01"
    history_length: int = 20
    seed: int = 0
    start_share: float = 0.4
    new_share: float = 0.15
    recent_share: float = 0.2
    personal_share: float = 0.3
    unseen_words_share: float = 0.8
    strength: float = 3.4
    intercept: float = -1.9
    quality: float = 0.3
    bias: float = 0.3

    def check(self) -> None:
        """Raise UserError if an option is out of range."""
        for name in ("users", "items", "days", "rows_per_day"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is too few; give 1 or more")
        for name in ("history_length", "seed", "quality", "bias"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} is negative; give 0 or more")
        for name in ("start_share", "new_share", "recent_share", "personal_share", "unseen_words_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: {getattr(self, name)} is not a share; give a number from 0 to 1")
        if self.new_share + self.recent_share > 1:
            raise UserError(f"recent_share: {self.recent_share} and new_share {self.new_share} are over 1 together")
        try:
            datetime.date.fromisoformat(self.start)
        except ValueError:
            raise UserError(f"start: {self.start!r} is not a day; write it as YYYY-MM-DD, such as 2024-01-01") from None
        first = _start_items(self)
        if first < 1 or (self.days > 1 and self.items - first < self.days - 1):
            raise UserError(
                f"items: {self.items} with start_share {self.start_share} leaves a day of {self.days} without a new "
                f"item; give more items, fewer days or another start_share"
            )


@dataclass(frozen=True)
class Items:
    """The items of the world, by number in order of their first day.

    Args:
        born: [items] day of the log on which the item appears.
        topic: [items] main topic, a position in `TOPICS`.
        group: [items] word group of the main topic.
        mix: [items, topics] float64 share of each topic, rows sum to 1.
        quality: [items] own part of the logit.
        popularity: [items] weight with which an item is shown.
        table: item_id, publisher, title, text.
    """

    born: np.ndarray
    topic: np.ndarray
    group: np.ndarray
    mix: np.ndarray
    quality: np.ndarray
    popularity: np.ndarray
    table: pa.Table


@dataclass(frozen=True)
class Users:
    """The users of the world.

    Args:
        topics: [users, INTERESTS] distinct topics, the favourite first.
        interest: [users, INTERESTS] weight of each, 1 for the favourite and 0 for those that the user has not.
        bias: [users] own part of the logit.
        activity: [users] weight with which a user appears.
        age: [users] position in `AGE_BANDS`.
    """

    topics: np.ndarray
    interest: np.ndarray
    bias: np.ndarray
    activity: np.ndarray
    age: np.ndarray


@dataclass(frozen=True)
class Clicks:
    """Flat arrays of one length: who clicked on which item, in order of time."""

    user: np.ndarray
    item: np.ndarray
    second: np.ndarray


def prepare(config: SyntheticConfig, out: str | Path) -> Summary:
    """Simulate the world day by day into `out`; memory grows with users, items and one day, not with the log.

    Args:
        config: the world.
        out: folder to write; see `CanonicalWriter`.

    Raises:
        UserError: an option is out of range, or `out` is in use.
    """
    config.check()
    items, users = make_items(config), make_users(config)
    schema = Schema(
        user=(Field(USER_ID, min_count=2), Field("age_band")),
        item=(Field(ITEM_ID, min_count=5), Field("publisher")),
        context=(Field("device"),),
        history_length=config.history_length,
        text=("{title}.", "{text}"),
        truth=TRUTH,
    )
    writer = CanonicalWriter(out, schema)
    writer.write_items(items.table)
    seen = np.zeros(config.users, bool)
    counts = np.zeros((2, STEPS + 1), np.int64)
    for user, rows in _days(config, items, users):
        writer.write_interactions(rows)
        seen[user] = True
        millionths = np.rint(rows[TRUTH].to_numpy() * STEPS).astype(np.int64)
        for label in (0, 1):
            counts[label] += np.bincount(millionths[rows[LABEL].to_numpy() == label], minlength=STEPS + 1)
    return writer.finish(users=int(seen.sum()), best_auc=_auc(counts))


def make_items(config: SyntheticConfig) -> Items:
    """The items with their texts; see `Items`."""
    rng = np.random.default_rng([config.seed, 1])
    count, topics = config.items, len(TOPICS)
    born = np.zeros(count, np.int64)
    first = _start_items(config)
    if config.days > 1:
        born[first:] = 1 + np.arange(count - first) * (config.days - 1) // max(count - first, 1)

    topic = rng.integers(topics, size=count)
    second = (topic + rng.integers(1, topics, size=count)) % topics
    share = np.where(rng.random(count) < 0.4, rng.uniform(0.65, 0.85, count), 1.0)
    mix = np.zeros((count, topics))
    mix[np.arange(count), topic] = share
    mix[np.arange(count), second] = 1 - share
    group, second_group = _word_groups(config, born, topic, rng), _word_groups(config, born, second, rng)

    # One item in four is with a publisher of its topic, so a publisher says a little.
    publisher = np.where(rng.random(count) < 0.25, topic * 2 % PUBLISHERS, rng.integers(PUBLISHERS, size=count))
    width = len(str(count))
    phrases = list(TOPICS.values())
    titles, texts = [], []
    for i in range(count):
        main = phrases[topic[i]][group[i]]
        aside = phrases[second[i]][second_group[i]] if share[i] < 1 else ()
        title, text = _compose(main, aside, rng)
        titles.append(title)
        texts.append(text)
    table = pa.table(
        {
            ITEM_ID: [f"i{i:0{width}d}" for i in range(count)],
            "publisher": [f"publisher {p:02d}" for p in publisher],
            "title": titles,
            "text": texts,
        }
    )
    quality, popularity = config.quality * rng.standard_normal(count), np.exp(0.8 * rng.standard_normal(count))
    return Items(born, topic, group, mix, quality, popularity, table)


def make_users(config: SyntheticConfig) -> Users:
    """The users with their interests; see `Users`."""
    rng = np.random.default_rng([config.seed, 2])
    count, topics = config.users, len(TOPICS)
    ranked = np.argsort(rng.random((count, topics)), axis=1, kind="stable")[:, :INTERESTS]
    interest = rng.uniform(0.6, 1.0, (count, INTERESTS))
    interest[:, 0] = 1.0
    interest[np.arange(INTERESTS) >= rng.integers(2, INTERESTS + 1, size=count)[:, None]] = 0.0
    activity = np.exp(0.8 * rng.standard_normal(count))
    age = rng.integers(len(AGE_BANDS), size=count)
    bias = config.bias * rng.standard_normal(count) + 0.1 * (age - (len(AGE_BANDS) - 1) / 2)
    return Users(ranked, interest, bias, activity, age)


def _start_items(config: SyntheticConfig) -> int:
    return config.items if config.days == 1 else round(config.items * config.start_share)


def _word_groups(config: SyntheticConfig, born: np.ndarray, topic: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[items] word group of each item: the newest that its topic has opened by then, or one of those before."""
    groups = len(next(iter(TOPICS.values())))
    # Topics open their groups on different days, so every day brings words of some topics that nobody has seen.
    progress = born / max(config.days - 1, 1) * (groups - FIRST_GROUPS) - topic / len(TOPICS)
    opened = FIRST_GROUPS + np.maximum(np.ceil(progress), 0).astype(np.int64)
    newest = (born > 0) & (rng.random(len(born)) < config.unseen_words_share)
    return np.where(newest, opened - 1, (rng.random(len(born)) * opened).astype(np.int64))


def _compose(main: tuple[str, ...], aside: tuple[str, ...], rng: np.random.Generator) -> tuple[str, str]:
    """Title and text with four phrases of one group, and two of a second topic's group if there is one."""
    a, b, c, d, _ = (main[i] for i in rng.permutation(len(main)))
    sentences = [_pick(OPENINGS, rng).format(b, c), _pick(MIDDLES, rng).format(d)]
    if aside:
        first, second, *_ = (aside[i] for i in rng.permutation(len(aside)))
        sentences.append(_pick(ASIDES, rng).format(first, second))
    else:
        sentences.append(_pick(ENDINGS, rng))
    return _pick(TITLES, rng).format(a), " ".join(sentences)


def _pick(templates: tuple[str, ...], rng: np.random.Generator) -> str:
    return templates[rng.integers(len(templates))]


def _days(config: SyntheticConfig, items: Items, users: Users) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Yield each day's user numbers [rows] and rows as the writer takes them."""
    midnight = int(np.datetime64(config.start, "D").astype(np.int64)) * SECONDS_A_DAY
    width = len(str(config.users))
    user_id = pa.array([f"u{i:0{width}d}" for i in range(config.users)])
    age_band, device_name = pa.array(AGE_BANDS), pa.array(DEVICES)
    item_id = items.table[ITEM_ID].combine_chunks()
    by_topic = np.argsort(items.topic, kind="stable")
    past = Clicks(*(np.zeros(0, np.int64) for _ in range(3)))
    for day in range(config.days):
        rng = np.random.default_rng([config.seed, 3, day])
        second = midnight + day * SECONDS_A_DAY + np.sort(rng.integers(SECONDS_A_DAY, size=config.rows_per_day))
        user = _weighted(np.cumsum(users.activity), rng.random(config.rows_per_day))
        item = _shown(config, items, users, by_topic, user, day, rng)
        device = _weighted(np.cumsum(DEVICE_SHARE), rng.random(config.rows_per_day))

        interest = (items.mix[item[:, None], users.topics[user]] * users.interest[user]).sum(1)
        logit = config.strength * interest + items.quality[item] + users.bias[user] + DEVICE_EFFECT[device]
        probability = np.rint(STEPS / (1 + np.exp(-logit - config.intercept))) / STEPS
        label = (rng.random(config.rows_per_day) < probability).astype(np.int8)

        columns = {
            USER_ID: user_id.take(pa.array(user)),
            ITEM_ID: item_id.take(pa.array(item)),
            LABEL: label,
            TIMESTAMP: second,
            "age_band": age_band.take(pa.array(users.age[user])),
            "device": device_name.take(pa.array(device)),
            TRUTH: probability,
        }
        if config.history_length:
            # The latest clicks of earlier days stand before today's rows; no other row of theirs can matter.
            log = Clicks(np.r_[past.user, user], np.r_[past.item, item], np.r_[past.second, second])
            clicked = np.r_[np.ones(len(past.user), bool), label == 1]
            offsets, rows = recent_behaviours(log.user, log.second, clicked, config.history_length)
            columns[HISTORY] = history_column(offsets[len(past.user) :], log.item[rows], item_id)
            past = _latest(log, clicked, config.history_length)
        yield user, pa.table(columns)


def _shown(
    config: SyntheticConfig,
    items: Items,
    users: Users,
    by_topic: np.ndarray,
    user: np.ndarray,
    day: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """[rows] the item shown in each row: from the day's new ones, the recent ones or all, perhaps of a user's topic."""
    rows = len(user)
    age = day - items.born[by_topic]
    popularity = np.where(age >= 0, items.popularity[by_topic], 0.0)
    pools = (popularity * (age == 0), popularity * np.exp(-np.maximum(age, 0) / 2), popularity)
    shares = [config.new_share, config.recent_share, 1 - config.new_share - config.recent_share]
    pool = _weighted(np.cumsum(shares), rng.random(rows))
    personal = rng.random(rows) < config.personal_share
    weights = users.interest[user].cumsum(1)
    favourite = (weights <= (rng.random(rows) * weights[:, -1])[:, None]).sum(1)
    topic = users.topics[user, np.minimum(favourite, INTERESTS - 1)]
    starts = np.searchsorted(items.topic[by_topic], np.arange(len(TOPICS) + 1))
    draw = rng.random(rows)
    item = np.empty(rows, np.int64)
    for number, weight in enumerate(pools):
        chosen = np.flatnonzero(pool == number)
        total = np.r_[0.0, np.cumsum(weight)]
        low, high = total[starts[topic[chosen]]], total[starts[topic[chosen] + 1]]
        limited = personal[chosen] & (high > low)  # a topic may have no item in the pool: then any topic
        low, high = np.where(limited, low, 0.0), np.where(limited, high, total[-1])
        item[chosen] = by_topic[_weighted(total[1:], (low + draw[chosen] * (high - low)) / total[-1])]
    return item


def _weighted(total: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Positions drawn by weight: `total` their running sum [n], `draw` uniform numbers [rows] from 0 to 1."""
    last = np.searchsorted(total, total[-1])  # where rounding carries a draw to the end, the last of any weight
    return np.minimum(np.searchsorted(total, draw * total[-1], side="right"), last)


def _latest(log: Clicks, clicked: np.ndarray, length: int) -> Clicks:
    """The last `length` clicks of each user, by user and then by time."""
    order = np.lexsort((log.second, log.user))
    order = order[clicked[order]]
    user = log.user[order]
    end = np.searchsorted(user, user, side="right")
    order = order[end - np.arange(len(user)) <= length]
    return Clicks(log.user[order], log.item[order], log.second[order])


def _auc(counts: np.ndarray) -> float:
    """AUC from counts [2, scores] of negatives and positives at each score in rising order; ties count half."""
    negatives, positives = counts.astype(np.float64)
    below = np.cumsum(negatives) - negatives
    pairs = negatives.sum() * positives.sum()
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else float("nan")
