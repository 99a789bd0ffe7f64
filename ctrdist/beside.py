"""Files beside the log: what a language model made of every row, in Parquet files that mirror the log's.

A file `dt=2024-01-01/part-0.parquet` of the log has one of the same name here, an output of the state, with the same
row groups and rows in the same order, so that the two are read pairwise. Its columns:

    vector         fixed-size list of float16, the representation of the row; zeros for a bad row
    probability    float32, the click probability that goes with it; 0 for a bad row

Its Parquet metadata and its manifest name the source: path, rows, and the SHA-256 of the file.
"""

import contextlib
import datetime as dt
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    """

    state: State
    name: str

    def output(self, path: str) -> str:
        """The name of the output that mirrors a file of the log, by its path."""
        return f"{self.name}/{path.rsplit('/interactions/', 1)[-1]}"

    def write(self, data: str, day: dt.date, path: str, inputs: str, represent: Represent) -> Manifest:
        """Mirror a file of the log; a mirror that is there of the same `inputs` and the same source stays.

        Args:
            day: of the file.
            inputs: fingerprint of what the vectors depend on besides the file.
            represent: see `Represent`.
        """
        filesystem_, _ = filesystem(data)
        with filesystem_.open_input_stream(path) as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        name = self.output(path)
        found = self.state.find(name, inputs)
        if found is not None and found.facts["source_sha256"] == checksum:
            return found
        with filesystem_.open_input_file(path) as stream:
            about = pq.read_metadata(stream)
        rows = [about.row_group(index).num_rows for index in range(about.num_row_groups)]
        facts = {"source": path, "rows": sum(rows), "source_sha256": checksum}
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
            UserError: nothing is there for its file, or its row group had another number of rows.
        """
        name = self.output(group.path)
        manifest = self.state.find(name)
        if manifest is None:
            raise UserError(f"{self.state.path(name)}: nothing there beside {group.path}; run the job again")
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


def _beside(vectors: np.ndarray, probabilities: np.ndarray, rows: int) -> pa.Table:
    """What stands beside `rows` rows: `vector` and `probability`."""
    assert len(vectors) == len(probabilities) == rows, (len(vectors), rows)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), vectors.shape[1])
    return pa.table({"vector": lists, "probability": pa.array(probabilities.astype(np.float32))})
