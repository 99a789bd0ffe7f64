"""BookCrossing: book ratings with age and country, crawled in 2004 (Ziegler et al., 2005), from the CSV dump.

The dataset has no time, so rows are split 8:1:1 in the order of the file. That order is by user: valid and test are
then of users without a training row. `--split random` shows all parts the same users. Protocol `clickprompt` is
ClickPrompt's as far as the paper tells: a rating of 5 or more is a click, 8:1:1, eight fields; the paper says "by
global timestamps", which these files do not have. No histories are written.
"""

import html
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.datasets.files import drop_repeated, read_lines
from ctrdist.datasets.protocol import RATING, Protocol, Raw
from ctrdist.errors import UserError
from ctrdist.schema import ITEM_ID, USER_ID, Field

# "A threshold of 5" may mean 5 or 6; code of the same group for this dataset (ReLLa) takes 5 and up.
PROTOCOLS = {
    "default": Protocol(positive=5, split="file"),
    "clickprompt": Protocol(positive=5, split="file"),
}
COLUMNS = {
    "BX-Users.csv": ("User-ID", "Location", "Age"),
    "BX-Books.csv": (
        "ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher",
        "Image-URL-S", "Image-URL-M", "Image-URL-L",
    ),
    "BX-Book-Ratings.csv": ("User-ID", "ISBN", "Book-Rating"),
}  # fmt: skip
DECADES = (
    "under ten", "teens", "twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties",
    "nineties", "over a hundred", "over a hundred",
)  # fmt: skip


def read(source: Path) -> Raw:
    """`BX-Users.csv`, `BX-Books.csv` and `BX-Book-Ratings.csv`: ISO-8859-1, `"a";"b";"c"`, `\\"` for a quote inside.

    Ratings go from 0 (implicit: no rating was given) to 10. Lines that cannot be read are set aside and counted, and so
    are books whose ISBN has other signs than letters and digits: the four of the published files. Ratings of books
    that are then not listed are dropped and counted, which leaves 1,031,171 of the 1,149,780, the papers' rows.

    Fields: user_id, age (a decade in words; null outside 5 to 110), location (the country); item_id, title, author,
    year, publisher.

    Raises:
        UserError: a file is missing or has another header.
    """
    counts: dict[str, int] = {}
    users, books, ratings = (_read_file(source / name, columns, counts) for name, columns in COLUMNS.items())
    items = _items(books, counts)
    ratings = _set_aside(ratings, "Book-Rating", r"^([0-9]|10)$", "malformed lines of BX-Book-Ratings.csv", counts)
    listed = pc.is_in(ratings["ISBN"], items[ITEM_ID].combine_chunks())
    ratings = ratings.filter(listed)
    counts["ratings of books not listed dropped"] = len(listed) - ratings.num_rows
    at = pc.index_in(ratings["User-ID"], users["User-ID"].combine_chunks())
    counts["ratings of users not listed"] = at.null_count
    return Raw(
        log=pa.table(
            {
                USER_ID: ratings["User-ID"],
                ITEM_ID: ratings["ISBN"],
                RATING: pc.cast(ratings["Book-Rating"], pa.int64()),
                "age": _decade(users["Age"].combine_chunks(), counts).take(at),
                "location": _country(users["Location"].combine_chunks()).take(at),
            }
        ),
        items=items,
        user=(Field(USER_ID, min_count=2), Field("age"), Field("location", min_count=2)),
        item=(
            Field(ITEM_ID, min_count=2),
            Field("title", min_count=2),
            Field("author", min_count=2),
            Field("year"),
            Field("publisher", min_count=2),
        ),
        text=("{title}", "by {author}.", "{publisher}.", "({year}).", "{text}"),
        counts=counts,
    )


