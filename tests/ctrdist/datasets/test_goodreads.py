import gzip
import json
from datetime import datetime

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.goodreads import PROTOCOLS, read, seconds
from ctrdist.datasets.protocol import write
from ctrdist.errors import UserError
from ctrdist.schema import Schema


def row(user, book, rating, added="Fri Apr 19 08:15:15 -0700 2013"):
    return {
        "user_id": user, "book_id": book, "review_id": "fbd6a22a155c87a84fba7537f06cc94b", "is_read": rating != 0,
        "rating": rating, "review_text_incomplete": "", "date_added": added,
        "date_updated": "Fri Apr 19 08:15:15 -0700 2013", "read_at": "", "started_at": "",
    }  # fmt: skip


CATS = {
    "isbn": "0151686564", "text_reviews_count": "626", "series": ["189911", "7"], "country_code": "US",
    "language_code": "en-US",
    "popular_shelves": [
        {"count": str(900 - place), "name": name}
        for place, name in enumerate(
            "to-read poetry favorites classics read-in-2016 my-books poes\u00eda picture-books books animals "
            "books-i-own children 20th-century".split()
        )
    ],
    "asin": "", "is_ebook": "false", "average_rating": "4.09", "kindle_asin": "", "similar_books": ["884306", "234"],
    "description": "Playful cat poems.", "format": "Hardcover",
    "link": "https://www.goodreads.com/book/show/402128.Old_Possum_s_Book_of_Practical_Cats",
    "authors": [{"author_id": "18540", "role": ""}, {"author_id": "21578", "role": "Illustrator"}],
    "publisher": "Harcourt Brace & Company", "num_pages": "56", "publication_day": "30", "isbn13": "9780151686568",
    "publication_month": "8", "edition_information": "Illustrated Edition", "publication_year": "1982",
    "url": "https://www.goodreads.com/book/show/402128.Old_Possum_s_Book_of_Practical_Cats",
    "image_url": "https://images.gr-assets.com/books/1327882662m/402128.jpg", "book_id": "402128",
    "ratings_count": "15716", "work_id": "372536", "title": "Old Possum's Book of Practical Cats",
    "title_without_series": "Old Possum's Book of Practical Cats",
}  # fmt: skip
BARE = {name: [] if isinstance(value, list) else "" for name, value in CATS.items()} | {
    "book_id": "9", "title": " Untitled", "num_pages": "312", "publication_year": "20176", "average_rating": "3.00",
}  # fmt: skip
ROWS = [
    row("8842281e", "402128", 5, "Mon Jan 30 22:13:26 -0800 2017"),  # the next day in UTC
    row("8842281e", "9", 3, "Thu Jan 01 00:00:10 +0000 1970"),
    row("7504b2aa", "402128", 4, "Thu Jan 01 02:00:20 +0200 1970"),
    row("7504b2aa", "9", 0),
    row("7504b2aa", "402128", 1, "Mon Jan 30 22:13:26 -0800 2017"),
    row("7504b2aa", "404", 2, "Thu Jan 01 00:00:30 +0000 1970"),  # not in the books file
    row("f8a89075", "9", 4, ""),
    row("f8a89075", "9", 4, "Thu Feb 30 00:00:00 +0000 2012"),
]


def write_source(folder, rows=ROWS, books=(CATS, BARE), zipped=True):
    folder.mkdir()
    for name, lines in (("interactions", rows), ("books", books)):
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        end = "json.gz" if zipped else "json"
        (folder / f"goodreads_{name}_poetry.{end}").write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_rows_items_and_counts(tmp_path, zipped):
    raw = read(write_source(tmp_path / "source", zipped=zipped))
    out = tmp_path / "out"
    summary = write(raw, PROTOCOLS["default"], out)
    rows = ds.dataset(out / "interactions").to_table().sort_by("timestamp").to_pylist()
    assert [(r["user_id"], r["item_id"], r["label"], r["timestamp"], r["history"]) for r in rows] == [
        ("8842281e", "9", 0, 10, []),
        ("7504b2aa", "402128", 1, 20, []),
        ("7504b2aa", "404", 0, 30, ["402128"]),
        ("8842281e", "402128", 1, 1_485_843_206, []),
    ]
    assert sorted(path.name for path in (out / "interactions").iterdir()) == ["dt=1970-01-01", "dt=2017-01-31"]
    cats, bare, unlisted = pq.read_table(out / "items").to_pylist()
    assert cats == {
        "item_id": "402128", "title": "Old Possum's Book of Practical Cats", "format": "Hardcover",
        "publisher": "Harcourt Brace & Company", "is_ebook": "false", "language_code": "en-US", "work_id": "372536",
        "num_pages": "0", "average_rating": "4.0", "text_reviews_count": "512", "description": "Playful cat poems.",
        "year": "1982", "series": "189911", "author_id": "18540",
        "shelves": ["poetry", "classics", "poesía", "picture-books", "animals"], "text": None,
    }  # fmt: skip
    told = {"title": "Untitled", "num_pages": "300", "average_rating": "3.0", "shelves": []}
    assert bare == dict.fromkeys(cats) | {"item_id": "9"} | told
    assert unlisted == dict.fromkeys(cats) | {"item_id": "404"}
    assert summary.counts == {
        "rows without a rating dropped": 1,
        "rows without a readable date dropped": 2,
        "repeated rows of a user and book dropped": 1,
        "repeated books dropped": 0,
        "items without metadata": 1,
    }
    schema = Schema.load(out / "schema.yaml")
    assert len(schema.user + schema.item) == 15
    assert schema.text_columns == ("title", "year", "shelves", "description", "text")


