import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.amazon import clean
from ctrdist.datasets.amazon_2018 import PROTOCOLS, read
from ctrdist.datasets.protocol import write
from ctrdist.errors import UserError
from ctrdist.schema import Field, Schema

DAY = 86_400
T = 1_424_304_000  # 19 February 2015, midnight: the release knows days only

REVIEWS = r"""
{"overall": 5.0, "verified": true, "reviewTime": "02 19, 2015", "reviewerID": "A1V6B6TNIC10QE", "asin": "0143026860", "reviewerName": "theodore j bigham", "reviewText": "great\nstuff", "summary": "One Star", "unixReviewTime": 1424304000}
{"overall": 3.0, "vote": "2", "verified": false, "reviewTime": "02 18, 2015", "reviewerID": "A2F5GHSXFQ0W6J", "asin": "B000FI4S1E", "style": {"Size:": " 8 oz", "Color:": " red"}, "reviewerName": "Mary", "reviewText": "half a pair: \ud83d", "summary": "ok", "unixReviewTime": 1424217600, "image": ["https://images-na.ssl-images-amazon.com/images/I/71p.jpg"]}
{"overall": 5.0, "verified": true, "reviewTime": "02 19, 2015", "reviewerID": "A1V6B6TNIC10QE", "asin": "0143026860", "reviewerName": "theodore j bigham", "reviewText": "again", "summary": "One Star", "unixReviewTime": 1424304000}
{"overall": 4.0, "verified": true, "reviewTime": "02 20, 2015", "reviewerID": "A1V6B6TNIC10QE", "asin": "B00NOMETA0", "style": {"Format:": " Hardcover"}, "reviewerName": "theodore j bigham", "summary": "Four Stars", "unixReviewTime": 1424390400}
{"overall": 2.0, "verified": true, "reviewTime": "02 20, 2015", "reviewerID": "A1V6B6TNIC10QE", "asin": "B00PAGE000", "reviewText": "", "summary": "", "unixReviewTime": 1424390400}
"""  # noqa: E501
METADATA = r"""
{"category": ["Toys &amp; Games", "</span></span></span>", "Puzzles"], "tech1": "", "description": ["Loud 'N Clear<br />&trade; ", "", "<b>Two</b> &quot;parts&quot;"], "fit": "", "title": "Loud 'N Clear&trade; Sound Amplifier", "also_buy": [], "image": [], "tech2": "", "brand": "idea village", "feature": ["Small", "Light &amp; loud"], "rank": "2,938,573 in Beauty & Personal Care (", "also_view": [], "details": {"ASIN: ": "6546546450", "\n    Item model number:    \n": "12"}, "main_cat": "All Beauty", "similar_item": "", "date": "", "price": "", "asin": "0143026860"}
{"category": [], "tech1": "", "description": "One text only.", "fit": "", "title": "Cream", "also_buy": ["B000"], "image": ["https://images-na.ssl-images-amazon.com/images/I/51Z.jpg"], "tech2": "", "brand": "", "feature": "Soft", "rank": [">#12,131 in Beauty", ">#5 in Creams"], "also_view": [], "details": {}, "main_cat": "All Beauty", "similar_item": {}, "date": "", "price": "$7.86", "asin": "B000FI4S1E"}
{"category": ["Other"], "title": "Repeated", "brand": "idea village", "asin": "0143026860"}
{"category": ["Beauty"], "description": [], "title": "\n\nvar aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();", "brand": "Olay", "feature": [], "rank": [], "asin": "B00PAGE000"}
{"title": "Never reviewed", "asin": "B00UNSEEN0"}
"""  # noqa: E501
ITEMS = [
    {
        "item_id": "0143026860", "title": "Loud 'N Clear&trade; Sound Amplifier", "brand": "idea village",
        "categories": ["Toys & Games", "Puzzles"], "description": "Loud 'N Clear &trade; Two \"parts\"",
        "features": "Small Light & loud",
    },
    {
        "item_id": "B000FI4S1E", "title": "Cream", "brand": None, "categories": [], "description": "One text only.",
        "features": "Soft",
    },
    {
        "item_id": "B00PAGE000", "title": None, "brand": "Olay", "categories": ["Beauty"], "description": None,
        "features": None,
    },
    {
        "item_id": "B00UNSEEN0", "title": "Never reviewed", "brand": None, "categories": [], "description": None,
        "features": None,
    },
    {
        "item_id": "B00NOMETA0", "title": None, "brand": None, "categories": None, "description": None,
        "features": None,
    },
]  # fmt: skip
COUNTS = {
    "duplicate reviews dropped": 1,
    "duplicate metadata dropped": 1,
    "items without metadata": 1,
    "titles of page code dropped": 1,
}


