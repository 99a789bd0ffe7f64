"""Files beside the log: what a language model made of every row, in Parquet files that mirror the log's.

A file `dt=2024-01-01/part-0.parquet` of the log has one of the same name here, an output of the state, with the same
row groups and rows in the same order, so that the two are read pairwise. Its columns:

    vector         fixed-size list of float16, the representation of the row; zeros for a bad row
    probability    float32, the click probability that goes with it; 0 for a bad row

Its Parquet metadata and its manifest name the source: path, rows, and the file's SHA-256, size and time of change. A
source of another size or time is hashed before it is read along: with other bytes it is refused.
"""

import contextlib
import datetime as dt
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrdist.encode import VECTOR
from ctrdist.epoch import Beside
from ctrdist.errors import UserError
from ctrdist.log import RowGroup
from ctrdist.storage import Manifest, State, filesystem

Represent = Callable[[RowGroup], tuple[np.ndarray, np.ndarray]]
"""A row group -> float [rows, width] vectors and [rows] probabilities of all of its rows, bad ones included."""

PREFIX = "beside."
"""Before the names of these columns, where they stand with the log's."""
PROBABILITY = PREFIX + "probability"


@dataclass(frozen=True)
class BesideLog:
    """The files beside a log.

    Args:
        state: the state that has them.
        name: what their names in it begin with.
        data: the log.
    """

    state: State
    name: str
    data: str

    def output(self, path: str) -> str:
        """The name of the output that mirrors a file of the log, by its path."""
        return f"{self.name}/{path.rsplit('/interactions/', 1)[-1]}"

    def write(self, day: dt.date, path: str, inputs: str, represent: Represent) -> Manifest:
        """Mirror a file of the log; a mirror that is there of the same `inputs` and the same source stays.

        Args:
            day: of the file.
            inputs: fingerprint of what the vectors depend on besides the file.
            represent: see `Represent`.
        """
        name = self.output(path)
        found = self.state.find(name, inputs)
        if found is not None and self._mirrors(found, path):
            return found
        seen = _size_and_time(self.data, path)
        checksum = _sha256(self.data, path, *seen)
        with filesystem(self.data)[0].open_input_file(path) as stream:
            about = pq.read_metadata(stream)
        rows = [about.row_group(index).num_rows for index in range(about.num_row_groups)]
        facts: dict[str, Any] = {"source": path, "rows": sum(rows), "source_sha256": checksum, "source_seen": seen}
        with self.state.create(name, inputs, facts) as folder, contextlib.ExitStack() as stack:
            writer = None
            for index, count in enumerate(rows):
                table = _beside(*represent(RowGroup(day, path, index, count)), count)
                if writer is None:
                    schema = table.schema.with_metadata({key: str(value) for key, value in facts.items()})
                    writer = stack.enter_context(pq.ParquetWriter(folder / Path(path).name, schema))
                writer.write_table(table, row_group_size=max(1, count))
        return self.state.find(name, inputs)

    def columns(self, keep: tuple[str, ...] = ()) -> Beside:
        """What reads the columns beside a row group: the vectors, and those of `keep` that stand here."""
        names = [VECTOR, *(name for name in keep if name.startswith(PREFIX))]

        def read(group: RowGroup, _rows: pa.Table) -> dict[str, pa.ChunkedArray]:
            table = self.read(group, [name.removeprefix(PREFIX) for name in names])
            return {name: table[name.removeprefix(PREFIX)] for name in names}

        return read

    def read(self, group: RowGroup, columns: list[str]) -> pa.Table:
        """Columns of the rows beside a row group.

        Raises:
            UserError: nothing is there for its file, or the file had other bytes or row groups.
        """
        name = self.output(group.path)
        manifest = self.state.find(name)
        if manifest is None:
            raise UserError(f"{self.state.path(name)}: nothing there beside {group.path}; run the job again")
        if not self._mirrors(manifest, group.path):
            raise UserError(
                f"{group.path}: the file was changed since {self.state.path(name)} was written beside it; run the job "
                "again"
            )
        filesystem_, root = filesystem(self.state.uri)
        with filesystem_.open_input_file(f"{root}/{manifest.folder}/{Path(group.path).name}") as stream:
            file = pq.ParquetFile(stream)
            fits = group.index < file.num_row_groups and file.metadata.row_group(group.index).num_rows == group.rows
            if not fits:
                raise UserError(
                    f"{group.path}: row group {group.index} has other rows than when {self.state.path(name)} was "
                    "written beside it: the file was changed since; run the job again"
                )
            return file.read_row_group(group.index, columns=columns)

    def _mirrors(self, manifest: Manifest, path: str) -> bool:
        """Whether a file of the log is the one that a mirror was made of: not touched since, or of the same bytes."""
        seen, facts = _size_and_time(self.data, path), manifest.facts
        return seen == facts.get("source_seen") or _sha256(self.data, path, *seen) == facts["source_sha256"]


def _size_and_time(data: str, path: str) -> list[int]:
    """Size and time of change of a file of the log: a look at the folder, and not at the file."""
    info = filesystem(data)[0].get_file_info(path)
    return [info.size, info.mtime_ns or 0]


@lru_cache(maxsize=4096)
def _sha256(data: str, path: str, _size: int, _time: int) -> str:
    """The SHA-256 of a file of the log, once a process for each size and time that it is seen with."""
    with filesystem(data)[0].open_input_stream(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _beside(vectors: np.ndarray, probabilities: np.ndarray, rows: int) -> pa.Table:
    """What stands beside `rows` rows: `vector` and `probability`."""
    assert len(vectors) == len(probabilities) == rows, (len(vectors), rows)
    with np.errstate(over="ignore"):
        half = vectors.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(
            f"representations of up to {np.abs(vectors).max():.3g} do not fit into float16: the layers on the language "
            "model have grown too large; lower --m-llm.lr or raise --m-llm.weight-decay"
        )
    lists = pa.FixedSizeListArray.from_arrays(pa.array(half.ravel()), vectors.shape[1])
    return pa.table({"vector": lists, "probability": pa.array(probabilities.astype(np.float32))})
