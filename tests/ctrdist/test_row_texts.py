from pathlib import Path

import numpy as np
import pytest

from ctrdist.batch import collate
from ctrdist.encode import SAID
from ctrdist.epoch import plan_epoch, read_chunk
from ctrdist.errors import UserError
from ctrdist.interaction_text import interaction_texts, item_sides
from ctrdist.items import by_catalog_row, read_items
from ctrdist.language.assemble import SPECIAL
from ctrdist.language.model import load_tokenizer
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.log import find_faults, list_days, list_row_groups, read_row_group
from ctrdist.row_texts import RowTextConfig, RowTexts, distinct
from ctrdist.scan import with_good_rows
from tests.conftest import build_tokenizer

CONFIGS = {
    "all": RowTextConfig(),
    "some": RowTextConfig(
        leave_out=("user_id", "genres"), item_text="first", template="{field} {value}", max_length=20
    ),
    "items": RowTextConfig(leave_out=("user_id", "tags", "hour")),
}


@pytest.fixture
def log(small_log: Path, small_read):
    """The small log's row groups, each one's rows, and which are good."""
    schema, _, catalog = small_read
    files = list_days(str(small_log))
    groups = list_row_groups(str(small_log), files, tuple(files), schema)
    tables = [read_row_group(str(small_log), group, schema) for group in groups]
    good = [np.flatnonzero(find_faults(t, g.day, catalog) == 0) for g, t in zip(groups, tables, strict=True)]
    return groups, tables, good


def made(name: str, kind: str, tiny_lm: Path, small_log: Path, small_read, tables, folder: Path) -> RowTexts:
    schema, _, catalog = small_read
    config = CONFIGS[name]
    hugging = load_tokenizer(str(tiny_lm)) if kind == "words" else build_tokenizer(kind)
    tokenizer = TextTokenizer.of(hugging, config.max_length)
    said = [distinct(table, schema, config) for table in tables]
    items = read_items(str(small_log), schema)
    RowTexts.of(said, items, schema, catalog, config, tokenizer).save(folder)
    return RowTexts.load(folder)


@pytest.mark.parametrize("kind", ["words", "gpt2"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_rows_read_what_their_whole_sentences_say(
    name: str, kind: str, tiny_lm: Path, small_log: Path, small_read, log, tmp_path: Path
):
    schema, vocabularies, catalog = small_read
    groups, tables, good = log
    texts = made(name, kind, tiny_lm, small_log, small_read, tables, tmp_path)
    chunks = plan_epoch(with_good_rows(groups, map(len, good)), 16, (1,), chunk_rows=16)
    read = [read_chunk(str(small_log), c, schema, vocabularies, catalog, (), texts.numbers) for c in chunks]
    assert read[-1]["filler"].to_pylist().count(True) == chunks[-1].fillers > 0
    items = read_items(str(small_log), schema)
    tokenizer = texts.tokenizer.tokenizer
    sides = tuple(
        by_catalog_row(side, items, catalog.ids) for side in item_sides(items, schema, CONFIGS[name], tokenizer)
    )
    expected = []
    for table, rows in zip(tables, good, strict=True):
        at = catalog.ids.lookup(table["item_id"], "item_id")
        sentences = interaction_texts(table, at, sides, schema, CONFIGS[name]).take(rows).to_pylist()
        ids = tokenizer(sentences)
        expected += [tuple(ids.values[a:b]) for a, b in zip(ids.offsets, ids.offsets[1:], strict=False)]
    found = []
    for part in read:
        batch = collate(part, schema, catalog, row_texts=texts)
        assert len(batch.tokens) == len(batch)
        for ids, length in zip(batch.tokens.input_ids.tolist(), batch.tokens.lengths, strict=True):
            found.append(tuple(ids[:length]))
    assert sorted(found) == sorted(expected) and (kind == "words" or len(set(found)) > 5)
    assert max(map(len, found)) <= CONFIGS[name].max_length


def test_rows_keep_their_own_texts_and_equal_ones_get_equal_numbers(
    tiny_lm: Path, small_log: Path, small_read, log, tmp_path: Path
):
    schema, vocabularies, catalog = small_read
    groups, tables, good = log
    texts = made("all", "gpt2", tiny_lm, small_log, small_read, tables, tmp_path)
    (chunk,) = plan_epoch(with_good_rows(groups, map(len, good)), 1, (1,))
    table = read_chunk(str(small_log), chunk, schema, vocabularies, catalog, ("user_id", "item_id"), texts.numbers)
    codes, batch = texts.codes(table), collate(table, schema, catalog, row_texts=texts)
    assert texts.fields == ("user_id", "hour", "tags", "item_id", "genres", "studio", "text") and texts.rows == 3
    users, items = (table[f"raw.{name}"].to_pylist() for name in ("user_id", "item_id"))
    for row in range(table.num_rows):
        said = [texts.tokenizer.texts[field][code].as_py() for field, code in enumerate(codes[row]) if code >= 0]
        assert f"user_id is {users[row]}." in said and f"item_id is {items[row]}." in said
        assert said[-1].startswith(f"Title {items[row]}.")
    distinct_rows, numbers = {tuple(row) for row in codes.tolist()}, set(batch.tokens.items.tolist())
    assert len(distinct_rows) == len(numbers)
    tokens = texts.tokens_by_field(table)
    own = np.flatnonzero(tokens.fields[: tokens.tokens.offsets[1]] == 0)
    first = build_tokenizer("gpt2").decode(tokens.tokens.values[own])
    assert first == f"user_id is {users[0]}." and (tokens.fields >= SPECIAL).all()


def test_what_was_never_gathered_is_not_said(tiny_lm: Path, small_log: Path, small_read, log, tmp_path: Path):
    groups, tables, _ = log
    texts = made("all", "words", tiny_lm, small_log, small_read, tables[:1], tmp_path)
    known = set(tables[0]["user_id"].to_pylist())
    numbers = texts.numbers(groups[-1], tables[-1])[SAID].flatten().to_numpy().reshape(-1, 3)
    users = tables[-1]["user_id"].to_pylist()
    assert [number >= 0 for number in numbers[:, 0]] == [user in known for user in users]


def test_a_budget_for_nothing_is_refused():
    with pytest.raises(UserError, match="text.max_length: 2 is under 3"):
        RowTextConfig(max_length=2)