def put(path: Path, content: str) -> None:
    data = content.lstrip().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    put(folder / "All_Beauty.json", REVIEWS)
    put(folder / "meta_All_Beauty.json", METADATA)
    return folder


def rows_of(out: Path) -> list[dict]:
    return ds.dataset(out / "interactions").to_table().sort_by("timestamp").to_pylist()


def test_reviews_items_texts_and_counts(source, tmp_path):
    (source / "texts.jsonl").write_text('{"item_id": "B000FI4S1E", "text": "More of it."}\n')
    summary = write(read(source), PROTOCOLS["default"], tmp_path / "out", source / "texts.jsonl")
    rows = [
        (row["user_id"], row["item_id"], row["label"], row["timestamp"], row["history"])
        for row in rows_of(tmp_path / "out")
    ]
    me = "A1V6B6TNIC10QE"
    assert rows == [
        ("A2F5GHSXFQ0W6J", "B000FI4S1E", 0, T - DAY, []),
        (me, "0143026860", 1, T, []),
        (me, "B00NOMETA0", 1, T + DAY, ["0143026860"]),
        (me, "B00PAGE000", 0, T + DAY, ["0143026860"]),
    ]
    texts = {"B000FI4S1E": "More of it."}
    expected = [item | {"text": texts.get(item["item_id"])} for item in ITEMS]
    assert pq.read_table(tmp_path / "out" / "items").to_pylist() == expected
    schema = Schema.load(tmp_path / "out" / "schema.yaml")
    assert schema.user == (Field("user_id", min_count=2),) and schema.context == ()
    assert schema.item == (Field("item_id", min_count=2), Field("brand", min_count=2), Field("categories", "multi", 2))
    assert schema.text_columns == ("title", "brand", "categories", "description", "features", "text")
    assert (summary.rows, summary.days, summary.users, summary.items, summary.free_texts) == (
        4,
        3,
        2,
        5,
        1,
    )
    assert summary.counts == COUNTS


def test_packed_five_core_files_read_alike(tmp_path):
    put(tmp_path / "All_Beauty_5.json.gz", REVIEWS)
    put(tmp_path / "meta_All_Beauty.json.gz", METADATA)
    raw = read(tmp_path)
    assert raw.log["rating"].to_pylist() == [5, 3, 4, 2] and raw.items.to_pylist() == ITEMS and raw.counts == COUNTS


def review(user: int, item: int, rating: int, day: int) -> str:
    return json.dumps(
        {"overall": float(rating), "reviewerID": f"u{user}", "asin": f"i{item}", "unixReviewTime": T + DAY * day}
    )


def write_as(tmp_path: Path, pairs: list[tuple[int, int]], protocol: str) -> list[dict]:
    """These users review these items, one on each day, with 1 to 5 stars in turn; and a user with one review."""
    reviews = [review(user, item, n % 5 + 1, n) for n, (user, item) in enumerate(pairs)]
    put(tmp_path / "Toys_and_Games.json", "\n".join([*reviews, review(99, 0, 5, 0)]) + "\n")
    put(tmp_path / "meta_Toys_and_Games.json", "".join(f'{{"asin": "i{item}"}}\n' for item in range(40)))
    write(read(tmp_path), PROTOCOLS[protocol], tmp_path / "out")
    return rows_of(tmp_path / "out")


