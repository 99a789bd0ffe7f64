import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from ctrdist import text_table
from ctrdist.errors import UserError
from ctrdist.text_table import (
    FACTS,
    HASHES,
    TABLE,
    TextTableFacts,
    create_text_table,
    load_text_hashes,
    load_text_table,
    seal_text_table,
)

CONTENT = np.arange(15.0).reshape(5, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A table of three items in rows 2 to 4, checked in chunks of 64 bytes."""
    monkeypatch.setattr(text_table, "CHUNK", 64)
    table = create_text_table(tmp_path, 5, 3, "float32")
    table[:] = CONTENT
    hashes = np.array([0, 0, 7, 8, 2**64 - 1], np.uint64)
    facts = seal_text_table(tmp_path, table, hashes, model="m", catalog="c")
    assert (facts.rows, facts.dim, facts.items, facts.dtype) == (5, 3, 3, "float32")
    return tmp_path


def test_what_is_written_is_read(folder):
    table = load_text_table(folder, rows=5, catalog="c", model="m")
    assert isinstance(table, np.memmap) and table.dtype == np.float32 and not table.flags.writeable
    assert table.tolist() == CONTENT.tolist() == load_text_table(folder).tolist()
    assert load_text_hashes(folder).tolist() == [0, 0, 7, 8, 2**64 - 1]
    assert load_text_table(None) is None


def test_checksums_are_those_of_the_chunks(folder):
    content = (folder / TABLE).read_bytes()
    expected = [hashlib.sha256(content[at : at + 64]).hexdigest() for at in range(0, len(content), 64)]
    assert len(expected) == 3 and TextTableFacts.load(folder).checksums[TABLE] == expected


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ({"rows": 6}, "rows 5, expected 6"),
        ({"catalog": "d"}, "catalog c, expected d"),
        ({"model": "n"}, "model m, exp"),
    ],
)
def test_another_table_than_expected_is_refused(folder, expected, said):
    with pytest.raises(UserError, match=f"{TABLE}: .*{said}.*encode the items again"):
        load_text_table(folder, **expected)


def test_a_damaged_table_is_refused(folder):
    content = bytearray((folder / TABLE).read_bytes())
    content[150] ^= 1
    (folder / TABLE).write_bytes(content)
    with pytest.raises(UserError, match="checksum does not match .from byte 128 on"):
        load_text_table(folder)
    (folder / TABLE).write_bytes(content[:128])
    with pytest.raises(UserError, match="checksum does not match .128 bytes are too few"):
        load_text_table(folder)
    (folder / TABLE).unlink()
    with pytest.raises(UserError, match=f"{TABLE}: not there, but {FACTS} is"):
        load_text_table(folder)


def test_damaged_hashes_are_refused(folder):
    np.save(folder / HASHES, np.zeros(5, np.uint64))
    load_text_table(folder)
    with pytest.raises(UserError, match=f"{HASHES}: its checksum"):
        load_text_hashes(folder)


def test_a_table_without_facts_is_refused(folder):
    (folder / FACTS).write_text(json.dumps({"rows": 5}))
    with pytest.raises(UserError, match=f"{FACTS}: not there or not readable"):
        load_text_table(folder)


def test_a_file_is_verified_once(folder, monkeypatch):
    load_text_table(folder)
    monkeypatch.setattr(text_table, "_checksums", None)
    load_text_table(folder, rows=5)
