from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ctrdist.batch import collate
from ctrdist.encode import TEXT_ROW
from ctrdist.epoch import plan_epoch, read_chunk
from ctrdist.errors import UserError
from ctrdist.hashing import text_hashes
from ctrdist.interaction_text import TextConfig
from ctrdist.interactions import Interactions, merged
from ctrdist.items import ItemTexts, read_items
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.log import find_faults, list_days, list_row_groups, read_row_group
from ctrdist.scan import with_good_rows
from tests.conftest import build_tokenizer

TOKENIZER = TextTokenizer.of(build_tokenizer("bert"), 512)
CONFIG = TextConfig(leave_out=("user_id", "tags", "item_id", "hour"), template="{field} {value}")


@pytest.fixture
def gathered(small_log: Path, small_read, tmp_path: Path):
    """Interactions of the small log, whose row groups say much the same; the row groups, and each one's good rows."""
    schema, _, catalog = small_read
    data, files = str(small_log), list_days(str(small_log))
    made = Interactions.of(read_items(data, schema), schema, catalog, CONFIG, TOKENIZER)
    groups = list_row_groups(data, files, tuple(files), schema)
    tables = [read_row_group(data, group, schema) for group in groups]
    good = [np.flatnonzero(find_faults(t, g.day, catalog) == 0) for g, t in zip(groups, tables, strict=True)]
    (tmp_path / "sides").mkdir()
    made.save(tmp_path / "sides")  # as the tasks that gather texts have it
    made = Interactions.load(tmp_path / "sides", schema, catalog)
    made.save(tmp_path, merged(made.distinct(g, t) for g, t in zip(groups, tables, strict=True)))
    return Interactions.load(tmp_path, schema, catalog), groups, tables, good


def test_each_distinct_text_is_there_once_in_the_order_of_the_hashes(gathered, tmp_path: Path):
    found, _, tables, good = gathered
    texts = ItemTexts(tmp_path / "texts.arrow")
    stored = texts.take(np.arange(len(texts)))
    said = [found.texts(table).take(rows).to_pylist() for table, rows in zip(tables, good, strict=True)]
    assert sorted(stored) == sorted(set(sum(said, []))) and len(stored) < len(sum(said, [])) / 2
    assert (
        np.array_equal(text_hashes(pa.array(stored)), found.hashes) and (np.diff(found.hashes.astype(object)) > 0).all()
    )
    assert any(text.startswith("genres ") and " Title i" in text for text in stored)


def test_every_row_finds_the_number_of_its_text(gathered, tmp_path: Path):
    found, groups, tables, good = gathered
    texts = ItemTexts(tmp_path / "texts.arrow")
    for group, table, rows in zip(groups, tables, good, strict=True):
        numbers = found.numbers(group, table)[TEXT_ROW].to_numpy()
        assert len(numbers) == table.num_rows
        assert texts.take(numbers[rows]) == found.texts(table).take(rows).to_pylist()


def test_a_row_of_which_nothing_is_said_has_the_empty_text_and_a_number_for_it(small_log: Path, small_read):
    schema, _, catalog = small_read
    data, files = str(small_log), list_days(str(small_log))
    silent = TextConfig(leave_out=("user_id", "tags", "item_id", "hour", "genres", "studio"))
    items = read_items(data, schema)
    items = items.set_column(items.column_names.index("title"), "title", pa.nulls(items.num_rows, pa.string()))
    made = Interactions.of(items, schema, catalog, silent, TOKENIZER)
    group = list_row_groups(data, files, tuple(files), schema)[0]
    rows = read_row_group(data, group, schema)
    assert set(made.texts(rows).to_pylist()) == {""}
    hashes, texts = made.distinct(group, rows)
    assert texts.to_pylist() == [""]
    found = replace(made, hashes=np.insert(hashes, 0, hashes[0] - np.uint64(1)))
    assert found.numbers(group, rows)[TEXT_ROW].to_pylist() == [1] * rows.num_rows


def test_a_good_row_without_its_text_is_refused_and_a_bad_one_is_not(gathered):
    found, groups, tables, good = gathered
    bad = [number for number, rows in enumerate(good) if len(rows) < tables[number].num_rows]
    assert bad, "some row groups have bad rows"
    for group, table, rows in zip(groups, tables, good, strict=True):
        hashes = text_hashes(found.texts(table))
        faulty = np.setdiff1d(np.arange(table.num_rows), rows)
        only_bad = np.setdiff1d(hashes[faulty], hashes[rows])
        without = replace(found, hashes=np.setdiff1d(found.hashes, only_bad))
        numbers = without.numbers(group, table)[TEXT_ROW].to_numpy()
        assert (without.hashes[numbers[rows]] == hashes[rows]).all()
        assert not numbers[np.isin(hashes, only_bad)].any()
        lacking = replace(found, hashes=np.setdiff1d(found.hashes, hashes[rows[:1]]))
        with pytest.raises(UserError, match=f"row group {group.index} says what it did not say .* run the job again"):
            lacking.numbers(group, table)


def test_numbers_travel_with_the_rows_and_become_states(gathered, small_log: Path, small_read):
    schema, vocabularies, catalog = small_read
    found, groups, tables, good = gathered
    groups = with_good_rows(groups, map(len, good))
    chunks = plan_epoch(groups, 16, (1,), chunk_rows=16)
    parts = [read_chunk(str(small_log), c, schema, vocabularies, catalog, (), found.numbers) for c in chunks]
    assert parts[-1]["filler"].to_pylist().count(True) == chunks[-1].fillers > 0
    states = np.random.default_rng(0).normal(size=(len(found.hashes), 5)).astype(np.float16)
    vectors = np.concatenate([collate(part, schema, catalog, states).vector.numpy() for part in parts])
    expected = np.concatenate(
        [
            states[found.numbers(g, t)[TEXT_ROW].to_numpy()[rows]]
            for g, t, rows in zip(groups, tables, good, strict=True)
        ]
    )
    assert vectors.shape == expected.shape == (39, 5)
    np.testing.assert_array_equal(np.sort(vectors, 0), np.sort(expected.astype(np.float32), 0))
    assert collate(parts[0], schema, catalog, states).text is None