def test_clickprompt(tmp_path):
    rows = [
        row(f"u{user}", str(book), (user + book) % 5 + 1, f"Tue Nov 17 11:{user:02}:{book:02} -0800 2015")
        for user in range(12)
        for book in range(10)
    ]
    rows += [row("few", "1", 5), row("u1", "few", 5)]
    summary = write(read(write_source(tmp_path / "source", rows)), PROTOCOLS["clickprompt"], tmp_path / "out")
    table = ds.dataset(tmp_path / "out" / "interactions").to_table().sort_by("timestamp")
    assert summary.rows == 120 and not {"few"} & set(table["user_id"].to_pylist() + table["item_id"].to_pylist())
    assert table["split"].to_pylist() == ["train"] * 96 + ["valid"] * 12 + ["test"] * 12
    label = [int((int(r["user_id"][1:]) + int(r["item_id"])) % 5 + 1 >= 4) for r in table.to_pylist()]
    assert table["label"].to_pylist() == label and "history" not in table.column_names


def test_dates():
    dates = ["Fri Mar 28 22:13:26 -0700 2014", "Sat Feb 29 23:59:59 +0530 2020", "Wed Dec 31 00:00:00 +0000 1969"]
    expected = [int(datetime.strptime(date, "%a %b %d %H:%M:%S %z %Y").timestamp()) for date in dates]
    wrong = ["", "Sun Feb 29 00:00:00 +0000 2019", "Fri Mar 00 22:13:26 -0700 2014", "2014-03-28 22:13:26", None,
             "Fri Mar 28 24:13:26 -0700 2014", "Fri Mrz 28 22:13:26 -0700 2014"]  # fmt: skip
    assert seconds(pa.array(dates + wrong)).to_pylist() == expected + [None] * len(wrong)
    assert seconds(pa.array([], pa.string())).to_pylist() == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], row("u", "9", 6)], r"interactions_poetry\.json\.gz: line 2: the rating is '6': ratings go from 0"),
        ([ROWS[0], row("u", None, 4)], r"line 2: 'book_id' is 'None'"),
        ([row("u", "9", "four")], r"line 1: 'rating' is 'four'"),
        ([ROWS[0], "no object"], r"line 2: expected a JSON object"),
        ([], r"interactions_poetry\.json\.gz: the file is empty"),
    ],
)
def test_malformed_line_is_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read(write_source(tmp_path / "source", rows))


def test_one_genre(tmp_path):
    with pytest.raises(UserError, match=r"expected one file goodreads_interactions_<genre>\.json\.gz, there is none"):
        read(tmp_path)
    source = write_source(tmp_path / "source")
    (source / "goodreads_books_comics_graphic.json.gz").touch()
    with pytest.raises(UserError, match=r"there are goodreads_books_comics_graphic\.json\.gz, goodreads_books_poetry"):
        read(source)


def test_half_of_a_surrogate_pair_is_replaced(tmp_path):
    cut = CATS | {"popular_shelves": [{"count": "1", "name": "to be cut \ud83d"}]}
    raw = read(write_source(tmp_path / "source", books=(cut,)))
    assert raw.items["shelves"][0].as_py() == ["to be cut ?"]
    assert raw.items["author_id"][0].as_py() == "18540"
