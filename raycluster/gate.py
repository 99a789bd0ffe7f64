"""The gate: a new release against the one that serves, on the same rows of the log, each by its own vocabulary."""

import datetime as dt
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ctrdist.encode import ITEM
from ctrdist.errors import UserError
from ctrdist.gate import GateConfig, Scores, decide, refused
from ctrdist.log import RowGroup, log_columns
from ctrdist.report import metric, signed
from ctrdist.schema import LABEL, USER_ID
from ctrdist.serving.graphs import is_compiled
from ctrdist.serving.model import ServedModel
from ctrdist.storage import Manifest, State, fingerprint
from raycluster.ingest import LogReader
from raycluster.planning import Plan
from raycluster.stages.evaluate import score, user_numbers
from raycluster.versions import CHAMPION, DATE, RELEASE, SERVED_SINCE, Unfit, Version, Versions

CLICK_RATE = "click_rate"
"""Tag of a version: the click rate of the rows that it was trained on."""
COPIES = "gate"
"""Folder of the state for what only the registry has, while it is compared."""
RAW = "raw."


def content(release: Manifest) -> str:
    """Fingerprint of all that a release is made of: the same where it is written once more."""
    return fingerprint({path: digest for path, digest in release.files.items() if not is_compiled(path)})


class ReleaseScorer:
    """An actor that scores rows, as they stand in the log, with whole releases.

    Args:
        reader: whose state has them.
        threads: to compute with.
        releases: outputs by the name of their column.
    """

    def __init__(self, reader: LogReader, threads: int, releases: dict[str, str]) -> None:
        torch.set_num_threads(threads)
        state = State(reader.state)
        self.releases = {name: ServedModel(state.local(output)) for name, output in releases.items()}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Columns `user_id`, `item`, `label` and, of each release, its probability and what it knows of the row."""
        rows = pa.table({name.removeprefix(RAW): batch[name] for name in batch.column_names if name.startswith(RAW)})
        columns = {USER_ID: rows[USER_ID], ITEM: batch[ITEM], LABEL: batch[LABEL]}
        for name, release in self.releases.items():
            columns[name] = release.predict(rows)
            columns[f"{name}.user"], columns[f"{name}.item"] = release.known(rows)
        return pa.table(columns)


@dataclass(frozen=True)
class Gate:
    """What releases are compared on, and how.

    Args:
        state: that has the releases, or takes a copy of those that only the registry has.
        plan: who scores.
        versions: of the model.
        reader: of the log's rows; its items say which rows are good.
        groups: the row groups of the test rows.
        config: what counts as a loss.
        seed: decides the resamples.
    """

    state: State
    plan: Plan
    versions: Versions
    reader: LogReader
    groups: list[RowGroup]
    config: GateConfig
    seed: int = 0

    def judge(self, number: str) -> dict[str, Any]:
        """Whether a version, which is whole, is to take over from the champion (`ctrdist.gate.decide`), and between
        whom: `version`, `champion_version`."""
        version, champion = self.versions.get(number), self.versions.champion()
        about = {"version": number, "champion_version": champion and champion.number}
        if champion and champion.number == number:
            return about | refused("it is the champion already")
        if champion and "" < _date(version) < _date(champion):
            return about | refused(f"it is of {_date(version)}, older than the champion, of {_date(champion)}")
        try:
            return about | self.compare(version, champion)
        except Unfit as error:
            return about | refused(f"it cannot be compared: {error}")

    def compare(self, version: Version, other: Version | None) -> dict[str, Any]:
        """`ctrdist.gate.decide` of two versions; the other one is the champion in it. None stands for the click rate.

        Raises:
            Unfit: the artifact of one is broken, or it reads columns that the log does not have.
            UserError: there are no good rows.
        """
        with ExitStack() as stack:
            named = {"challenger": version} | ({"champion": other} if other else {})
            releases = {name: stack.enter_context(self._release(version)) for name, version in named.items()}
            needed = [column for name in releases.values() for column in self._opened(name).columns]
            keep = dict.fromkeys([USER_ID, *needed])
            has = log_columns(self.reader.open()[0])
            if missing := [column for column in keep if column not in has]:
                raise Unfit(f"the log has no column '{missing[0]}', which {self.versions.name} reads")
            tables = [*score(self.reader, self.groups, tuple(keep), self.plan, ReleaseScorer, releases=releases)]
        if not any(table.num_rows for table in tables):
            raise UserError(f"{self.reader.data}: no good rows to test on")
        table = pa.concat_tables(tables)
        user, item, label = user_numbers(table), table[ITEM].to_numpy(), table[LABEL].to_numpy()
        scores = {name: _scores(table, name, user, item) for name in releases}
        rate = float(version.tags.get(CLICK_RATE) or (label > 0).mean())
        return decide(user, label, scores["challenger"], scores.get("champion"), rate, self.config, self.seed)

    def _opened(self, release: str) -> ServedModel:
        try:
            return ServedModel(self.state.local(release))
        except UserError as error:  # of other code than this
            raise Unfit(f"{error}; jobs/release.py promote --force lets another one serve") from error

    @contextmanager
    def _release(self, version: Version) -> Iterator[str]:
        """Name of the output that has a version's release: its own, or, for a while, a copy of the registry's."""
        own = f"releases/{version.tags.get(DATE)}"
        found = self.state.find(own)
        if found and content(found) == version.tags.get(RELEASE):
            yield own
            return
        copy = f"{COPIES}/{dt.date.today()}-{uuid.uuid4().hex}"  # its own: another gate may be at the same one
        yesterday = dt.date.today() - dt.timedelta(1)
        for left in self.state.names(COPIES):  # by a gate that was killed
            if left < f"{COPIES}/{yesterday}":
                self.state.remove(left)
        try:
            with self.versions.artifact(version.number) as (_, folder), self.state.create(copy) as out:
                shutil.copytree(folder, out, dirs_exist_ok=True)
            yield copy
        finally:
            self.state.remove(copy)


def _date(version: Version) -> str:
    """The day that a version was trained up to; "" for one over the log's own splits, which is of no day."""
    date = version.tags.get(DATE, "")
    return date if date[:1].isdigit() else ""


