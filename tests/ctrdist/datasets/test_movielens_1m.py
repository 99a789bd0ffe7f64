from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.movielens_1m import PROTOCOLS, read
from ctrdist.datasets.protocol import write
from ctrdist.errors import UserError
from ctrdist.schema import Schema
from ctrdist.texts import join_texts

REAL = Path(__file__).parents[4] / "shared" / "data" / "ml-1m"

MOVIES = (
    "1::Toy Story (1995)::Animation|Children's|Comedy\n"
    "9::Sudden Death (1995)::Action\n"
    "73::Misérables, Les (1995)::Drama|Musical\n"
)
USERS = "1::F::1::10::48067\n2::M::56::16::70072\n4::M::45::7::02460\n5::M::25::4::98107-2117\n"
RATINGS = (
    "1::1::5::978300760\n"
    "2::9::3::978300275\n"
    "1::73::4::978824291\n"
    "5::73::2::978301968\n"
    "5::404::1::978301968\n"  # not in movies.dat
    "6::9::4::978302000\n"  # not in users.dat
)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in (("movies", MOVIES), ("users", USERS), ("ratings", RATINGS)):
        (folder / f"{name}.dat").write_text(content, encoding="latin-1")
    return folder


def rows_of(out):
    return ds.dataset(out / "interactions").to_table().sort_by("timestamp").to_pylist()


def test_log_with_the_words_of_users(source):
    raw = read(source)
    names = ("user_id", "item_id", "rating", "timestamp", "gender", "age", "occupation", "zip")
    assert raw.log.column_names == list(names)
    assert [tuple(row.values()) for row in raw.log.to_pylist()] == [
        ("1", "1", 5, 978300760, "female", "Under 18", "K-12 student", "48067"),
        ("2", "9", 3, 978300275, "male", "56+", "self-employed", "70072"),
        ("1", "73", 4, 978824291, "female", "Under 18", "K-12 student", "48067"),
        ("5", "73", 2, 978301968, "male", "25-34", "college/grad student", "98107-2117"),
        ("5", "404", 1, 978301968, "male", "25-34", "college/grad student", "98107-2117"),
        ("6", "9", 4, 978302000, None, None, None, None),
    ]
    assert raw.counts == {"items without metadata": 1, "users without metadata": 1}


def test_items_and_texts(source):
    raw = read(source)
    assert [tuple(row.values()) for row in raw.items.to_pylist()] == [
        ("1", "Toy Story", "1995", "Animation", ["Animation", "Children's", "Comedy"]),
        ("9", "Sudden Death", "1995", "Action", ["Action"]),
        ("73", "Misérables, Les", "1995", "Drama", ["Drama", "Musical"]),
        ("404", None, None, None, None),
    ]
    assert raw.items.column_names == ["item_id", "title", "year", "genre", "genres"]
    assert join_texts(raw.items, raw.text[:-1]).to_pylist() == [
        "Toy Story (1995). Animation, Children's, Comedy.",
        "Sudden Death (1995). Action.",
        "Misérables, Les (1995). Drama, Musical.",
        "",
    ]


def test_clickprompt_protocol_written(source, tmp_path):
    out = tmp_path / "out"
    times = "".join(f"{user}::9::{rating}::{1000 + user}\n" for user, rating in enumerate([4, 2, 3, 5, 1, 4] * 2, 1))
    (source / "ratings.dat").write_text(times)
    summary = write(read(source), PROTOCOLS["clickprompt"], out)
    rows = rows_of(out)
    assert [row["label"] for row in rows] == [1, 0, 1, 0, 1] * 2  # no row with rating 3
    assert [row["split"] for row in rows] == ["train"] * 8 + ["valid", "test"]
    assert "history" not in rows[0]
    assert (rows[0]["gender"], rows[0]["zip"]) == ("female", "48067")
    schema = Schema.load(out / "schema.yaml")
    assert [field.name for field in schema.user] == ["user_id", "gender", "age", "occupation", "zip"]
    assert [field.name for field in schema.item] == ["item_id", "title", "genre"]
    assert {field.kind for field in schema.user + schema.item} == {"categorical"}
    assert [field.name for field in schema.user + schema.item if field.min_count == 2] == [
        "user_id", "zip", "item_id", "title",
    ]  # fmt: skip
    assert (summary.rows, summary.users, summary.positives) == (10, 10, 6)


def test_other_protocols_written(source, tmp_path):
    write(read(source), PROTOCOLS["default"], tmp_path / "default")
    rows = {(row["user_id"], row["item_id"]): row for row in rows_of(tmp_path / "default")}
    assert {key: row["label"] for key, row in rows.items()} == {
        ("1", "1"): 1, ("2", "9"): 0, ("1", "73"): 1, ("5", "73"): 0, ("5", "404"): 0, ("6", "9"): 1,
    }  # fmt: skip
    assert rows["1", "73"]["history"] == ["1"]
    assert "split" not in rows["1", "1"]
    write(read(source), PROTOCOLS["cela"], tmp_path / "cela")
    rows = {(row["user_id"], row["item_id"]): row for row in rows_of(tmp_path / "cela")}
    assert rows["2", "9"]["label"] == 1 and rows["5", "73"]["label"] == 0
    assert rows["1", "73"]["split"] == "test"
    texts = pq.read_table(tmp_path / "cela" / "items").column_names
    assert texts == ["item_id", "title", "year", "genre", "genres", "text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ratings.dat", RATINGS + "1::1::5\n", r"ratings\.dat: line 7: the line is '1::1::5'"),
        ("ratings.dat", "1::1::five::978300760\n", r"ratings\.dat: line 1: 'Rating' is 'five'"),
        ("ratings.dat", "1::1::5::978300760\n1::9::0::978300760\n", r"ratings\.dat: line 2: the rating is '0'"),
        ("ratings.dat", "1::1::4.5::978300760\n", r"line 1: 'Rating' is '4.5'"),
        ("users.dat", USERS + "7::X::1::10::48067\n", r"users\.dat: line 5: the gender is 'X': expected one of M, F"),
        ("users.dat", "1::F::19::10::48067\n", r"users\.dat: line 1: the age is '19': expected one of 1, 18, 25"),
        ("users.dat", "1::F::1::21::48067\n", r"users\.dat: line 1: the occupation is '21'"),
        ("users.dat", USERS + "2::M::56::16::70072\n", r"users\.dat: line 5: the user is '2': it is in an earlier"),
        ("movies.dat", MOVIES + "9::Up (2009)::Animation\n", r"movies\.dat: line 4: the item is '9'"),
        ("movies.dat", "", r"movies\.dat: the file is empty"),
    ],
)
def test_malformed_line_is_named(source, name, content, message):
    (source / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read(source)


def test_missing_file(source):
    (source / "users.dat").unlink()
    with pytest.raises(UserError, match=r"users\.dat: no such file"):
        read(source)


@pytest.mark.skipif(not REAL.exists(), reason="the files of ml-1m are not beside the repository")
def test_real_files(tmp_path):
    raw = read(REAL)
    assert (raw.log.num_rows, raw.items.num_rows) == (1_000_209, 3_883)
    assert raw.counts == {"items without metadata": 0, "users without metadata": 0}
    summary = write(raw, PROTOCOLS["clickprompt"], tmp_path)
    assert (summary.rows, summary.positives) == (739_012, 575_281)
