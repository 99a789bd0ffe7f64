"""What the registry holds, and which version serves: list, compare, promote, roll back.

    python jobs/release.py list --state STATE
    python jobs/release.py compare 6 7 --data DATA --state STATE
    python jobs/release.py promote 7 --data DATA --state STATE
    python jobs/release.py rollback --state STATE

State, data and server are those of the daily job: flags, or its `ctr.yaml`.
"""

import datetime as dt
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ctrdist.errors import UserError
from ctrdist.gate import GateConfig
from ctrdist.log import SPLIT_WINDOW, days_after, list_days, list_row_groups
from ctrdist.report import gate_table, metric
from ctrdist.schema import Schema
from ctrdist.storage import Manifest, State
from raycluster import cli, cluster, planning
from raycluster.day import day_releases, say
from raycluster.gate import Gate
from raycluster.ingest import LogReader
from raycluster.mlflow_server import Server
from raycluster.versions import DATE, SERVED_SINCE, Unfit, Version, Versions


@dataclass(frozen=True)
class Registry:
    """Where the versions are.

    Args:
        state: folder or URI of the daily job's state.
        tracking_uri: MLflow's server or database; SQLite in the state if not given.
        model_name: name of the registered model; that of the state's newest release if not given.
        config: YAML file of options; `ctr.yaml` in the working folder is read if it is there.
    """

    state: str = ""
    tracking_uri: str | None = None
    model_name: str = ""
    config: str | None = None


@dataclass(frozen=True)
class List(Registry):
    """All versions of the model, the newest first, and which one serves."""


@dataclass(frozen=True)
class Rollback(Registry):
    """Make the champion before this one champion again; done twice it goes further back."""


@dataclass(frozen=True)
class OnRows(Registry):
    """What versions are compared on.

    Args:
        data: the prepared log, a folder or URI.
        date: the test rows are of the days after it; the later one of the two versions' dates if not given.
        test_days: days after the date to test on.
        seed: decides the resamples.
        gate: what a version may lose.
        plan: how the cluster's resources are shared out, and what to wait for on one that grows by itself; no GPUs.
    """

    data: str = ""
    date: dt.date | None = None
    test_days: int = 1
    seed: int = 0
    gate: GateConfig = field(default_factory=GateConfig)
    plan: planning.PlanConfig = field(default_factory=planning.PlanConfig)


@dataclass(frozen=True)
class Compare(OnRows):
    """Score two versions on the same test rows, and say what the gate would.

    Args:
        champion: number of the version to compare with.
        challenger: number of the version to judge.
    """

    champion: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHAMPION")] = tyro.MISSING
    challenger: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHALLENGER")] = tyro.MISSING


@dataclass(frozen=True)
class Promote(OnRows):
    """Make a version champion, if it is whole and passes the gate.

    Args:
        version: its number.
        force: do not ask the gate.
    """

    version: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="VERSION")] = tyro.MISSING
    force: bool = False


def run(options: Registry) -> None:
    """Do what the command says.

    Raises:
        UserError: what is wrong with the options or the version, or why the gate refuses it.
    """
    if not options.state:
        raise UserError("--state is missing; give it on the command line or in ctr.yaml")
    cluster.check_path("--state", options.state)
    state = State(cluster.absolute(options.state))
    newest = newest_release(state)
    name = options.model_name or newest.facts.get("model_name", "")
    if not name:
        raise UserError(f"{state.path(newest.name)}: names no registered model; give --model-name")
    versions = Versions(Server.of(options.tracking_uri, state.uri), name)
    try:
        if isinstance(options, List):
            list_versions(versions)
        elif isinstance(options, Compare):
            compare(options, state, newest, versions)
        elif isinstance(options, Promote):
            promote(options, state, newest, versions)
        else:
            roll_back(versions)
    except Unfit as error:
        raise UserError(str(error)) from error


def newest_release(state: State) -> Manifest:
    """The newest release of a state. Raises UserError if it has none."""
    names = day_releases(state) or state.names("releases")
    if not names:
        raise UserError(f"--state {state.uri}: no release there; a daily job makes one")
    return state.find(names[-1])


