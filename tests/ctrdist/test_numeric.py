import datetime as dt
import math
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrdist import numeric
from ctrdist.batch import collate
from ctrdist.encode import encode, fillers
from ctrdist.errors import UserError
from ctrdist.fields import load_encoders, new_encoder, save_encoders
from ctrdist.items import Catalog, build_catalog, grow_catalog_ids, grow_item_vocabularies
from ctrdist.log import list_days, list_row_groups
from ctrdist.numeric import Numeric, add_samples, sample_values
from ctrdist.scan import Scan, scan_row_group
from ctrdist.schema import Schema
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.vocabulary import Vocabulary

NUMBERS = st.one_of(st.none(), st.floats(width=32), st.integers(-1000, 1000).map(float))


@given(st.lists(NUMBERS, max_size=40), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(2, 9))
def test_a_number_gets_the_row_of_its_bucket(values, seen, buckets):
    field = Numeric("quantile").fit((np.zeros(len(seen)), np.array(seen)), buckets)
    edges = field.edges.tolist()
    assert edges == sorted(set(edges)) and field.size == 2 + len(edges) + 1 <= 2 + buckets
    assert set(field.lookup(pa.array(seen))) == set(range(2, field.size)), "a bucket without a value is never trained"
    expected = [
        1 if value is None or not math.isfinite(value) else 2 + sum(edge <= value for edge in edges) for value in values
    ]
    assert field.lookup(pa.array(values, pa.float64())).tolist() == expected


@given(st.lists(NUMBERS, max_size=40))
def test_a_logarithm_keeps_its_sign_and_a_missing_number_is_nan(values):
    found = Numeric("log").lookup(pa.array(values, pa.float64()))
    assert found.dtype == np.float32
    for value, result in zip(values, found, strict=True):
        if value is None or not math.isfinite(value):
            assert math.isnan(result)
        else:
            assert result == pytest.approx(math.copysign(math.log1p(abs(value)), value), rel=1e-6)


def test_buckets_hold_like_shares_and_never_move():
    values = np.random.default_rng(0).lognormal(0, 2, 50_000)
    field = Numeric("quantile").fit(sample_values(values, 1), 10)
    shares = np.bincount(field.lookup(pa.array(values)), minlength=12)[2:] / len(values)
    assert np.abs(shares - 0.1).max() < 0.001
    assert field.fit(sample_values(values * 100, 1), 10) is field
    assert Numeric("quantile").fit((np.empty(0), np.empty(0)), 10).size == 3


def test_a_value_that_fills_buckets_alone_has_one_for_itself():
    values = np.concatenate([np.zeros(9_000), np.random.default_rng(0).integers(1, 11, 1_000)])
    field = Numeric("quantile").fit(sample_values(values, 1), 8)
    rows = field.lookup(pa.array(values))
    assert set(values[rows == rows[0]]) == {0.0}
    shares = np.bincount(rows[9_000:])[3:] / 1_000
    assert len(shares) == 6 and shares.min() > 0.08 and shares.max() < 0.3
    ages = Numeric("quantile").fit((np.zeros(6), np.array([18.0, 18, 18, 25, 40, 40])), 3)
    assert ages.lookup(pa.array([17, 18, 25, 40, 99])).tolist() == [2, 2, 3, 4, 4]


def test_samples_add_up_in_any_order_and_are_even(monkeypatch):
    monkeypatch.setattr(numeric, "SAMPLE", 500)
    pieces = [sample_values(np.arange(1000.0) + 1000 * n, n) for n in range(20)]
    forward, backward = reduce(add_samples, pieces), reduce(add_samples, pieces[::-1])
    assert len(forward[0]) == 500
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert abs(np.median(forward[1]) - 10_000) < 1_500
    assert sample_values(np.array([1.0, np.nan, np.inf]), 0)[1].tolist() == [1.0]


def test_what_is_no_number_is_an_error():
    with pytest.raises(UserError, match="column 'age': of type string; a numeric field needs integers or floats"):
        Numeric("log").lookup(pa.array(["3"]), "age")
    assert Numeric("log").lookup(pa.array([None, None])).shape == (2,)


SCHEMA = """
user: {user_id: categorical, age: {kind: numeric, buckets: 3}}
item: {item_id: categorical, price: {kind: numeric, scale: log}, pages: {kind: numeric, buckets: 2}}
context: {delay: {kind: numeric, scale: log}}
history_length: 2
"""


