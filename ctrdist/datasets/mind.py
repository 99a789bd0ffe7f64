"""MIND: impressions of Microsoft News, the articles shown and which of them were clicked (Wu et al., 2020).

Protocol `last-day` tests on the last day and validates on the day before. With MINDsmall or MINDlarge's train and dev
folders, test is then what the dataset calls dev. Histories are the dataset's own: what a user clicked before the first
day too.
"""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from ctrdist.datasets.files import BLOCK_BYTES, drop_repeated, refuse, require, with_unlisted
from ctrdist.datasets.protocol import Protocol, Raw
from ctrdist.errors import UserError
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, MULTI, TIMESTAMP, USER_ID, Field

PROTOCOLS = {"default": Protocol(), "last-day": Protocol(split="last-day")}
BEHAVIORS = ("impression id", "user id", "time", "history", "impressions")
NEWS = ("news id", "category", "subcategory", "title", "abstract", "url", "title entities", "abstract entities")
TIME = "%m/%d/%Y %I:%M:%S %p"


def read(source: Path) -> Raw:
    """`behaviors.tsv` and `news.tsv`, of `source` itself or of the folders below it (MINDsmall_train, MINDsmall_dev).

    A row of the log is an article shown, with label 1 if it was clicked. Times are taken as UTC. Impressions without
    labels, as in MINDlarge_test, are skipped and counted. Fields: user_id; item_id, category, subcategory, entities
    (Wikidata ids of the title's).

    Raises:
        UserError: a file is missing, not UTF-8, has a malformed line, or folders are of different sizes of MIND.
    """
    folders = _find(Path(source))
    counts: dict[str, int] = {}
    news = pa.concat_tables([_read_news(folder / "news.tsv") for folder in folders]).combine_chunks()
    items, counts["repeated news dropped"] = drop_repeated(news, [ITEM_ID])
    log = _read_log([folder / "behaviors.tsv" for folder in folders], counts)
    items, counts["items without metadata"] = with_unlisted(items, log[ITEM_ID])
    return Raw(
        log=log,
        items=items,
        user=(Field(USER_ID, min_count=2),),
        item=(
            Field(ITEM_ID, min_count=2),
            Field("category"),
            Field("subcategory"),
            Field("entities", MULTI, min_count=2),
        ),
        text=("{title}", "({category}).", "{abstract}", "{text}"),
        counts=counts,
    )


def _find(source: Path) -> list[Path]:
    folders = sorted(path.parent for path in source.rglob("behaviors.tsv"))
    if not folders:
        raise UserError(f"{source}: no behaviors.tsv there or below; unpack MINDsmall_train.zip or another part there")
    sizes = {found[0] for folder in folders if (found := re.search("MIND(small|large|demo)", folder.name))}
    if len(sizes) > 1:
        raise UserError(f"{source}: holds {' and '.join(sorted(sizes))}, which share impressions; keep one of them")
    return folders


def _read_tsv(path: Path, names: tuple[str, ...]) -> pa.Table:
    bad: list[csv.InvalidRow] = []
    try:
        table = csv.read_csv(
            require(path),
            csv.ReadOptions(column_names=names, use_threads=False, block_size=BLOCK_BYTES),  # one thread knows the line
            csv.ParseOptions(
                delimiter="\t",
                quote_char=False,  # titles have quotes that mean nothing
                ignore_empty_lines=False,
                invalid_row_handler=lambda row: bad.append(row) or "skip",
            ),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: {error}; expected lines of {', '.join(names)}, joined by tabs, in UTF-8") from None
    if bad:
        raise UserError(
            f"{path}: line {bad[0].number}: has {bad[0].actual_columns} columns: {bad[0].text[:80]!r}; expected "
            f"{', '.join(names)}, joined by tabs ({len(bad)} such lines)"
        )
    return table


def _read_news(path: Path) -> pa.Table:
    table = _read_tsv(path, NEWS)
    refuse(path, pc.equal(table["news id"], ""), table["news id"], "'news id'", "expected an id")
    columns = {name: pc.if_else(pc.equal(table[name], ""), None, table[name]) for name in NEWS[1:5]}
    parts = pc.split_pattern(table["title entities"].combine_chunks(), '"WikidataId": "')
    ids = pc.replace_substring_regex(pc.list_flatten(parts), '".*$', "")
    lists = pa.ListArray.from_arrays(parts.offsets, ids)
    return pa.table({ITEM_ID: table["news id"], **columns, "entities": pc.list_slice(lists, 1)})


def _read_log(paths: list[Path], counts: dict[str, int]) -> pa.Table:
    """user_id, item_id, label, timestamp, and history: one list for each impression, to which its rows point."""
    parts, histories, impression, skipped, before = [], [], [], 0, 0
    for path in paths:
        first = 1
        for batch in _read_tsv(path, BEHAVIORS).to_batches():
            time = pc.strptime(batch["time"], format=TIME, unit="s", error_is_null=True)
            refuse(path, pc.is_null(time), batch["time"], "'time'", "expected such as 11/11/2019 9:05:58 AM", first)
            refuse(path, pc.equal(batch["user id"], ""), batch["user id"], "'user id'", "expected an id", first)
            shown = _words(batch["impressions"])
            token, row = pc.list_flatten(shown), pc.list_parent_indices(shown).to_numpy()
            labelled = pc.match_substring_regex(token, "^.+-[01]$").to_numpy(zero_copy_only=False)
            count, good = (np.bincount(rows, minlength=batch.num_rows) for rows in (row, row[labelled]))
            bad = pa.array((count == 0) | ((good > 0) & (good < count)))
            refuse(path, bad, batch["impressions"], "'impressions'", "expected such as 'N123-1 N456-0'", first)
            skipped, first = skipped + int((good == 0).sum()), first + batch.num_rows
            token, row = token.filter(pa.array(labelled)), row[labelled]
            parts.append(
                pa.table(
                    {
                        USER_ID: batch["user id"].take(pa.array(row)),
                        ITEM_ID: pc.utf8_slice_codeunits(token, 0, -2),
                        LABEL: pc.cast(pc.equal(pc.utf8_slice_codeunits(token, -1), "1"), pa.int8()),
                        TIMESTAMP: pc.cast(time, pa.int64()).take(pa.array(row)),
                    }
                )
            )
            histories.append(_words(batch["history"]))
            impression.append(row + before)
            before += batch.num_rows
    counts["impressions without labels skipped"] = skipped
    at = pa.array(np.concatenate(impression), pa.int32())
    own = pa.DictionaryArray.from_arrays(at, pa.concat_arrays(histories))
    return pa.concat_tables(parts).combine_chunks().append_column(HISTORY, own)


def _words(column: pa.Array) -> pa.ListArray:
    """`N1 N2` -> [N1, N2]; an empty list where there is none."""
    lists = pc.split_pattern(column, " ")
    words, row = pc.list_flatten(lists), pc.list_parent_indices(lists)
    there = pc.not_equal(words, "")
    offsets = np.searchsorted(row.filter(there).to_numpy(), np.arange(len(column) + 1))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), words.filter(there))
