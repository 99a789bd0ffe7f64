"""Goodreads: book ratings of one genre from the UCSD Book Graph (Wan and McAuley, 2018).

Protocol `clickprompt` is ClickPrompt's: users and books with ten ratings or more, a rating of 4 or more is a click,
8:1:1 in order of time, no histories. Fifteen fields, as many as there, but shelves for genres, and series and language
for the author's name and the media type, which are in further files. The paper does not tell which books it took.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.datasets.files import drop_repeated, read_json_lines, refuse, with_unlisted
from ctrdist.datasets.protocol import RATING, Protocol, Raw
from ctrdist.errors import UserError
from ctrdist.schema import ITEM_ID, MULTI, TIMESTAMP, USER_ID, Field

PROTOCOLS = {
    "default": Protocol(positive=4),
    "clickprompt": Protocol(core=10, positive=4, split="time", history_length=0),
}
LOG = {"user_id": pa.string(), "book_id": pa.string(), "rating": pa.int64(), "date_added": pa.string()}
WORDS = (
    "title", "format", "publisher", "is_ebook", "language_code", "work_id", "publication_year", "num_pages",
    "average_rating", "text_reviews_count", "description",
)  # fmt: skip
LISTS = {
    "series": pa.list_(pa.string()),
    "authors": pa.list_(pa.struct({"author_id": pa.string()})),
    "popular_shelves": pa.list_(pa.struct({"name": pa.string()})),
}
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
DATE = rf"^[A-Z][a-z]{{2}} ({'|'.join(MONTHS)}) \d\d ([01]\d|2[0-3]):[0-5]\d:[0-5]\d [+-]\d{{4}} \d{{4}}$"
EPOCH = "Thu Jan 01 00:00:00 +0000 1970"
SHELVES = 5
HABITS = (
    r"(^|-)(read|reading|reads|tbr|dnf|abandoned|unfinished|default|own|owned|have|buy|bought|wish|wishlist|want|maybe|"
    r"library|borrowed|shelf|kindle|nook|ebook|ebooks|e-book|e-books|audio|audible|audiobook|audiobooks|my|"
    r"favorite|favorites|favourite|favourites)($|-)|^books$|\d{4}"
)
"""Shelves that tell what a reader does with a book, not what it is about."""


def read(source: Path) -> Raw:
    """`goodreads_interactions_<genre>.json` and `goodreads_books_<genre>.json`, plain or `.gz`.

    The time of a rating is `date_added`. Rows with rating 0 (a book on a shelf, not rated), rows without a readable
    date, and all but the first row of a user and book are dropped and counted.

    Fields: user_id; item_id, title, series and author_id (the first of each), work_id, publisher, shelves (the five
    most used that tell about the book), format, is_ebook, language_code, year, num_pages (in hundreds), average_rating
    (to one decimal), text_reviews_count (to a power of two), all cut off below. The last two are of the day of the
    crawl, so they know of later ratings.

    Raises:
        UserError: a file is missing or there are several, or a line is malformed (named with its number).
    """
    counts: dict[str, int] = {}
    log = _read_log(_find(source, "goodreads_interactions"), counts)
    log, counts["repeated rows of a user and book dropped"] = drop_repeated(log, (USER_ID, ITEM_ID))
    items, counts["repeated books dropped"] = drop_repeated(_read_items(_find(source, "goodreads_books")), [ITEM_ID])
    items, counts["items without metadata"] = with_unlisted(items, log[ITEM_ID])
    return Raw(
        log=log,
        items=items,
        user=(Field(USER_ID, min_count=2),),
        item=(
            *(Field(name, min_count=2) for name in (ITEM_ID, "title", "series", "author_id", "work_id", "publisher")),
            Field("shelves", MULTI, min_count=2),
            *(Field(name) for name in ("format", "is_ebook", "language_code", "year")),
            *(Field(name) for name in ("num_pages", "average_rating", "text_reviews_count")),
        ),
        text=("{title}", "({year}).", "{shelves}.", "{description}", "{text}"),
        counts=counts,
    )


def seconds(dates: pa.Array) -> pa.Array:
    """`Fri Mar 28 22:13:26 -0700 2014` as seconds UTC (int64); null for what is no such date."""
    good = pc.fill_null(pc.match_substring_regex(dates, DATE), False)
    dates = pc.if_else(good, dates, EPOCH)

    def number(start: int, stop: int) -> np.ndarray:
        return pc.cast(pc.utf8_slice_codeunits(dates, start, stop), pa.int64()).to_numpy()

    month = pc.index_in(pc.utf8_slice_codeunits(dates, 4, 7), pa.array(MONTHS)).to_numpy()
    month = ((number(26, 30) - 1970) * 12 + month).astype("datetime64[M]")
    day = month.astype("datetime64[D]") + (number(8, 10) - 1)
    east = np.where(pc.equal(pc.utf8_slice_codeunits(dates, 20, 21), "+").to_numpy(zero_copy_only=False), 60, -60)
    time = number(11, 13) * 3600 + number(14, 16) * 60 + number(17, 19)
    time += day.astype(np.int64) * 86_400 - (number(21, 23) * 60 + number(23, 25)) * east
    good = good.to_numpy(zero_copy_only=False) & (day.astype("datetime64[M]") == month)  # no 31 February
    return pa.array(time, mask=~good)


def _find(source: Path, name: str) -> Path:
    found = sorted(path for path in source.glob(f"{name}_*") if path.name.endswith((".json", ".json.gz")))
    if len(found) != 1:
        there = f"there are {', '.join(path.name for path in found)}" if found else "there is none"
        raise UserError(f"{source}: expected one file {name}_<genre>.json.gz, {there}; put one genre's files there")
    return found[0]


def _read_log(path: Path, counts: dict[str, int]) -> pa.Table:
    table, first, parts = read_json_lines(path, pa.schema(LOG)), 1, []
    unrated = undated = 0
    for batch in table.to_batches():  # the dates of all rows at once would take more memory than the rows
        for name in ("user_id", "book_id", "rating"):
            refuse(path, pc.is_null(batch[name]), batch[name], f"'{name}'", "expected a value", first)
        outside = pc.or_(pc.less(batch["rating"], 0), pc.greater(batch["rating"], 5))
        refuse(path, outside, batch["rating"], "the rating", "ratings go from 0 to 5", first)
        first += batch.num_rows
        rated = batch.filter(pc.greater(batch["rating"], 0))
        time = seconds(rated["date_added"])
        parts.append(
            pa.table(
                {USER_ID: rated["user_id"], ITEM_ID: rated["book_id"], RATING: rated["rating"], TIMESTAMP: time}
            ).filter(pc.is_valid(time))
        )
        unrated, undated = unrated + batch.num_rows - rated.num_rows, undated + time.null_count
    counts |= {"rows without a rating dropped": unrated, "rows without a readable date dropped": undated}
    return pa.concat_tables(parts)


def _read_items(path: Path) -> pa.Table:
    """The columns of the fields, and `description`; what is empty is null."""
    types = {"book_id": pa.string()} | dict.fromkeys(WORDS, pa.string()) | LISTS
    books = read_json_lines(path, pa.schema(types)).combine_chunks()
    refuse(path, pc.is_null(books["book_id"]), books["book_id"], "'book_id'", "expected an id")
    words = {name: pc.utf8_trim_whitespace(books[name].combine_chunks()) for name in WORDS}
    words = {name: pc.if_else(pc.equal(word, ""), None, word) for name, word in words.items()}
    reviews = pc.max_element_wise(_number(words["text_reviews_count"]), 1, skip_nulls=False)
    words |= {
        "num_pages": pc.cast(pc.multiply(pc.divide(_number(words["num_pages"]), 100), 100), pa.string()),
        "text_reviews_count": pc.cast(pc.power(2, pc.cast(pc.floor(pc.log2(reviews)), pa.int64())), pa.string()),
        "average_rating": pc.utf8_slice_codeunits(words["average_rating"], 0, 3),
    }
    year = words.pop("publication_year")
    return pa.table(
        {
            ITEM_ID: books["book_id"],
            **words,
            "year": pc.if_else(pc.match_substring_regex(year, "^[1-9][0-9]{3}$"), year, None),
            "series": _first(books["series"].combine_chunks()),
            "author_id": pc.struct_field(_first(books["authors"].combine_chunks()), "author_id"),
            "shelves": _shelves(books["popular_shelves"].combine_chunks()),
        }
    )


def _number(column: pa.Array) -> pa.Array:
    return pc.cast(pc.if_else(pc.match_substring_regex(column, "^[0-9]{1,9}$"), column, None), pa.int64())


def _first(lists: pa.Array) -> pa.Array:
    return pc.list_element(pc.list_slice(lists, 0, 1, return_fixed_size_list=True), 0)


def _shelves(lists: pa.Array) -> pa.Array:
    """The first names of each list (the file has the most used ones first) that tell what a book is about."""
    names, book = pc.struct_field(pc.list_flatten(lists), "name"), pc.list_parent_indices(lists)
    about = pc.invert(pc.fill_null(pc.match_substring_regex(names, HABITS), True))
    offsets = np.searchsorted(book.filter(about).to_numpy(), np.arange(len(lists) + 1))
    return pc.list_slice(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names.filter(about)), 0, SHELVES)
