import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.batch import collate
from ctrdist.beside import PROBABILITY, BesideLog, _beside
from ctrdist.encode import VECTOR
from ctrdist.epoch import plan_epoch, plan_pass, read_chunk
from ctrdist.errors import UserError
from ctrdist.log import RowGroup, find_faults, list_days, list_row_groups, read_row_group
from ctrdist.storage import State


def numbers(group: RowGroup) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of a file, its number within the day's row group, and the group's in its file."""
    rows = np.arange(group.rows)
    return np.stack([rows, np.full(group.rows, group.index), rows * 0 + group.day.day], 1), rows / 100


@pytest.fixture
def beside(small_log: Path, tmp_path: Path) -> BesideLog:
    found = BesideLog(State(tmp_path), "runs/d/rows", str(small_log))
    for day, paths in list_days(str(small_log)).items():
        for path in paths:
            found.write(day, path, "made", numbers)
    return found


def test_files_mirror_the_logs_and_carry_its_checksum(beside: BesideLog, small_log: Path):
    for paths in list_days(str(small_log)).values():
        for path in paths:
            name = f"runs/d/rows/{Path(path).parent.name}/{Path(path).name}"
            mirror = beside.state.local(name) / Path(path).name
            own, source = pq.ParquetFile(mirror), pq.ParquetFile(path)
            groups = range(source.num_row_groups)
            assert [own.metadata.row_group(i).num_rows for i in groups] == [
                source.metadata.row_group(i).num_rows for i in groups
            ]
            assert own.schema_arrow.field("vector").type == pa.list_(pa.float16(), 3)
            checksum = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            assert own.schema_arrow.metadata[b"source_sha256"].decode() == checksum
            about = Path(path).stat()
            assert beside.state.find(name).facts == {
                "source": path, "rows": source.metadata.num_rows, "source_sha256": checksum,
                "source_seen": [about.st_size, about.st_mtime_ns],
            }  # fmt: skip


def test_rows_are_read_pairwise_also_cut_shuffled_and_filled_up(beside: BesideLog, small_log: Path, small_read):
    schema, vocabularies, catalog = small_read
    data, files = str(small_log), list_days(str(small_log))
    groups = list_row_groups(data, files, tuple(files), schema)
    expected = []
    for number, group in enumerate(groups):
        table = read_row_group(data, group, schema)
        good = np.flatnonzero(find_faults(table, group.day, catalog) == 0)
        groups[number] = replace(group, good=len(good))
        for row in good:
            expected.append((table["timestamp"][row].as_py(), [row, group.index, group.day.day], np.float32(row / 100)))

    def pairs(chunks: list, keep: tuple[str, ...]) -> list:
        tables = [read_chunk(data, c, schema, vocabularies, catalog, keep, beside.columns(keep)) for c in chunks]
        table = pa.concat_tables(tables)
        columns = (table["raw.timestamp"], table[VECTOR], table[f"raw.{PROBABILITY}"])
        return list(zip(*(column.to_pylist() for column in columns), strict=True))

    keep = ("timestamp", PROBABILITY)
    assert pairs(plan_pass(groups), keep) == expected
    cut = [replace(chunk, fillers=0) for chunk in plan_epoch(groups, 7, (3,), chunk_rows=7)]
    assert sorted(pairs(cut, keep)) == sorted(expected) and pairs(cut, keep) != expected
    # With fillers, as trainers read it.
    chunks = plan_epoch(groups, 7, (3,), chunk_rows=7)
    tables = [read_chunk(data, c, schema, vocabularies, catalog, (), beside.columns()) for c in chunks]
    assert tables[-1].num_rows == 14 and tables[-1]["filler"].to_pylist().count(True) == chunks[-1].fillers > 0
    batch = collate(pa.concat_tables(tables), schema, catalog)
    assert sorted(batch.vector.tolist()) == sorted(vector for _, vector, _ in expected)
    assert len(batch.empty().vector) == 0 and batch.to("cpu").vector.shape == (len(expected), 3)


def test_a_mirror_of_the_same_source_stays(beside: BesideLog, small_log: Path, tmp_path: Path):
    (day, (path, *_)), *_ = list_days(str(small_log)).items()
    before = beside.state.find(beside.output(path)).folder

    def never(_group: RowGroup):
        raise AssertionError("written twice")

    assert beside.write(day, path, "made", never).folder == before
    assert beside.write(day, path, "made otherwise", numbers).folder != before
    copied = tmp_path / "log" / "interactions" / Path(path).parent.name / Path(path).name
    copied.parent.mkdir(parents=True)
    pq.write_table(pq.ParquetFile(path).read(), copied, compression="gzip")
    with pytest.raises(AssertionError, match="written twice"):
        replace(beside, data=str(tmp_path / "log")).write(day, str(copied), "made otherwise", never)


def test_a_file_rewritten_with_as_many_rows_is_noticed_and_one_only_touched_is_not(small_log: Path, tmp_path: Path):
    copy = shutil.copytree(small_log, tmp_path / "log")
    beside = BesideLog(State(tmp_path / "state"), "rows", str(copy))
    (day, (path, *_)), *_ = list_days(str(copy)).items()
    beside.write(day, path, "made", numbers)
    group, table = RowGroup(day, path, 0, 8), pq.ParquetFile(path).read()
    before = beside.read(group, ["vector"])
    about = Path(path).stat()
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1_000_000_000))
    assert beside.read(group, ["vector"]).equals(before)
    # The same rows in another order: sizes and statistics of the columns say nothing of it.
    pq.write_table(table.take(pa.array(range(table.num_rows))[::-1]), path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 2_000_000_000))
    with pytest.raises(UserError, match="part-0.parquet: the file was changed since .* run the job again"):
        beside.read(group, ["vector"])
    beside.write(day, path, "made", numbers)
    assert beside.read(group, ["vector"]).num_rows == 8


def test_what_does_not_fit_is_refused(beside: BesideLog, small_log: Path):
    (day, (path, *_)), *_ = list_days(str(small_log)).items()
    with pytest.raises(UserError, match="row group 0 has other rows than when .* was written beside it"):
        beside.read(RowGroup(day, path, 0, 5), ["vector"])
    with pytest.raises(UserError, match="nothing there beside .*/part-9.parquet; run the job again"):
        beside.read(RowGroup(day, path.replace("part-0", "part-9"), 0, 8), ["vector"])


def test_representations_beyond_float16_are_refused():
    fits = _beside(np.full((2, 3), 60_000.0), np.zeros(2), 2)
    assert np.isfinite(fits["vector"].combine_chunks().flatten().to_numpy()).all()
    with pytest.raises(UserError, match=r"up to 7e\+04 do not fit into float16"):
        _beside(np.full((2, 3), 70_000.0), np.zeros(2), 2)