def _scores(table: pa.Table, name: str, user: np.ndarray, item: np.ndarray) -> Scores:
    """What a release made of the rows; it knows a user, or item, in all of its rows or in none."""
    shares = {}
    for what, ids in (("user", user), ("item", item)):
        _, first = np.unique(ids, return_index=True)
        shares[f"known_{what}s"] = float(table[f"{name}.{what}"].to_numpy()[first].mean())
    return Scores(table[name].to_numpy(), **shares)


def act(versions: Versions, number: str, decision: dict[str, Any]) -> None:
    """Keep the decision of a version, and promote it if it says so and nobody has.

    Cut off at any point and called again, it ends the same; a version that was promoted and rolled back since stays so.
    """
    versions.record(number, decision)
    if decision["promoted"] and SERVED_SINCE not in versions.get(number).tags:
        versions.promote(number)


def stands(versions: Versions, version: Version) -> bool:
    """Whether what was decided of a version still does: it was asked, and was not to take over, has done so, or is
    against the champion of now."""
    decision = version.decision
    if decision is None or "skipped" in decision:
        return False
    now = versions.aliases().get(CHAMPION)
    carried_out = SERVED_SINCE in version.tags or now == version.number
    return not decision["promoted"] or carried_out or now == decision["champion_version"]


def lines(name: str, decision: dict[str, Any]) -> list[str]:
    """A decision for the console, in two or three lines."""
    told, number = [], f"{name} version {decision['version']}"
    if "challenger" in decision:
        mine, auc, loss = decision["challenger"], decision["auc"], decision["log_loss"]
        against = f"champion {decision['champion_version']}" if "champion" in decision else "the constant click rate"
        told.append(f"{number} against {against}: {decision['rows']:,} test rows of {decision['users']:,} users")
        told.append(
            f"AUC {metric(mine['auc'])} ({signed(auc['value'])}), log loss {metric(mine['log_loss'])} "
            f"({signed(loss['value'])}), calibration {metric(mine['calibration_ratio'])}"
        )
    verdict = "is champion" if decision["promoted"] else f"does not take over: {'; '.join(decision['reasons'])}"
    return [*told, f"{number} {verdict}"]
