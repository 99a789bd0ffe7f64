from dataclasses import replace

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets import mind
from ctrdist.datasets.mind import PROTOCOLS, read
from ctrdist.datasets.protocol import Protocol, Raw, write
from ctrdist.errors import UserError
from ctrdist.schema import Field, Schema

ENTITIES = (
    '[{"Label": "Prince Philip, Duke of Edinburgh", "Type": "P", "WikidataId": "Q80976", "Confidence": 1.0, '
    '"OccurrenceOffsets": [48], "SurfaceForms": ["Prince Philip"]}, {"Label": "Charles, Prince of Wales", "Type": "P", '
    '"WikidataId": "Q43274", "Confidence": 1.0, "OccurrenceOffsets": [28], "SurfaceForms": ["Prince Charles"]}]'
)
TRAIN_NEWS = (
    "N55528\tlifestyle\tlifestyleroyals\tThe Brands Queen Elizabeth Swears By\tShop the notebooks, and more.\t"
    f"https://assets.msn.com/labs/mind/AAGH0ET.html\t{ENTITIES}\t[]\n"
    "N19639\thealth\tweightloss\t50 Worst \"Habits For Belly Fat\t\thttps://assets.msn.com/labs/mind/AAB19MK.html\t[]\t[]\n"
)  # fmt: skip
DEV_NEWS = (
    TRAIN_NEWS + "N61837\tnews\tnewsworld\tThe Cost of Trump's Aid Freeze\tA fight.\thttps://x/AAJgNsz.html\t\t\n"
)
TRAIN = (
    "1\tU13740\t11/14/2019 9:05:58 AM\tN55528 N61837 N404 N19639\tN55528-1 N19639-0\n"
    "2\tU91836\t11/13/2019 12:00:30 AM\t\tN19639-0 N55528-0 N777-1\n"  # N777 is in no news.tsv
)
DEV = "1\tU13740\t11/15/2019 6:11:30 PM\tN55528 N61837 N404 N19639\tN61837-1\n"
TEST = "1\tU5\t11/16/2019 6:11:30 PM\tN55528\tN61837 N19639\n"


def write_folder(folder, behaviors, news):
    folder.mkdir(parents=True)
    (folder / "behaviors.tsv").write_text(behaviors, encoding="utf-8")
    (folder / "news.tsv").write_text(news, encoding="utf-8")
    return folder


@pytest.fixture
def source(tmp_path):
    write_folder(tmp_path / "source" / "MINDsmall_train", TRAIN, TRAIN_NEWS)
    write_folder(tmp_path / "source" / "MINDsmall_dev" / "MINDsmall_dev", DEV, DEV_NEWS)  # as some unpackers do
    write_folder(tmp_path / "source" / "test", TEST, DEV_NEWS)
    return tmp_path / "source"


def rows_of(out):
    return ds.dataset(out / "interactions").to_table().sort_by("timestamp").to_pylist()


def test_rows_histories_and_counts(source, tmp_path):
    out = tmp_path / "out"
    summary = write(read(source), PROTOCOLS["last-day"], out)
    known = ["N55528", "N61837", "N19639"]
    rows = rows_of(out)
    assert [(r["user_id"], r["timestamp"], r["item_id"], r["label"], r["history"], r["split"]) for r in rows] == [
        ("U91836", 1_573_603_230, "N19639", 0, [], "train"),
        ("U91836", 1_573_603_230, "N55528", 0, [], "train"),
        ("U91836", 1_573_603_230, "N777", 1, [], "train"),
        ("U13740", 1_573_722_358, "N55528", 1, known, "valid"),
        ("U13740", 1_573_722_358, "N19639", 0, known, "valid"),
        ("U13740", 1_573_841_490, "N61837", 1, known, "test"),
    ]
    assert summary.counts == {
        "repeated news dropped": 5, "impressions without labels skipped": 1, "items without metadata": 1
    }  # fmt: skip
    items = {item["item_id"]: item for item in pq.read_table(out / "items").to_pylist()}
    assert items["N55528"] == {
        "item_id": "N55528", "category": "lifestyle", "subcategory": "lifestyleroyals",
        "title": "The Brands Queen Elizabeth Swears By", "abstract": "Shop the notebooks, and more.",
        "entities": ["Q80976", "Q43274"], "text": None,
    }  # fmt: skip
    assert items["N19639"]["title"] == '50 Worst "Habits For Belly Fat' and items["N19639"]["abstract"] is None
    assert items["N61837"]["entities"] == [] and len(items) == 4
    schema = Schema.load(out / "schema.yaml")
    assert [(f.name, f.kind) for f in schema.item] == [
        ("item_id", "categorical"), ("category", "categorical"), ("subcategory", "categorical"), ("entities", "multi")
    ]  # fmt: skip
    assert schema.history_length == 20 and schema.text_columns == ("title", "category", "abstract", "text")


