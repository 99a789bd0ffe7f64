"""Options that benchmarks on a whole log share."""

import datetime as dt
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.cells.log import SOURCE, Log, last_fifth, open_log, prepare_movietweetings
from ctrdist.log import choose_window, list_days
from ctrdist.schema import Schema


@dataclass(frozen=True)
class LogOptions:
    """Which rows, days and texts.

    Args:
        data: a prepared log with texts; MovieTweetings if not given.
        source: folder with MovieTweetings' own `ratings.dat`, `movies.dat` and `extracts.jsonl`.
        window: `dates` takes the days by the next four options, `last-fifth` the last fifth of the rows, by whole days,
            as the test and the week before it for validation.
        date: last day of the training window, YYYY-MM-DD.
        train_days: calendar days of the window.
        valid_days: its last days, which are for validation and not trained on.
        test_days: days after it to test on.
        last_days: with `last-fifth`, use only the last so many days; 0 uses all.
        share: share of the items that have their text: less for a quick run.
    """

    data: Path | None = None
    source: Path = SOURCE
    window: Literal["dates", "last-fifth"] = "dates"
    date: str = "2013-09-30"
    train_days: int = 200
    valid_days: int = 1
    test_days: int = 30
    last_days: int = 0
    share: float = 1.0

    def prepared(self, folder: Path) -> str:
        """The prepared log; MovieTweetings is prepared in a folder, if it is not there."""
        if self.data:
            return str(self.data)
        prepare_movietweetings(self.source, folder / "data", self.source / "extracts.jsonl")
        return str(folder / "data")

    def open(self, folder: Path, raw: bool = False) -> Log:
        """The log in memory.

        Args:
            folder: for the log, if it has to be prepared, and for bad rows.
            raw: keep the values of users' and context fields as they are beside their rows.
        """
        data = self.prepared(folder)
        if self.window == "dates":
            days, date = list(list_days(data)), dt.date.fromisoformat(self.date)
            window = choose_window(days, date, self.train_days, self.valid_days, self.test_days)
        else:
            window = last_fifth(data, self.last_days)
        names = [field.name for field in Schema.load(f"{data}/schema.yaml").row_fields] if raw else []
        log = open_log(data, window, folder / "bad", tuple(names))
        return log.with_texts_of(self.share) if self.share < 1 else log

    @property
    def said(self) -> str:
        """What a table's title should say of it."""
        return f", {self.share:.0%} of the texts" if self.share < 1 else ""


@contextmanager
def kept_in(keep: Path | None) -> Iterator[Path]:
    """The folder for what is done: `keep`, or a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        yield (keep or Path(temporary)).absolute()
