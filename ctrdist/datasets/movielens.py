"""MovieLens: film ratings from movielens.org (GroupLens), the releases of CSV files: latest-small, latest, 20M to 32M.

Protocol `cela` is CELA's: a rating of 3 or more is a click, histories of 20. The paper is silent on its split; here it
is 8:1:1 in order of time. It draws users of `ml-latest` until it has 10 million ratings; here all users stay.
"""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from ctrdist.datasets.files import refuse, refuse_repeated, require, with_unlisted
from ctrdist.datasets.films import genre_lists, title_and_year
from ctrdist.datasets.protocol import RATING, Protocol, Raw
from ctrdist.errors import UserError
from ctrdist.schema import ITEM_ID, MULTI, TIMESTAMP, USER_ID, Field

PROTOCOLS = {
    "default": Protocol(positive=4),
    "cela": Protocol(positive=3, split="time", history_length=20),
}


def read(source: Path) -> Raw:
    """`ratings.csv` (`userId,movieId,rating,timestamp`, ratings .5 to 5) and `movies.csv` (`movieId,title,genres`).

    `tags.csv` is not used: its tags are of all times, so that an early rating's text would know what users wrote later.

    Raises:
        UserError: a file is missing, of the older `.dat` format, not UTF-8, or has a malformed line.
    """
    if (source / "movies.dat").exists() and not (source / "movies.csv").exists():
        raise UserError(
            f"{source}: movies.dat is of the older format; MovieLens 1M is the subcommand movielens-1m, for 10M there "
            "is none: take 20M or a later release"
        )
    items = _read_items(source / "movies.csv")
    path = source / "ratings.csv"
    types = {"userId": pa.string(), "movieId": pa.string(), "rating": pa.float32(), "timestamp": pa.int64()}
    log = _read_csv(path, types).rename_columns([USER_ID, ITEM_ID, RATING, TIMESTAMP])
    for name in (USER_ID, ITEM_ID):
        refuse(path, pc.equal(log[name], ""), log[name], f"'{name}'", "expected an id", first=2)
    between = pc.and_(pc.greater_equal(log[RATING], 0.5), pc.less_equal(log[RATING], 5))
    refuse(path, pc.invert(pc.fill_null(between, False)), log[RATING], "the rating", "ratings go from .5 to 5", first=2)
    refuse(path, log[TIMESTAMP].is_null(), log[TIMESTAMP], "'timestamp'", "expected seconds", first=2)
    items, unlisted = with_unlisted(items, log[ITEM_ID])
    return Raw(
        log=log,
        items=items,
        user=(Field(USER_ID, min_count=2),),
        item=(Field(ITEM_ID, min_count=2), Field("genres", MULTI), Field("year")),
        text=("{title}", "({year}).", "{genres}.", "{text}"),
        counts={"items without metadata": unlisted},
    )


def _read_items(path: Path) -> pa.Table:
    """item_id, title, year (null if the title has none), genres."""
    table = _read_csv(path, dict.fromkeys(("movieId", "title", "genres"), pa.string())).combine_chunks()
    item, name, genres = (column.combine_chunks() for column in table.columns)
    for column, what in ((item, "'movieId'"), (name, "'title'")):
        refuse(path, pc.equal(column, ""), column, what, "expected a value", first=2)
    refuse_repeated(path, item, first=2)
    title, year = title_and_year(name)
    return pa.table({ITEM_ID: item, "title": title, "year": year, "genres": genre_lists(genres)})


def _read_csv(path: Path, types: dict[str, pa.DataType]) -> pa.Table:
    """A file whose header is exactly the names of `types`. Raises UserError with the line of a malformed value."""
    with require(path).open(encoding="utf-8-sig", errors="replace") as stream:
        header = stream.readline().strip()
    if header != ",".join(types):
        raise UserError(f"{path}: line 1 is {header[:80]!r}; expected the header '{','.join(types)}'")
    convert = csv.ConvertOptions(column_types=types, null_values=[""])
    try:
        return csv.read_csv(path, convert_options=convert)
    except pa.ArrowInvalid:
        pass
    try:  # one thread knows the line
        return csv.read_csv(path, csv.ReadOptions(use_threads=False), convert_options=convert)
    except pa.ArrowInvalid as error:
        message = re.sub(r"column #(\d+)", lambda found: f"column '{list(types)[int(found[1])]}'", str(error))
        raise UserError(f"{path}: {message.replace('Row #', 'line ')[:300]}; correct or remove it") from None
