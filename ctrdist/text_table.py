"""The text table on disk: every item's vector by catalog row, with what it was made of, and checksums.

A folder holds `text_table.npy`, which all processes of a node map, `text_table.json`, and `text_hashes.npy`, the hash
of the text that each row was made of (0 without an item), by which a later table takes over what has not changed.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from ctrdist.errors import UserError

TABLE, HASHES, FACTS = "text_table.npy", "text_hashes.npy", "text_table.json"
CHUNK = 64 * 2**20
"""Bytes of a file that one checksum is of."""

TableType = Literal["float16", "float32"]


@dataclass(frozen=True)
class TextTableFacts:
    """What a text table says of itself.

    Args:
        rows: catalog rows, padding, unknown and rows without an item included; these are zeros.
        dim: length of a vector.
        items: rows that have one.
        dtype: of its numbers.
        model: fingerprint of what turned texts into vectors: language model, pooling, precision, length of texts.
        catalog: fingerprint of the vocabulary that numbers the items (`Vocabulary.fingerprint`).
        checksums: by file, SHA-256 of each of its chunks.
    """

    rows: int
    dim: int
    items: int
    dtype: str
    model: str
    catalog: str
    checksums: dict[str, list[str]]

    @classmethod
    def load(cls, folder: Path) -> "TextTableFacts":
        """Read a table's facts. Raises UserError if there are none."""
        try:
            return cls(**json.loads((folder / FACTS).read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{folder / FACTS}: not there or not readable; encode the items again") from None


def create_text_table(folder: Path, rows: int, dim: int, dtype: TableType) -> np.memmap:
    """A table of zeros [rows, dim], mapped for writing. `seal_text_table` completes it."""
    return np.lib.format.open_memmap(folder / TABLE, "w+", np.dtype(dtype), (rows, dim))


def seal_text_table(folder: Path, table: np.ndarray, hashes: np.ndarray, model: str, catalog: str) -> TextTableFacts:
    """Write the facts of a table that is filled. Arguments as in `TextTableFacts`, and:

    Args:
        table: what `create_text_table` gave.
        hashes: uint64 [rows], of each row's text (`ItemTexts.hashes`), 0 without an item.
    """
    if isinstance(table, np.memmap):
        table.flush()
    np.save(folder / HASHES, hashes)
    checksums = {name: list(_checksums(folder / name)) for name in (TABLE, HASHES)}
    items = int(np.count_nonzero(hashes))
    facts = TextTableFacts(*map(int, table.shape), items, str(table.dtype), model, catalog, checksums)
    (folder / FACTS).write_text(json.dumps(asdict(facts), indent=1))
    return facts


def load_text_table(
    folder: Path | None, *, rows: int | None = None, catalog: str | None = None, model: str | None = None
) -> np.ndarray | None:
    """The text table of a folder, float16 or float32 [rows, dim], memory-mapped; None for no folder.

    Its checksums are verified once a process.

    Args:
        rows: how many the caller's catalog has.
        catalog: fingerprint of the caller's catalog.
        model: fingerprint of the model that the caller expects.

    Raises:
        UserError: no table, another one than expected, or a damaged one.
    """
    if folder is None:
        return None
    facts = TextTableFacts.load(folder)
    for what, found, expected in (
        ("rows", facts.rows, rows),
        ("the catalog", facts.catalog, catalog),
        ("the language model", facts.model, model),
    ):
        if expected is not None and found != expected:
            raise UserError(
                f"{folder / TABLE}: {what} {found}, expected {expected}: it was made for other items or by another "
                "language model; encode the items again"
            )
    table = _open(folder, TABLE, facts)
    if (table.shape, str(table.dtype)) != ((facts.rows, facts.dim), facts.dtype):
        raise UserError(f"{folder / TABLE}: {table.dtype} {table.shape}, unlike {FACTS}; encode the items again")
    return table


def load_text_hashes(folder: Path) -> np.ndarray:
    """The hash of the text of each row of a folder's table, uint64 [rows]. Raises UserError if they are damaged."""
    return _open(folder, HASHES, TextTableFacts.load(folder))


def _open(folder: Path, name: str, facts: TextTableFacts) -> np.ndarray:
    path = folder / name
    if not path.exists():
        raise UserError(f"{path}: not there, but {FACTS} is; encode the items again")
    about = path.stat()
    _verify(path.absolute(), tuple(facts.checksums[name]), about.st_size, about.st_mtime_ns)
    return np.load(path, mmap_mode="r")


@lru_cache(maxsize=64)
def _verify(path: Path, expected: tuple[str, ...], size: int, changed: int) -> None:
    """Raise UserError if a file is not what its checksums say; once a process for a file as it is."""
    found = list(_checksums(path))
    wrong = [number for number, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]]
    if wrong or len(found) != len(expected):
        where = f"from byte {wrong[0] * CHUNK:,} on" if wrong else f"{size:,} bytes are too few or too many"
        raise UserError(f"{path}: its checksum does not match ({where}); restore the file or encode the items again")


def _checksums(path: Path) -> Iterator[str]:
    """SHA-256 of each chunk, a few at a time: hashing leaves Python to others meanwhile."""
    content = np.memmap(path, np.uint8, "r")
    with ThreadPoolExecutor(4) as pool:
        starts = range(0, len(content), CHUNK)
        yield from pool.map(lambda start: hashlib.sha256(content[start : start + CHUNK]).hexdigest(), starts)