def test_protocol_cela(tmp_path):
    pairs = [(user, item) for user in range(6) for item in range(6) if user != item]
    rows = write_as(tmp_path, pairs, "cela")
    clicks, negatives = ([row for row in rows if row["label"] == label] for label in (1, 0))
    assert [(row["user_id"], row["item_id"]) for row in clicks] == [(f"u{user}", f"i{item}") for user, item in pairs]
    places = [[(row["user_id"], row["timestamp"], row["split"]) for row in part] for part in (clicks, negatives)]
    assert places[0] == places[1]
    assert not {(row["user_id"], row["item_id"]) for row in negatives} & {(r["user_id"], r["item_id"]) for r in clicks}
    assert [row["history"] for row in clicks[:3]] == [[], ["i1"], ["i1", "i2"]]
    assert [row["split"] for row in clicks] == ["train"] * 24 + ["valid"] * 3 + ["test"] * 3


def test_protocols_elec_and_clickprompt(tmp_path):
    for name, least in (("elec", 1), ("clickprompt", 10)):
        (tmp_path / name).mkdir()
        rows = write_as(tmp_path / name, [(n // 10, n % 10) for n in range(100)], name)
        assert len(rows) == 100 + (least == 1)
        reviews = [row for row in rows if row["user_id"] != "u99"]
        assert [row["label"] for row in reviews] == [0, 0, 0, 1, 1] * 20
        assert [row["split"] for row in reviews] == ["train"] * 80 + ["valid"] * 10 + ["test"] * 10
        assert reviews[-1]["history"] == ["i3", "i4", "i8"]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("All_Beauty", '"asin": "B000FI4S1E", "style"', '"style"', r"All_Beauty\.json: line 2: 'asin' is 'None': expe"),
        ("All_Beauty", '"reviewerID": "A2F5GHSXFQ0W6J"', '"reviewerID": ""', r"line 2: 'reviewerID' is ''"),
        ("All_Beauty", '"overall": 3.0', '"overall": 6.0', r"line 2: 'overall' is '6.0': expected a number from 0 to"),
        ("All_Beauty", '"overall": 3.0', '"rating": 3.0', r"line 2: 'overall' is 'None'"),
        ("All_Beauty", "1424217600", "null", r"line 2: 'unixReviewTime' is 'None': expected a whole number"),
        ("All_Beauty", "1424217600", '"02 18"', r"line 2: 'unixReviewTime' is '02 18': expected int64"),
        ("meta_All_Beauty", '"asin": "B000FI4S1E"', '"asin": null', r"meta_All_Beauty\.json: line 2: 'asin' is 'None'"),
        ("meta_All_Beauty", '{"category": [],', "{'category': [],", r"meta_All_Beauty\.json: line 2: expected a JSON"),
    ],
)
def test_malformed_line_is_named(source, name, old, new, message):
    path = source / f"{name}.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read(source)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there is no file meta_<Category>.json or meta_<Category>.json.gz; put the reviews file"),
        (["Toys.json"], "there is no file meta_<Category>.json or"),
        (["meta_Toys.jsonl", "Toys.jsonl"], "there is no file meta_<Category>.json or"),
        (["meta_Toys.json.gz"], "no file Toys.json or Toys.json.gz or Toys_5.json or Toys_5.json.gz; put the reviews"),
        (["meta_Toys.json", "Games.json"], "no file Toys.json or"),
        (["meta_Toys.json", "meta_Games.json.gz"], "meta_Games.json.gz, meta_Toys.json: expected one of these; keep"),
        (["meta_Toys.json", "Toys.json", "Toys_5.json.gz"], "Toys.json, Toys_5.json.gz: expected one of these; keep"),
    ],
)
def test_folder_without_one_file_of_each(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read(tmp_path / "absent")


def test_texts_lose_markup_only():
    texts = [
        "I <3 this: 2 < 4 > 1",
        "<p class='x'>One</p><br/>two<!-- no -->",
        "&amp;lt; &nbsp; &#39;",
        " <i> </i>\n",
        None,
    ]
    assert clean(pa.array(texts)).to_pylist() == ["I <3 this: 2 < 4 > 1", "One two", "&lt; '", None, None]
