"""Write a dataset in the layout that every job reads: from a public dataset's own files, or from a synthetic world.

    python jobs/prepare.py synthetic --out .demo/data
    python jobs/prepare.py movietweetings --source downloads/movietweetings --out data/movietweetings

A new adapter is one dataclass with `run`, and one line in `Command`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ctrdist.datasets import movietweetings, synthetic
from ctrdist.datasets.canonical import Summary
from ctrdist.errors import UserError


@dataclass(frozen=True)
class MovieTweetings:
    """Film ratings from tweets: ratings.dat and movies.dat, with texts of the films if there are any.

    Args:
        source: folder with the dataset's own ratings.dat and movies.dat.
        out: folder to write; absent or empty.
        item_text: JSON lines with item_id and text, for as many films as there are.
        positive_threshold: a rating from here up (of 0 to 10) is a click.
        history: what a user's history holds: only the films with a click, or all that the user rated.
        history_length: at most this many behaviours in a history; 0 writes none.
    """

    source: Path
    out: Path
    item_text: Path | None = None
    positive_threshold: int = 8
    history: Literal["positive", "all"] = "positive"
    history_length: int = 20

    def run(self) -> Summary:
        """Write the dataset."""
        return movietweetings.prepare(
            self.source, self.out, self.item_text, self.positive_threshold, self.history_length, self.history
        )


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


Command = (
    Annotated[MovieTweetings, tyro.conf.subcommand("movietweetings")]
    | Annotated[Synthetic, tyro.conf.subcommand("synthetic")]
)


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
        ("click rate", f"{summary.positives / summary.rows:.1%}"),
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
        summary = command.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(summary, command.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