def list_versions(versions: Versions) -> None:
    """Print all versions."""
    table = Table(title=f"{versions.name} at {versions.server.shown}")
    for column in ("version", "date", "alias", "AUC", "log loss", "gate"):
        table.add_column(column, justify="right" if column in ("version", "AUC", "log loss") else "left")
    aliases = versions.aliases()
    for version in versions.all():
        mine = ", ".join(sorted(alias for alias, number in aliases.items() if number == version.number))
        numbers = (metric(_number(version.tags.get(name))) for name in ("auc", "log_loss"))
        table.add_row(version.number, version.tags.get(DATE, "-"), mine, *numbers, _verdict(version))
    Console().print(table)


def _number(text: str | None) -> float | None:
    return float(text) if text not in (None, "None") else None


def _verdict(version: Version) -> str:
    decision = version.decision
    if decision is None:
        return "-"
    if not decision["promoted"]:
        return "; ".join(decision["reasons"])
    return f"{'forced' if decision.get('forced') else 'passed'}, champion since {version.tags.get(SERVED_SINCE, '-')}"


def compare(options: Compare, state: State, newest: Manifest, versions: Versions) -> None:
    """Print what the gate would say of one version against another."""
    pair = [versions.get(number) for number in (options.challenger, options.champion)]
    decision = gate_of(options, state, newest, versions, pair).compare(*pair)
    show(versions, options.challenger, options.champion, decision)


def promote(options: Promote, state: State, newest: Manifest, versions: Versions) -> None:
    """Make a version champion."""
    version, champion = versions.get(options.version), versions.champion()
    if champion and champion.number == version.number:
        return say(f"{versions.name} version {version.number} is champion already. Nothing to do")
    versions.require_whole(version.number)
    if options.force:
        decision = {"version": version.number, "promoted": True, "forced": True, "reasons": []}
        decision["champion_version"] = champion and champion.number
    else:
        pair = [version, champion] if champion else [version]
        decision = gate_of(options, state, newest, versions, pair).judge(version.number)
        show(versions, version.number, champion and champion.number, decision)
    versions.record(version.number, decision)
    if not decision["promoted"]:
        raise UserError(f"the gate refuses {versions.name} version {version.number}; --force promotes it all the same")
    versions.promote(version.number)
    say(f"{versions.name} version {version.number} is champion")


def roll_back(versions: Versions) -> None:
    """Make the champion before this one champion again."""
    now, before = versions.previous()
    versions.require_whole(before)
    versions.demote()
    say(f"{versions.name} version {before} is champion again, in place of version {now}")


def gate_of(options: OnRows, state: State, newest: Manifest, versions: Versions, compared: list[Version]) -> Gate:
    """The gate over the test rows of a date, by what the newest day knows of the log."""
    options.gate.check()
    if not options.data:
        raise UserError("--data is missing; give it on the command line or in ctr.yaml")
    cluster.check_path("--data", options.data)
    data = cluster.absolute(options.data)
    schema, files = Schema.load(f"{data}/schema.yaml"), list_days(data)
    date = options.date or max(version.tags.get(DATE, "") for version in compared)
    days = SPLIT_WINDOW.test
    if str(date)[:1].isdigit():
        days = days_after(list(files), dt.date.fromisoformat(str(date)), options.test_days)
    say(f"test rows of {days[0]} to {days[-1]}")
    groups = list_row_groups(data, files, days, schema)
    cluster.connect()
    reader = LogReader(data, state.uri, newest.facts["read"])
    plan = planning.make_plan(config=options.plan, on_gpus=False)
    return Gate(state, plan, versions, reader, groups, options.gate, options.seed)


def show(versions: Versions, challenger: str, champion: str | None, decision: dict[str, Any]) -> None:
    """Print a decision with its numbers."""
    other = f"version {champion}" if "champion" in decision else "click rate"
    if "challenger" in decision:
        print(gate_table(decision, f"version {challenger}", other), flush=True)
    for reason in decision["reasons"]:
        say(reason)
    say(f"the gate {'lets' if decision['promoted'] else 'does not let'} {versions.name} version {challenger} pass")


COMMANDS = {"list": List(), "compare": Compare(), "promote": Promote(), "rollback": Rollback()}

if __name__ == "__main__":
    cli.main(lambda: run(cli.parse_command(COMMANDS, __doc__)), "`list` says which version serves")
