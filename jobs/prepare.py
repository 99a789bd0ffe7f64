"""Write a dataset in the layout that every job reads, from a public dataset's own files or from a synthetic world; or
check one.

    python jobs/prepare.py synthetic --out .demo/data
    python jobs/prepare.py movietweetings --source downloads/movietweetings --out data/movietweetings
    python jobs/prepare.py table --schema schema.yaml --interactions 'log/*.csv' --items 'items.csv' --out data/own
    python jobs/prepare.py check --data data/own

A new adapter is one file in `ctrdist/datasets/` with `PROTOCOLS` and `read`, and one line in `ADAPTERS`.
"""

import json
import sys
import time
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, Union

import tyro
from rich.console import Console
from rich.table import Table

from ctrdist.datasets import (
    amazon_2018,
    amazon_2023,
    bookcrossing,
    goodreads,
    mind,
    movielens,
    movielens_1m,
    movietweetings,
    protocol,
    synthetic,
)
from ctrdist.datasets.canonical import Summary
from ctrdist.datasets.table import TableOptions
from ctrdist.errors import UserError
from ctrdist.pace import Pace
from ctrdist.report import duration
from ctrdist.schema import Schema

ADAPTERS = {
    "movielens-1m": movielens_1m,
    "movielens": movielens,
    "movietweetings": movietweetings,
    "amazon-2018": amazon_2018,
    "amazon-2023": amazon_2023,
    "bookcrossing": bookcrossing,
    "goodreads": goodreads,
    "mind": mind,
}
"""The public datasets, by the name of their subcommand."""


@dataclass(frozen=True)
class Public:
    """A public dataset.

    Args:
        source: folder with the dataset's own files.
        out: folder to write; absent or empty.
        item_text: JSON lines with item_id and text, for as many items as there are.
        positive_threshold: a rating from here up is a click; the protocol's if not given.
        core: keep users and items with at least this many rows; the protocol's if not given.
        split: how rows are dealt to train, valid and test; `day` leaves it to the job's dates. The protocol's if not
            given.
        history: what a user's history holds, only clicks or all rows; the protocol's if not given.
        history_length: at most this many behaviours in a history, 0 writes none; the protocol's if not given.
        seed: decides sampled negatives and the random split.
    """

    source: Path
    out: Path
    item_text: Path | None = None
    positive_threshold: float | None = None
    core: int | None = None
    split: Literal["day", "time", "last-day", "random", "file"] | None = None
    history: Literal["positive", "all"] | None = None
    history_length: int | None = None
    seed: int = 0

    def run(self) -> Summary:
        """Write the dataset."""
        given = {"positive": self.positive_threshold, "core": self.core, "split": self.split,
                 "history": self.history, "history_length": self.history_length}  # fmt: skip
        chosen = self.module.PROTOCOLS[self.protocol]
        chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
        return protocol.write(self.module.read(self.source), chosen, self.out, self.item_text, self.seed)


def subcommand(name: str, module: ModuleType) -> type:
    """The subcommand of an adapter: `Public`, and its protocols by name."""
    names = tuple(module.PROTOCOLS)
    help_ = "how rows become clicks and parts: `default` (all rows, split by day), or as in the paper of that name."
    choice = Annotated[Literal[names], tyro.conf.arg(help=help_)]
    made = make_dataclass(
        name, [("protocol", choice, "default")], bases=(Public,), namespace={"module": module}, frozen=True
    )
    made.__doc__ = Public.__doc__
    return Annotated[made, tyro.conf.subcommand(name, description=module.__doc__)]


@dataclass(frozen=True)
class Synthetic:
    """A world whose true click probabilities are known, with new items every day and English texts.

    Args:
        out: folder to write; absent or empty.
        config: what the world is like.
    """

    out: Path
    config: tyro.conf.OmitArgPrefixes[synthetic.SyntheticConfig] = field(default_factory=synthetic.SyntheticConfig)

    def run(self) -> Summary:
        """Write the dataset."""
        return synthetic.prepare(self.config, self.out)


