from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.films import genre_lists, title_and_year
from ctrdist.datasets.movielens import PROTOCOLS, read
from ctrdist.datasets.protocol import write
from ctrdist.errors import UserError
from ctrdist.schema import Schema

REAL = Path(__file__).parents[4] / "shared" / "data" / "ml-latest-small"

MOVIES = (
    "movieId,title,genres\r\n"
    "1,Toy Story (1995),Adventure|Animation|Children|Comedy|Fantasy\r\n"
    '11,"American President, The (1995)",Comedy|Drama|Romance\r\n'
    '7789,"11\'09""01 - September 11 (2002)",Drama\r\n'
    "171495,Cosmos,(no genres listed)\r\n"
)
RATINGS = (
    "userId,movieId,rating,timestamp\r\n"
    "1,1,4.0,964982703\r\n"
    "1,11,3.5,964981247\r\n"
    "2,7789,2.5,964982703\r\n"
    "2,404,0.5,964982800\r\n"  # not in movies.csv
    "2,171495,5.0,1064982800\r\n"
)
HEADER = "userId,movieId,rating,timestamp\r\n"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "movies.csv").write_text(MOVIES, encoding="utf-8", newline="")
    (folder / "ratings.csv").write_text(RATINGS, newline="")
    (folder / "tags.csv").write_text("userId,movieId,tag,timestamp\n2,1,pixar,1445714994\n")
    (folder / "texts.jsonl").write_text('{"item_id": "11", "text": "A widower.", "source": "x"}\n')
    return folder


def rows_of(out):
    return ds.dataset(out / "interactions").to_table().sort_by("timestamp").to_pylist()


def test_log_and_items_as_read(source):
    raw = read(source)
    assert raw.log.to_pylist() == [
        {"user_id": "1", "item_id": "1", "rating": 4.0, "timestamp": 964982703},
        {"user_id": "1", "item_id": "11", "rating": 3.5, "timestamp": 964981247},
        {"user_id": "2", "item_id": "7789", "rating": 2.5, "timestamp": 964982703},
        {"user_id": "2", "item_id": "404", "rating": 0.5, "timestamp": 964982800},
        {"user_id": "2", "item_id": "171495", "rating": 5.0, "timestamp": 1064982800},
    ]
    assert raw.items.to_pylist() == [
        {
            "item_id": "1",
            "title": "Toy Story",
            "year": "1995",
            "genres": ["Adventure", "Animation", "Children", "Comedy", "Fantasy"],
        },
        {
            "item_id": "11",
            "title": "American President, The",
            "year": "1995",
            "genres": ["Comedy", "Drama", "Romance"],
        },
        {"item_id": "7789", "title": "11'09\"01 - September 11", "year": "2002", "genres": ["Drama"]},
        {"item_id": "171495", "title": "Cosmos", "year": None, "genres": []},
        {"item_id": "404", "title": None, "year": None, "genres": None},
    ]
    assert raw.counts == {"items without metadata": 1}


def test_default_protocol_written(source, tmp_path):
    out = tmp_path / "out"
    summary = write(read(source), PROTOCOLS["default"], out, source / "texts.jsonl")
    rows = rows_of(out)
    assert [(row["item_id"], row["label"]) for row in rows][::4] == [("11", 0), ("171495", 1)]
    assert {row["item_id"]: row["label"] for row in rows} == {"1": 1, "11": 0, "7789": 0, "404": 0, "171495": 1}
    assert sorted(path.name for path in (out / "interactions").iterdir()) == ["dt=2000-07-30", "dt=2003-10-01"]
    assert "split" not in rows[0]
    items = {row["item_id"]: row["text"] for row in pq.read_table(out / "items").to_pylist()}
    assert items == {"1": None, "11": "A widower.", "7789": None, "171495": None, "404": None}
    schema = Schema.load(out / "schema.yaml")
    assert [field.name for field in schema.user] == ["user_id"]
    assert [(field.name, field.kind, field.min_count) for field in schema.item] == [
        ("item_id", "categorical", 2),
        ("genres", "multi", 1),
        ("year", "categorical", 1),
    ]
    assert (summary.rows, summary.users, summary.items, summary.free_texts) == (5, 2, 5, 1)


