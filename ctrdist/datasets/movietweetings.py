"""MovieTweetings: film ratings from tweets (Dooms et al., 2013), from the dataset's own files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.datasets.files import integers, read_columns, refuse, refuse_repeated
from ctrdist.datasets.films import genre_lists, title_and_year
from ctrdist.datasets.protocol import RATING, Protocol, Raw
from ctrdist.schema import ITEM_ID, MULTI, TIMESTAMP, USER_ID, Field

PROTOCOLS = {"default": Protocol(positive=8)}


def read(source: Path) -> Raw:
    """`ratings.dat` (`user::item::rating::unix time`, ratings 0 to 10) and `movies.dat` (`item::title (year)::genres`).

    Raises:
        UserError: a file is missing, not UTF-8, or has a malformed line (named with its number).
    """
    items = _read_items(source / "movies.dat")
    path = source / "ratings.dat"
    user, item, rating, time = read_columns(path, "user::item::rating::unix time").values()
    rating, time = integers(path, "rating", rating), integers(path, "unix time", time)
    refuse(path, pc.greater(rating, 10), rating, "the rating", "ratings go from 0 to 10")
    return Raw(
        log=pa.table({USER_ID: user, ITEM_ID: item, RATING: rating, TIMESTAMP: time}),
        items=items,
        user=(Field(USER_ID, min_count=2),),
        item=(Field(ITEM_ID, min_count=2), Field("genres", MULTI), Field("year")),
        text=("{title}", "({year}).", "{genres}.", "{text}"),
    )


def _read_items(path: Path) -> pa.Table:
    """item_id, title, year (null if the title has none), genres."""
    item, name, genres = read_columns(path, "item::title (year)::genres", may_be_empty=("genres",)).values()
    refuse_repeated(path, item)
    title, year = title_and_year(name)
    return pa.table({ITEM_ID: item, "title": title, "year": year, "genres": genre_lists(genres)})