def _read_file(path: Path, names: tuple[str, ...], counts: dict[str, int]) -> pa.Table:
    """The lines that have all columns, as strings. A line that ends inside a value is joined with the next one."""
    lines = read_lines(path, "iso-8859-1")
    header = ";".join(f'"{name}"' for name in names)
    if not lines or lines[0].strip() != header:
        raise UserError(f"{path}: line 1 is {lines[0][:80] if lines else ''!r}; expected the header '{header}'")
    records = re.sub(r'(?<!")(?<!;NULL)\n(?!")', " ", "\n".join(lines[1:])).split("\n") if lines[1:] else []
    counts[f"broken lines of {path.name} joined"] = len(lines) - 1 - len(records)
    records = pc.replace_substring_regex(pa.array(records, pa.string()), ";NULL$", ';""')
    parts = pc.split_pattern(pc.utf8_slice_codeunits(records, 1, -1), '";"')
    whole = pc.and_(pc.match_substring_regex(records, '^".*"$'), pc.equal(pc.list_value_length(parts), len(names)))
    counts[f"malformed lines of {path.name} set aside"] = len(whole) - whole.true_count
    parts = parts.filter(whole)
    return pa.table({name: pc.list_element(parts, index) for index, name in enumerate(names)})


def _set_aside(table: pa.Table, column: str, pattern: str, what: str, counts: dict[str, int]) -> pa.Table:
    kept = table.filter(pc.match_substring_regex(table[column], pattern))
    counts[f"{what} set aside"] = counts.get(f"{what} set aside", 0) + table.num_rows - kept.num_rows
    return kept


def _items(books: pa.Table, counts: dict[str, int]) -> pa.Table:
    """item_id, title, author, year, publisher; what is empty, n/a or the year 0 is null."""
    books = _set_aside(books, "Year-Of-Publication", "^[0-9]+$", "malformed lines of BX-Books.csv", counts)
    books = _set_aside(books, "ISBN", "^[0-9A-Za-z]+$", "books with a malformed ISBN", counts)
    books, counts["repeated books dropped"] = drop_repeated(books, ["ISBN"])
    year = books["Year-Of-Publication"].combine_chunks()
    items = {ITEM_ID: books["ISBN"]}
    for name, column in (("title", "Book-Title"), ("author", "Book-Author"), ("publisher", "Publisher")):
        items[name] = _words(books[column].combine_chunks())
    return pa.table(items | {"year": _null_if(pc.invert(pc.match_substring_regex(year, "^[1-9][0-9]{3}$")), year)})


def _words(column: pa.Array) -> pa.Array:
    r"""Text without `\"` and `&amp;`; null for what is empty or n/a."""
    column = pc.utf8_trim_whitespace(pc.replace_substring(column, '\\"', '"'))
    coded = pc.match_substring_regex(column, "&#?[0-9A-Za-z]+;")
    plain = pa.array([html.unescape(value) for value in column.filter(coded).to_pylist()], pa.string())
    column = pc.replace_with_mask(column, coded, plain)
    return _null_if(pc.is_in(pc.utf8_lower(column), pa.array(["", "n/a", "null"])), column)


def _decade(age: pa.Array, counts: dict[str, int]) -> pa.Array:
    given = pc.match_substring_regex(age, "^[0-9]{1,4}$")
    years = pc.cast(_null_if(pc.invert(given), age), pa.int64())
    likely = pc.and_(pc.greater_equal(years, 5), pc.less_equal(years, 110))
    counts["users with an age outside 5 to 110"] = len(likely) - likely.null_count - likely.true_count
    return pa.array(DECADES).take(pc.divide(pc.if_else(likely, years, None), 10))


def _country(location: pa.Array) -> pa.Array:
    """`stockton, california, usa` -> `usa`; null if the last part has no letter."""
    last = _words(pc.utf8_trim(pc.replace_substring_regex(_words(location), "^.*,", ""), ' ."!?*'))
    return _null_if(pc.invert(pc.match_substring_regex(last, r"\pL")), last)


def _null_if(missing: pa.Array, column: pa.Array) -> pa.Array:
    return pc.if_else(missing, pa.scalar(None, pa.string()), column)