@dataclass(frozen=True)
class Tables:
    """Tables of your own, of any size: Parquet, or CSV (.csv, .tsv) or JSON lines (.json, .jsonl), gzipped or not.

    Rows are dealt to buckets of users by Ray tasks, so memory is a matter of the bucket and not of the log; on several
    nodes `out` must lie where all of them see it. Quote patterns, so that the shell leaves them alone. A run that was
    cut off is run again with the same arguments.

    Args:
        schema: the schema.yaml of the dataset to be (docs/data.md).
        interactions: glob pattern of the log's files.
        items: glob pattern of the items' files.
        out: folder to write; absent or empty, or with --append a dataset that this command made.
        users: glob pattern of files with user_id and fields of the user, for those that the log itself does not have.
        append: add days that are all later than those in `out`, with the same schema and options; histories go on from
            there.
        options: how columns are read.
    """

    schema: Path
    interactions: str
    items: str
    out: Path
    users: str = ""
    append: bool = False
    options: tyro.conf.OmitArgPrefixes[TableOptions] = field(default_factory=TableOptions)

    def run(self) -> Summary:
        """Write the dataset."""
        from raycluster import cluster, tables

        schema = Schema.load(self.schema)
        cluster.connect()
        return tables.prepare(
            schema, self.interactions, self.items, self.users, self.out.absolute(), self.options, self.append
        )


@dataclass(frozen=True)
class Check:
    """What is in a prepared log, and what is wrong with it: exit status 1 where a job would set rows aside.

    Args:
        data: the prepared log, a folder or URI.
        lm: folder or Hugging Face name of the language model whose tokens texts are counted in; words if not given.
        json: file to write all numbers to as well.
    """

    data: str
    lm: str = ""
    json: Path | None = None

    def run(self) -> int:
        """Read the log and print what is found; returns the exit status."""
        from ctrdist import check_table
        from ctrdist.check import check

        found = check(self.data, self.lm, Progress())
        print(check_table.show(found))
        if self.json:
            try:
                self.json.write_text(json.dumps(found.to_json(), indent=1) + "\n")
            except OSError as error:
                raise UserError(f"--json {self.json}: cannot be written ({error.strerror})") from None
        return 1 if found.bad else 0


class Progress:
    """Says on standard error how far a long pass is: call it with the rows done and all rows."""

    def __init__(self) -> None:
        self.pace = Pace()

    def __call__(self, done: int, rows: int) -> None:
        now = time.time()
        if done < rows and self.pace.due(now):
            left = duration((now - self.pace.began) / done * (rows - done))
            print(f"{done:,} of {rows:,} rows, about {left} left", file=sys.stderr, flush=True)


Command = Union[  # noqa: UP007 - made of a dictionary
    Annotated[Synthetic, tyro.conf.subcommand("synthetic")],
    Annotated[Tables, tyro.conf.subcommand("table")],
    Annotated[Check, tyro.conf.subcommand("check")],
    *(subcommand(name, module) for name, module in ADAPTERS.items()),
]


def show(summary: Summary, out: Path) -> None:
    """Print what was written, as one small table."""
    table = Table(title=str(out), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in (
        ("rows", f"{summary.rows:,}"),
        ("days", f"{summary.days:,}"),
        ("users", f"{summary.users:,}"),
        ("items", f"{summary.items:,}"),
        ("items with text", f"{summary.items_with_text:,}"),
        *([("of these with a free text", f"{summary.free_texts:,}")] if summary.free_texts is not None else []),
        ("click rate", f"{summary.positives / summary.rows:.1%}"),
        *((name, f"{count:,}") for name, count in summary.counts.items()),
        ("rows with history", f"{summary.rows_with_history / summary.rows:.1%}"),
    ):
        table.add_row(name, value)
    if summary.best_auc is not None:
        table.add_row("best possible AUC", f"{summary.best_auc:.4f}")
    Console().print(table)


def main() -> int:
    """Run one subcommand; returns the exit status."""
    command = tyro.cli(Command, description=__doc__)
    try:
        if isinstance(command, Check):
            return command.run()
        summary = command.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(summary, command.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
