"""Amazon reviews: what the releases of 2018 and 2023 share, which is all but the names of their files and keys."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.datasets.files import drop_repeated, read_json_lines, refuse, with_unlisted
from ctrdist.datasets.protocol import RATING, Protocol, Raw
from ctrdist.errors import UserError
from ctrdist.schema import ITEM_ID, MULTI, TIMESTAMP, USER_ID, Field

PROTOCOLS = {
    "default": Protocol(positive=4),
    "cela": Protocol(core=5, negatives=1, split="time", history_length=20),
    "elec": Protocol(positive=4, split="time"),
    "clickprompt": Protocol(core=10, positive=4, split="time"),
}
"""Ratings are whole stars: from 4 up is "more than 3"."""

PAGE_CODE = r"getTime|aPageStart|<(?:span|div|script|style)\b"
TAG = r"<!--.*?-->|</?[A-Za-z][^<>]*>"
ENTITIES = {"&nbsp;": " ", "&quot;": '"', "&#34;": '"', "&#39;": "'", "&lt;": "<", "&gt;": ">", "&amp;": "&"}


@dataclass(frozen=True)
class Release:
    """The names of a release.

    Args:
        ending: of both files, before `.gz`.
        reviews: what may stand between the category and the ending of the reviews file.
        user, item, rating, time: keys of a review.
        ticks: units of `time` in a second.
        title, brand, categories, description, features: keys of an item's metadata, beside `item`. `brand` names the
            field too.
    """

    ending: str
    reviews: tuple[str, ...]
    user: str
    item: str
    rating: str
    time: str
    ticks: int
    title: str
    brand: str
    categories: str
    description: str
    features: str


def read(source: Path, release: Release) -> Raw:
    """The reviews file and the metadata file of one category; review texts, prices and pictures are not read.

    Reviews of one user and item in the same second, and metadata of an item that an earlier line has, are dropped.
    Items without metadata have none but their id. A title that is code of the web page becomes null. All are counted.

    Raises:
        UserError: a file is missing or there are several, or a line is malformed (named with its number).
    """
    reviews, metadata = find_files(Path(source), release)
    log, repeated = drop_repeated(_read_reviews(reviews, release), (USER_ID, ITEM_ID, TIMESTAMP))
    items, repeated_items, page_code = _read_items(metadata, release)
    items, unlisted = with_unlisted(items, log[ITEM_ID])
    return Raw(
        log=log,
        items=items,
        user=(Field(USER_ID, min_count=2),),
        item=(Field(ITEM_ID, min_count=2), Field(release.brand, min_count=2), Field("categories", MULTI, min_count=2)),
        text=("{title}.", f"{{{release.brand}}}.", "{categories}.", "{description}", "{features}", "{text}"),
        counts={
            "duplicate reviews dropped": repeated,
            "duplicate metadata dropped": repeated_items,
            "items without metadata": unlisted,
            "titles of page code dropped": page_code,
        },
    )


def find_files(source: Path, release: Release) -> tuple[Path, Path]:
    """The reviews file and the metadata file of a folder. Raises UserError unless there is one of each."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; point --source at the folder with the reviews and their metadata")
    ends = (release.ending, release.ending + ".gz")
    metadata = _only(source, sorted(source.glob("meta_*")), [f"meta_<Category>{end}" for end in ends], ends)
    category = metadata.name.removeprefix("meta_").removesuffix(".gz").removesuffix(release.ending)
    names = [f"{category}{middle}{end}" for middle in release.reviews for end in ends]
    return _only(source, [source / name for name in names], names, ends), metadata


def _only(source: Path, paths: list[Path], expected: list[str], ends: tuple[str, ...]) -> Path:
    found = [path for path in paths if path.name.endswith(ends) and path.is_file()]
    if not found:
        raise UserError(
            f"{source}: there is no file {' or '.join(expected)}; put the reviews file and the metadata file of one "
            "category there, with the names that they are published under"
        )
    if len(found) > 1:
        raise UserError(f"{source}: {', '.join(path.name for path in found)}: expected one of these; keep one")
    return found[0]


def _read_reviews(path: Path, release: Release) -> pa.Table:
    types = {
        release.user: pa.string(), release.item: pa.string(), release.rating: pa.float32(), release.time: pa.int64(),
    }  # fmt: skip
    log = read_json_lines(path, pa.schema(types))
    for key in (release.user, release.item):
        _refuse_missing(path, log[key], key)
    between = pc.and_(pc.greater_equal(log[release.rating], 0), pc.less_equal(log[release.rating], 5))
    bad = pc.invert(pc.fill_null(between, False))
    refuse(path, bad, log[release.rating], f"'{release.rating}'", "expected a number from 0 to 5")
    refuse(path, log[release.time].is_null(), log[release.time], f"'{release.time}'", "expected a whole number")
    log = log.rename_columns([USER_ID, ITEM_ID, RATING, TIMESTAMP])
    return log.set_column(3, TIMESTAMP, pc.divide(log[TIMESTAMP], release.ticks))


def _read_items(path: Path, release: Release) -> tuple[pa.Table, int, int]:
    """item_id, title, brand, categories, description, features; how many lines repeat an item; titles of page code."""
    texts = pa.list_(pa.string())
    types = {
        release.item: pa.string(), release.title: pa.string(), release.brand: pa.string(),
        release.categories: texts, release.description: texts, release.features: texts,
    }  # fmt: skip
    found = read_json_lines(path, pa.schema(types))
    _refuse_missing(path, found[release.item], release.item)
    found, repeated = drop_repeated(found, [release.item])
    code = pc.fill_null(pc.match_substring_regex(found[release.title], PAGE_CODE), False)
    items = pa.table(
        {
            ITEM_ID: found[release.item],
            "title": clean(pc.if_else(code, pa.scalar(None, pa.string()), found[release.title])),
            release.brand: clean(found[release.brand]),
            "categories": clean_lists(found[release.categories]),
            "description": clean(pc.binary_join(clean_lists(found[release.description]), " ")),
            "features": clean(pc.binary_join(clean_lists(found[release.features]), " ")),
        }
    )
    return items, repeated, pc.sum(code).as_py() or 0


def _refuse_missing(path: Path, ids: pa.ChunkedArray, key: str) -> None:
    refuse(path, pc.fill_null(pc.equal(ids, ""), True), ids, f"'{key}'", "expected an id")


def clean(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Texts without HTML tags and entities, with single spaces; null where nothing is left."""
    texts = pc.replace_substring_regex(texts, TAG, " ")
    for entity, character in ENTITIES.items():
        texts = pc.replace_substring(texts, entity, character)
    texts = pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"\s+", " "))
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def clean_lists(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of texts, each `clean`, without those of which nothing is left; no list is an empty one."""
    parts = []
    for part in lists.chunks:
        values, parents = clean(part.flatten()), pc.list_parent_indices(part)
        kept = values.is_valid()
        lengths = np.bincount(parents.filter(kept).to_numpy(), minlength=len(part))
        parts.append(pa.ListArray.from_arrays(pa.array(np.r_[0, np.cumsum(lengths)], pa.int32()), values.filter(kept)))
    return pa.chunked_array(parts, lists.type)
