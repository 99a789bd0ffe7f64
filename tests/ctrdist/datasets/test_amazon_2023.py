import gzip
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.amazon_2023 import PROTOCOLS, read
from ctrdist.datasets.protocol import write
from ctrdist.errors import UserError
from ctrdist.schema import Field, Schema

USER = "AGKHLEW2SOWHNMFQIJGBECAF7INQ"
REVIEWS = r"""
{"rating": 5.0, "title": "Such a lovely scent", "text": "This spray is really nice.", "images": [], "asin": "B00YQ6X8EO", "parent_asin": "B00YQ6X8EO", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": true}
{"rating": 4.0, "title": "Works", "text": "<br />but\ud83d", "images": [{"small_image_url": "https://m.media-amazon.com/images/I/a.jpg", "medium_image_url": "https://m.media-amazon.com/images/I/b.jpg", "large_image_url": "https://m.media-amazon.com/images/I/c.jpg", "attachment_type": "IMAGE"}], "asin": "B081TJ8YS3", "parent_asin": "B081TJ8YS4", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588615855070, "helpful_vote": 1, "verified_purchase": true}
{"rating": 4.0, "title": "Works", "text": "again", "images": [], "asin": "B081TJ8YS3", "parent_asin": "B081TJ8YS4", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588615855070, "helpful_vote": 0, "verified_purchase": true}
{"rating": 3.0, "title": "Meh", "text": "ok", "images": [], "asin": "B07NOMETA1", "parent_asin": "B07NOMETA0", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1589665266052, "helpful_vote": 2, "verified_purchase": false}
"""  # noqa: E501
METADATA = r"""
{"main_category": "All Beauty", "title": "Howard LC0008 Leather Conditioner, 8-Ounce (4-Pack)", "average_rating": 4.8, "rating_number": 10, "features": [], "description": [], "price": null, "images": [{"thumb": "https://m.media-amazon.com/images/I/41.jpg", "large": "https://m.media-amazon.com/images/I/41.jpg", "variant": "MAIN", "hi_res": null}], "videos": [], "store": "Howard Products", "categories": [], "details": {"Package Dimensions": "7.1 x 5.5 x 3 inches; 2.38 Pounds", "UPC": "617390882781"}, "parent_asin": "B00YQ6X8EO", "bought_together": null}
{"main_category": null, "title": "Yes to Tomatoes", "average_rating": 4.5, "rating_number": 3, "features": ["Charcoal mask", "For the face"], "description": ["Hi there,", "", "skin."], "price": 14.99, "images": [], "videos": [], "store": null, "categories": ["Beauty & Personal Care", "Skin Care"], "details": {}, "parent_asin": "B081TJ8YS4", "bought_together": null, "author": {"name": "x"}}
{"main_category": "All Beauty", "title": "Again", "features": [], "description": [], "price": "from 6.99", "store": "S", "categories": [], "details": {}, "parent_asin": "B081TJ8YS4", "bought_together": null, "author": "None"}
"""  # noqa: E501
ITEMS = [
    {
        "item_id": "B00YQ6X8EO", "title": "Howard LC0008 Leather Conditioner, 8-Ounce (4-Pack)",
        "store": "Howard Products", "categories": [], "description": None, "features": None,
    },
    {
        "item_id": "B081TJ8YS4", "title": "Yes to Tomatoes", "store": None,
        "categories": ["Beauty & Personal Care", "Skin Care"], "description": "Hi there, skin.",
        "features": "Charcoal mask For the face",
    },
    {
        "item_id": "B07NOMETA0", "title": None, "store": None, "categories": None, "description": None,
        "features": None,
    },
]  # fmt: skip


@pytest.fixture(params=["", ".gz"])
def source(request, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in (("All_Beauty", REVIEWS), ("meta_All_Beauty", METADATA)):
        data = content.lstrip().encode()
        path = folder / f"{name}.jsonl{request.param}"
        path.write_bytes(gzip.compress(data) if request.param else data)
    return folder


def rows_of(out: Path) -> list[tuple]:
    table = ds.dataset(out / "interactions").to_table().sort_by("timestamp")
    return [tuple(row.values()) for row in table.select(["user_id", "item_id", "label", "timestamp"]).to_pylist()]


def test_reviews_items_texts_and_counts(source, tmp_path):
    (source / "texts.jsonl").write_text('{"item_id": "B00YQ6X8EO", "text": "For leather."}\n')
    summary = write(read(source), PROTOCOLS["default"], tmp_path / "out", source / "texts.jsonl")
    assert rows_of(tmp_path / "out") == [
        (USER, "B081TJ8YS4", 1, 1_588_615_855),
        (USER, "B00YQ6X8EO", 1, 1_588_687_728),
        (USER, "B07NOMETA0", 0, 1_589_665_266),
    ]
    texts = {"B00YQ6X8EO": "For leather."}
    expected = [item | {"text": texts.get(item["item_id"])} for item in ITEMS]
    assert pq.read_table(tmp_path / "out" / "items").to_pylist() == expected
    schema = Schema.load(tmp_path / "out" / "schema.yaml")
    assert schema.item == (Field("item_id", min_count=2), Field("store", min_count=2), Field("categories", "multi", 2))
    assert schema.text == ("{title}.", "{store}.", "{categories}.", "{description}", "{features}", "{text}")
    assert (summary.rows, summary.days, summary.items, summary.free_texts) == (3, 3, 3, 1)
    assert summary.counts == {
        "duplicate reviews dropped": 1,
        "duplicate metadata dropped": 1,
        "items without metadata": 1,
        "titles of page code dropped": 0,
    }


def test_protocol_elec_splits_by_time(source, tmp_path):
    write(read(source), PROTOCOLS["elec"], tmp_path / "out")
    rows = ds.dataset(tmp_path / "out" / "interactions").to_table().sort_by("timestamp")
    assert rows["label"].to_pylist() == [1, 1, 0] and rows["split"].to_pylist() == ["train", "train", "valid"]


def test_files_of_the_other_release_and_malformed_lines(source):
    path = next(source.glob("All_Beauty*"))
    path.unlink()
    (source / "All_Beauty.json").touch()
    with pytest.raises(UserError, match=r"no file All_Beauty\.jsonl or All_Beauty\.jsonl\.gz; put"):
        read(source)
    (source / "All_Beauty.jsonl").write_text(REVIEWS.lstrip().replace("1589665266052", "1589665266.5"))
    with pytest.raises(UserError, match=r"All_Beauty\.jsonl: line 4: 'timestamp' is 1589665266\.5: expected int64"):
        read(source)