def test_cela_protocol_written(source, tmp_path):
    lines = [f"{1 + n % 2},1,{rating},{1000 + n}\r\n" for n, rating in enumerate([3.0, 2.5, 3.0, 5.0, 0.5] * 2)]
    (source / "ratings.csv").write_text(HEADER + "".join(lines), newline="")
    write(read(source), PROTOCOLS["cela"], tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["label"] for row in rows] == [1, 0, 1, 1, 0] * 2
    assert [row["split"] for row in rows] == ["train"] * 8 + ["valid", "test"]
    assert [len(row["history"]) for row in rows] == [0, 0, 1, 0, 2, 1, 2, 2, 2, 3]


def test_titles_and_genres():
    names = ["96 Minutes (2011) ", "(500) Days of Summer (2009)", "Nôto (2006–2007)", "Show (2007-)", "(1999)", " X "]
    titles, years = title_and_year(pa.array(names))
    assert titles.to_pylist() == ["96 Minutes", "(500) Days of Summer", "Nôto", "Show", "(1999)", "X"]
    assert years.to_pylist() == ["2011", "2009", "2006", "2007", None, None]
    assert genre_lists(pa.array(["A|B", "", "(no genres listed)"])).to_pylist() == [["A", "B"], [], []]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ratings.csv", HEADER + "1,1,4.0,10\r\n1,1,4.0\r\n", r"ratings\.csv: .*line 3: Expected 4 columns, got 3"),
        ("ratings.csv", HEADER + "1,1,4.0,10\r\n1,1,four,10\r\n", r"column 'rating': line 3: .*'four'"),
        ("ratings.csv", HEADER + "1,1,4.0,1.5\r\n", r"column 'timestamp': line 2: .*'1.5'"),
        ("ratings.csv", HEADER + "1,1,4.0,10\r\n1,1,6.0,10\r\n", r"ratings\.csv: line 3: the rating is '6.0'"),
        ("ratings.csv", HEADER + "1,1,nan,10\r\n", r"line 2: the rating is 'nan'"),
        ("ratings.csv", HEADER + "1,1,,10\r\n", r"line 2: the rating is 'None'"),
        ("ratings.csv", HEADER + "1,1,4.0,\r\n", r"line 2: 'timestamp' is 'None'"),
        ("ratings.csv", HEADER + ",1,4.0,10\r\n", r"line 2: 'user_id' is ''"),
        ("ratings.csv", "1,1,4.0,10\r\n", r"ratings\.csv: line 1 is '1,1,4.0,10'; expected the header 'userId,movieId"),
        ("ratings.csv", "", r"ratings\.csv: line 1 is ''"),
        ("movies.csv", MOVIES + "1,A (1990),Drama\r\n", r"movies\.csv: line 6: the item is '1'"),
        ("movies.csv", MOVIES + "5,,Drama\r\n", r"movies\.csv: line 6: 'title' is ''"),
    ],
)
def test_malformed_line_is_named(source, name, content, message):
    (source / name).write_text(content, newline="")
    with pytest.raises(UserError, match=message):
        read(source)


def test_missing_file_encoding_and_older_format(source, tmp_path):
    with pytest.raises(UserError, match=r"movies\.csv: no such file"):
        read(tmp_path)
    (tmp_path / "movies.dat").touch()
    with pytest.raises(
        UserError, match="movies.dat is of the older format; MovieLens 1M is the subcommand movielens-1m"
    ):
        read(tmp_path)
    (source / "movies.csv").write_bytes(b"movieId,title,genres\r\n1,Fant\xf4mas (1913),Drama\r\n")
    with pytest.raises(UserError, match=r"movies\.csv: .*column 'title': line 2: .*invalid UTF8"):
        read(source)


@pytest.mark.skipif(not REAL.exists(), reason="the files of ml-latest-small are not beside the repository")
def test_real_files(tmp_path):
    raw = read(REAL)
    summary = write(raw, PROTOCOLS["default"], tmp_path / "default", REAL / "extracts.jsonl")
    assert (summary.rows, summary.users, summary.items, summary.free_texts) == (
        100_836,
        610,
        9_742,
        6_325,
    )
    assert (summary.positives, summary.days) == (48_580, 4_110)
    assert summary.counts == {"items without metadata": 0}
    assert raw.items["year"].null_count == 12
    summary = write(raw, PROTOCOLS["cela"], tmp_path / "cela")
    assert (summary.positives, summary.rows_with_history) == (81_763, 99_489)
    split = ds.dataset(tmp_path / "cela" / "interactions").to_table(columns=["split"])["split"].to_pylist()
    assert [split.count(part) for part in ("train", "valid", "test")] == [80_669, 10_083, 10_084]