def test_files_in_the_folder_itself_days_and_length_of_histories(tmp_path):
    source = write_folder(tmp_path / "source", TRAIN, DEV_NEWS)
    write(read(source), replace(PROTOCOLS["default"], history_length=2), tmp_path / "two")
    assert [r["history"] for r in rows_of(tmp_path / "two")[-2:]] == [["N61837", "N19639"]] * 2
    assert "split" not in rows_of(tmp_path / "two")[0]
    assert sorted(p.name for p in (tmp_path / "two" / "interactions").iterdir()) == ["dt=2019-11-13", "dt=2019-11-14"]
    write(read(source), replace(PROTOCOLS["default"], history_length=0), tmp_path / "none")
    assert "history" not in rows_of(tmp_path / "none")[0]


def test_many_blocks_and_core(tmp_path, monkeypatch):
    monkeypatch.setattr(mind, "BLOCK_BYTES", 1_000)
    lines = [
        f"{n}\tU{n % 7}\t11/{n % 3 + 10}/2019 {n % 12 + 1}:00:00 PM\tN{n} N{n + 1}\tN{n}-{n % 2} N{n + 1}-0\n"
        for n in range(300)
    ]
    news = "".join(f"N{n}\tnews\tnewsus\tTitle {n}\tAbstract\thttps://x\t[]\t[]\n" for n in range(301))
    raw = read(write_folder(tmp_path / "source", "".join(lines), news))
    write(raw, replace(PROTOCOLS["default"], core=2), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    shown = {(r["item_id"], *r["history"], r["label"]) for r in rows}
    expected = {(f"N{n}", f"N{n}", f"N{n + 1}", n % 2) for n in range(1, 300)}  # N0 and N300 are shown once
    expected |= {(f"N{n + 1}", f"N{n}", f"N{n + 1}", 0) for n in range(299)}
    assert len(rows) == 598 and shown == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("behaviors", "1\tU1\t11/11/2019 9:05:58 AM\tN1\n", r"behaviors\.tsv: line 1: has 4 columns"),
        ("behaviors", TRAIN + "3\tU1\t2019-11-11\tN1\tN1-1\n", r"line 3: 'time' is '2019-11-11'"),
        ("behaviors", TRAIN + "\n", r"line 3: 'time' is ''"),
        ("behaviors", "1\t\t11/11/2019 9:05:58 AM\tN1\tN1-1\n", r"line 1: 'user id' is ''"),
        ("behaviors", TRAIN + "3\tU1\t11/11/2019 9:05:58 AM\t\tN1-1 N2\n", r"line 3: 'impressions' is 'N1-1 N2'"),
        ("behaviors", TRAIN + "3\tU1\t11/11/2019 9:05:58 AM\tN1\t\n", r"line 3: 'impressions' is ''"),
        ("behaviors", "", r"behaviors\.tsv: Empty CSV file; expected lines of impression id, user id, time"),
        ("news", DEV_NEWS + "N1\tnews\n", r"news\.tsv: line 4: has 2 columns"),
    ],
)
def test_malformed_line_is_named(tmp_path, name, content, message):
    source = write_folder(tmp_path / "source", TRAIN, DEV_NEWS)
    (source / f"{name}.tsv").write_text(content)
    with pytest.raises(UserError, match=message):
        read(source)


def test_folders(source, tmp_path):
    with pytest.raises(UserError, match=r"no behaviors\.tsv there or below"):
        read(tmp_path / "nowhere")
    write_folder(source / "MINDlarge_train", TRAIN, TRAIN_NEWS)
    with pytest.raises(UserError, match="holds MINDlarge and MINDsmall, which share impressions"):
        read(source)
    only_test = tmp_path / "only" / "MINDlarge_test"
    raw = read(write_folder(only_test, TEST, DEV_NEWS))
    assert raw.log.num_rows == 0 and raw.log.schema.field("history").type.value_type == pa.list_(pa.string())
    with pytest.raises(UserError, match="leaves no row"):
        write(raw, PROTOCOLS["default"], tmp_path / "out")
    (only_test / "news.tsv").unlink()
    with pytest.raises(UserError, match=r"news\.tsv: no such file"):
        read(only_test)
    (only_test / "news.tsv").write_bytes(b"N1\tnews\tx\tcaf\xe9\t\t\t\t\n")
    with pytest.raises(UserError, match=r"news\.tsv: .*UTF"):
        read(only_test)


def test_own_histories_may_be_plain_lists(tmp_path):
    log = pa.table(
        {
            "user_id": ["u", "u", "v", "w"], "item_id": ["a", "b", "a", "b"], "label": [1, 0, 1, 0],
            "timestamp": [40, 30, 20, 10], "history": [["a", "b"], ["x", "a", "y", "b", "a"], None, []],
        }
    )  # fmt: skip
    raw = Raw(log=log.slice(0, 4), items=pa.table({"item_id": ["a", "b"]}), item=(Field("item_id"),), text=("{text}",))
    write(raw, Protocol(history_length=2), tmp_path / "out")
    assert [r["history"] for r in rows_of(tmp_path / "out")] == [[], [], ["b", "a"], ["a", "b"]]
    write(replace(raw, log=log.slice(1)), Protocol(history_length=3), tmp_path / "sliced")
    assert [r["history"] for r in rows_of(tmp_path / "sliced")] == [[], [], ["a", "b", "a"]]