@pytest.fixture
def log(tmp_path) -> tuple[str, Schema]:
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    folder = tmp_path / "interactions" / "dt=1970-01-01"
    folder.mkdir(parents=True)
    (tmp_path / "items").mkdir()
    table = pa.table({
        "user_id": list("uvuvu"), "item_id": list("abcab"), "label": [1, 0, 1, 0, 1], "timestamp": list(range(5)),
        "age": pa.array([10, 20, 30, None, 20]), "delay": pa.array([0.0, 1.0, None, -3.0, float("nan")]),
        "history": [["a"], [], ["b", "c"], ["c"], ["a"]],
    })  # fmt: skip
    pq.write_table(table, folder / "part-0.parquet", row_group_size=2)
    return str(tmp_path), Schema.load(tmp_path / "schema.yaml")


def test_from_the_log_to_the_fields_of_a_model(log, tmp_path):
    data, schema = log
    items = pa.table({"item_id": list("abc"), "price": [1.5, None, 7.0], "pages": pa.array([100, 200, 300])})
    ids = grow_catalog_ids(items, Vocabulary())
    encoders = {f.name: new_encoder(f) for f in schema.item + schema.row_fields}
    catalog = build_catalog(items, ids, schema, encoders)
    scan = Scan()
    for group in list_row_groups(data, list_days(data), (dt.date(1970, 1, 1),), schema):
        scan.add(scan_row_group(data, group, schema, catalog, tmp_path / "bad"))
    assert sorted(scan.samples["age"][1]) == [10, 20, 20, 30] and sorted(scan.samples["delay"][1]) == [-3, 0, 1]
    encoders["user_id"] = encoders["user_id"].grow(*scan.ids["user_id"])
    for name in ("age", "delay"):
        encoders[name] = encoders[name].fit(scan.samples[name], 3)
    encoders = grow_item_vocabularies(items, ids.lookup(items["item_id"]), np.array([0, 0, 1, 1, 1]), schema, encoders)
    save_encoders(encoders, tmp_path / "encoders")
    encoders = load_encoders(tmp_path / "encoders")
    build_catalog(items, ids, schema, encoders).save(tmp_path / "catalog")
    catalog = Catalog.load(tmp_path / "catalog", schema)
    assert encoders["age"].edges.tolist() == [20, 30] and encoders["pages"].edges.tolist() == [200]
    assert catalog.fields["pages"].tolist() == [0, 1, 2, 3, 3]

    table = pq.read_table(f"{data}/interactions/dt=1970-01-01", partitioning=None)
    encoded = pa.concat_tables([encode(table, schema, encoders, catalog), fillers(schema, 3)])
    assert encoded["age"].to_pylist()[:5] == [2, 3, 4, 1, 3]
    batch = collate(encoded, schema, catalog)
    assert len(batch) == 5
    model = ClickModel(schema, table_sizes(encoders, schema), ClickConfig(dim=4, unknown_share=0)).double()
    tables = {name: table.weight for name, table in model.tables.items()}

    def scaled(name: str, number: float | None) -> torch.Tensor:
        if number is None or math.isnan(number):
            return tables[name][1]
        return tables[name][2] * math.copysign(math.log1p(abs(number)), number)

    price = dict(zip("abc", items["price"].to_pylist(), strict=True))
    inputs = model.inputs(batch)
    for row, record in enumerate(table.to_pylist()):
        fields = inputs.fields[row]
        torch.testing.assert_close(fields[2], scaled("delay", record["delay"]), rtol=1e-6, atol=0)
        torch.testing.assert_close(fields[4], scaled("price", price[record["item_id"]]), rtol=1e-6, atol=0)
        for position, item in enumerate(record["history"]):
            torch.testing.assert_close(
                inputs.history[row, position, 1], scaled("price", price[item]), rtol=1e-6, atol=0
            )
    model(batch)["loss"].backward()
    before = tables["price"].clone()
    model.tables["price"].push(model.group)
    assert (model.tables["price"].weight[2] != before[2]).all()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("{kind: numeric, min_count: 2}", "unknown key 'min_count' of a numeric field"),
        ("{kind: categorical, buckets: 2}", "unknown key 'buckets' of a categorical field"),
        ("{kind: numeric, scale: logs}", "unknown scale 'logs'; .*log"),
        ("{kind: numeric, buckets: 1}", "buckets: 1 is not a whole number of 2 or more"),
    ],
)
def test_wrong_options_of_a_numeric_field(tmp_path, field, message):
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA.replace("{kind: numeric, buckets: 3}", field))
    with pytest.raises(UserError, match=message):
        Schema.load(path)


def test_a_schema_with_numbers_is_saved_and_read_alike(log, tmp_path):
    schema = log[1]
    schema.save(tmp_path / "again.yaml")
    assert Schema.load(tmp_path / "again.yaml") == schema
    with pytest.raises(UserError, match="'user_id' is an id; its kind is categorical"):
        Schema.from_dict({"user": {"user_id": "numeric"}, "item": {"item_id": "categorical"}})
