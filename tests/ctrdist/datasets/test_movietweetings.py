from dataclasses import replace
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.canonical import Summary
from ctrdist.datasets.movietweetings import PROTOCOLS, read
from ctrdist.datasets.protocol import write
from ctrdist.errors import UserError
from ctrdist.schema import Schema

REAL = Path(__file__).parents[4] / "shared" / "data" / "movietweetings"

MOVIES = "0000007::Fantômas (1913)::Crime|Drama\n0000008::Untitled::\n0000009::Up (2009)::Animation\n"
RATINGS = (
    "2::0000007::9::86400\n"
    "1::0000009::3::300\n"
    "1::0000007::8::100\n"
    "1::0000404::10::200\n"  # not in movies.dat
    "1::0000008::8::90000\n"
)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "movies.dat").write_text(MOVIES, encoding="utf-8")
    (folder / "ratings.dat").write_text(RATINGS)
    (folder / "texts.jsonl").write_text('{"item_id": "0000009", "text": "A house flies.", "source": "x"}\n')
    return folder


def prepare(source: Path, out: Path, item_text: Path | None = None, **options) -> Summary:
    return write(read(source), replace(PROTOCOLS["default"], **options), out, item_text)


def rows_of(out):
    return ds.dataset(out / "interactions").to_table().sort_by("timestamp").to_pylist()


def test_columns_labels_and_days(source, tmp_path):
    out = tmp_path / "out"
    summary = prepare(source, out, source / "texts.jsonl")
    rows = rows_of(out)
    assert [row["item_id"] for row in rows] == ["0000007", "0000404", "0000009", "0000007", "0000008"]
    assert [row["label"] for row in rows] == [1, 1, 0, 1, 1]
    assert [row["history"] for row in rows] == [[], ["0000007"], ["0000007"], [], ["0000007"]]
    assert sorted(p.name for p in (out / "interactions").iterdir()) == ["dt=1970-01-01", "dt=1970-01-02"]
    assert pq.read_table(out / "items").to_pylist() == [
        {"item_id": "0000007", "title": "Fantômas", "year": "1913", "genres": ["Crime", "Drama"], "text": None},
        {"item_id": "0000008", "title": "Untitled", "year": None, "genres": [], "text": None},
        {"item_id": "0000009", "title": "Up", "year": "2009", "genres": ["Animation"], "text": "A house flies."},
    ]
    schema = Schema.load(out / "schema.yaml")
    assert [field.name for field in schema.item] == ["item_id", "genres", "year"]
    assert schema.history_length == 20 and schema.text_columns == ("title", "year", "genres", "text")
    assert (summary.rows, summary.users, summary.items, summary.items_with_text) == (5, 2, 3, 3)
    assert summary.free_texts == 1
    assert summary.best_auc is None


def test_history_of_all_ratings_and_its_length(source, tmp_path):
    prepare(source, tmp_path / "all", history="all")
    assert rows_of(tmp_path / "all")[-1]["history"] == ["0000007", "0000009"]
    prepare(source, tmp_path / "one", history="all", history_length=1)
    assert rows_of(tmp_path / "one")[-1]["history"] == ["0000009"]
    prepare(source, tmp_path / "none", history_length=0)
    assert "history" not in rows_of(tmp_path / "none")[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ratings.dat", "1::0000007::9::100\n1::0000007::9\n", r"ratings\.dat: line 2: the line is '1::0000007::9'"),
        ("ratings.dat", "1::0000007::nine::100\n", r"ratings\.dat: line 1: 'rating' is 'nine'"),
        ("ratings.dat", "1::0000007::11::100\n", r"ratings\.dat: line 1: the rating is '11'"),
        ("ratings.dat", "1::0000007::9::\n", r"line 1: .*'unix time' is empty"),
        ("ratings.dat", "", r"ratings\.dat: the file is empty"),
        ("movies.dat", "0000007::A (1913)::\n0000007::B (1914)::\n", r"movies\.dat: line 2: the item is '0000007'"),
        ("texts.jsonl", '{"item_id": 7, "text": "x"}\n', r"texts\.jsonl: line 1: expected a JSON object"),
        ("texts.jsonl", '{"item_id": "7", "text": "x"}\n', "no text is of an item of this dataset"),
    ],
)
def test_malformed_line_is_named(source, tmp_path, name, content, message):
    (source / name).write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "out", source / "texts.jsonl")
    assert not (tmp_path / "out").exists()


def test_missing_file_and_encoding(source, tmp_path):
    with pytest.raises(UserError, match=r"movies\.dat: no such file"):
        prepare(tmp_path, tmp_path / "out")
    (source / "movies.dat").write_bytes(b"1::Fant\xf4mas (1913)::\n")
    with pytest.raises(UserError, match="not utf-8"):
        prepare(source, tmp_path / "out")


@pytest.mark.skipif(not REAL.exists(), reason="the MovieTweetings files are not beside the repository")
def test_real_files(tmp_path):
    summary = prepare(REAL, tmp_path, REAL / "extracts.jsonl")
    assert (summary.rows, summary.items, summary.users, summary.days) == (141_695, 12_611, 21_081, 252)
    assert (summary.positives, summary.free_texts) == (70_841, 5_517)
