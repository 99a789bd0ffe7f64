import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.bookcrossing import PROTOCOLS, read
from ctrdist.datasets.protocol import write
from ctrdist.errors import UserError
from ctrdist.schema import Schema

IMAGES = ";".join(f'"http://images.amazon.com/images/P/{{}}.01.{size}ZZZZZZZ.jpg"' for size in ("THUMB", "M", "L"))


def book(isbn, title, author, year, publisher):
    return f'"{isbn}";"{title}";"{author}";"{year}";"{publisher}";{IMAGES.replace("{}", isbn)}\n'


USERS = (
    '"User-ID";"Location";"Age"\n'
    '"1";"nyc, new york, usa";NULL\n'
    '"2";"stockton, california, usa";"18"\n'
    '"3";"cernusco s\n'  # a line end inside a value
    ', milan, italy";NULL\n'
    '"4";"málaga, n/a, españa.";"110"\n'
    '"5";"&#37073;&#24030;, , ";"239"\n'
    '"6";"\\"n/a\\", n/a, n/a";"4"\n'
)
BOOKS = (
    '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S";"Image-URL-M";"Image-URL-L"\n'
    + book("0195153448", "Classical Mythology", "Mark P. O. Morford", "2002", "Oxford University Press")
    + book("078946697X", 'DK Readers: How It All Began (Level 4)\\"', "Michael Teitelbaum", "2000", "DK")
    + book("0002005018", "Clara &amp; Callan; &quot;A Novel&quot;", "n/a", "0", "Harper&amp;Collins;")
    + book("3518365479<90", "Malformed", "A", "1991", "P")
    + '"0440234743";"Shifted";"John Grisham";"Dell";"1999";"a";"b";"c"\n'
    + '"0452264464";"Cut off";"A"\n'
    + book("0195153448", "Again", "A", "1991", "P")
)
RATINGS = (
    '"User-ID";"ISBN";"Book-Rating"\n'
    '"2";"0195153448";"0"\n'
    '"2";"078946697X";"5"\n'
    '"3";"0195153448";"4"\n'
    '"4";"3518365479<90";"8"\n'  # its book is set aside
    '"4";"0002005018";"10"\n'
    '"5";"\\"0432534220\\"";"7"\n'  # not in BX-Books.csv
    '"5";"0195153448";"11"\n'
    '"5";"0195153448"\n'
    '"9";"0195153448";"6"\n'  # not in BX-Users.csv
)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in (("Users", USERS), ("Books", BOOKS), ("Book-Ratings", RATINGS)):
        (folder / f"BX-{name}.csv").write_bytes(content.encode("iso-8859-1"))
    return folder


def test_rows_items_and_counts(source, tmp_path):
    raw = read(source)
    summary = write(raw, PROTOCOLS["clickprompt"], tmp_path / "out")
    rows = ds.dataset(tmp_path / "out" / "interactions").to_table().sort_by("timestamp").to_pylist()
    assert [(r["user_id"], r["item_id"], r["label"], r["age"], r["location"]) for r in rows] == [
        ("2", "0195153448", 0, "teens", "usa"),
        ("2", "078946697X", 1, "teens", "usa"),
        ("3", "0195153448", 0, None, "italy"),
        ("4", "0002005018", 1, "over a hundred", "españa"),
        ("9", "0195153448", 1, None, None),
    ]
    assert "history" not in rows[0]
    assert pq.read_table(tmp_path / "out" / "items").drop_columns(["text"]).to_pylist() == [
        {
            "item_id": "0195153448", "title": "Classical Mythology", "author": "Mark P. O. Morford",
            "publisher": "Oxford University Press", "year": "2002",
        },
        {
            "item_id": "078946697X", "title": 'DK Readers: How It All Began (Level 4)"', "author": "Michael Teitelbaum",
            "publisher": "DK", "year": "2000",
        },
        {
            "item_id": "0002005018", "title": 'Clara & Callan; "A Novel"', "author": None,
            "publisher": "Harper&Collins;", "year": None,
        },
    ]  # fmt: skip
    assert summary.counts == {
        "broken lines of BX-Users.csv joined": 1,
        "malformed lines of BX-Users.csv set aside": 0,
        "broken lines of BX-Books.csv joined": 0,
        "malformed lines of BX-Books.csv set aside": 2,  # one cut off, one shifted
        "broken lines of BX-Book-Ratings.csv joined": 0,
        "malformed lines of BX-Book-Ratings.csv set aside": 2,
        "books with a malformed ISBN set aside": 1,
        "repeated books dropped": 1,
        "ratings of books not listed dropped": 2,
        "ratings of users not listed": 1,
        "users with an age outside 5 to 110": 2,
    }
    schema = Schema.load(tmp_path / "out" / "schema.yaml")
    assert [f.name for f in schema.user + schema.item] == [
        "user_id", "age", "location", "item_id", "title", "author", "year", "publisher"
    ]  # fmt: skip
    assert schema.history_length == 0


def test_location_without_a_country_is_null(source):
    (source / "BX-Book-Ratings.csv").write_text(
        '"User-ID";"ISBN";"Book-Rating"\n' + "".join(f'"{user}";"0195153448";"1"\n' for user in (1, 4, 5, 6))
    )
    log = read(source).log
    assert log["location"].to_pylist() == ["usa", "españa", None, None]
    assert log["age"].to_pylist() == [None, "over a hundred", None, None]


def test_split_in_the_order_of_the_file(source, tmp_path):
    lines = "".join(f'"{user}";"0195153448";"{user % 11}"\n' for user in range(100))
    (source / "BX-Book-Ratings.csv").write_text('"User-ID";"ISBN";"Book-Rating"\n' + lines)
    for name in ("default", "clickprompt"):
        write(read(source), PROTOCOLS[name], tmp_path / name)
        rows = ds.dataset(tmp_path / name / "interactions").to_table().sort_by("timestamp").to_pylist()
        assert [r["user_id"] for r in rows] == [str(user) for user in range(100)]
        assert [r["split"] for r in rows] == ["train"] * 80 + ["valid"] * 10 + ["test"] * 10
        assert [r["label"] for r in rows[:11]] == [0] * 5 + [1] * 6


def test_wrong_or_missing_file(source):
    (source / "BX-Books.csv").write_text("ISBN,Book-Title,Book-Author\n")
    with pytest.raises(UserError, match=r"BX-Books\.csv: line 1 is 'ISBN,Book-Title,Book-Author'; expected the header"):
        read(source)
    (source / "BX-Books.csv").unlink()
    with pytest.raises(UserError, match=r"BX-Books\.csv: no such file"):
        read(source)
