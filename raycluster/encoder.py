"""Texts -> the text table by a Ray Data actor pool: each distinct text once, each item one row.

Vectors are known by what they were made of: the hash of the text and the fingerprint of the model. So whatever is
there already is used, be it a shard that an earlier try has left or a table of another day, and only the rest is
encoded. Tasks on CPUs tokenise ahead of the actors (`ctrdist.language.encode.ShardEncoder`).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy

from ctrdist.errors import UserError
from ctrdist.items import ItemTexts
from ctrdist.language.encode import HASHES, VECTORS, EncodeConfig, ShardEncoder, Source
from ctrdist.storage import Manifest, State
from ctrdist.text_table import HASHES as HASHES_FILE
from ctrdist.text_table import create_text_table, load_text_hashes, load_text_table, seal_text_table
from ctrdist.text_vectors import TextVectors
from ctrdist.vocabulary import Vocabulary
from raycluster.cluster import numbers
from raycluster.planning import Plan
from raycluster.tokens import Work, tokenised

Numbered = tuple[np.ndarray, str]
"""Rows of texts, ascending, and the fingerprint of what numbers them."""


def catalog_rows(state: State, output: str) -> Numbered:
    """The catalog rows of an output's items."""
    catalog = state.local(output) / "catalog"
    return np.flatnonzero(np.load(catalog / "present.npy")), Vocabulary.load(catalog / "ids").fingerprint()


def encode_items(
    state: State,
    output: str,
    model: Source,
    texts: str,
    config: EncodeConfig,
    plan: Plan,
    inputs: str,
    previous: Iterable[Manifest] = (),
    progress: Callable[[int, int], None] | None = None,
    numbered: Numbered | None = None,
) -> Manifest:
    """Encode all items into output `output`, a text table by catalog row (`ctrdist.text_table`).

    Its facts count `items`, and of these the ones whose vector was `copied` from an earlier table, or `encoded`, and
    `texts_encoded`, what the actors did: a text of several items once, one that an earlier try did not again;
    `encode_seconds` is all that it took, `encoders_seconds` from the first shard's begin to the last one's end.

    Args:
        texts: output that holds the catalog and `texts.arrow`.
        previous: outputs with earlier tables, the newest first; those by the same model are used.
        progress: called with (texts done, texts in all) while texts are encoded.
        numbered: what to encode, where `texts` holds no catalog.

    Raises:
        UserError: there are no items, or their vectors are not finite.
    """
    began, item_texts = time.monotonic(), ItemTexts(state.local(texts) / "texts.arrow")
    items, catalog = numbered or catalog_rows(state, texts)
    if not len(items):
        raise UserError(f"{state.path(texts)}: no items to encode")
    hashes, made_by, shards = item_texts.hashes(items), model.fingerprint(config), f"{output}.shards"
    known, shards_done = TextVectors(hashes), []
    copied = _add_tables(known, state, previous, made_by)
    _add_shards(known, state, shards, made_by)
    missing = known.missing
    if len(missing):
        # The longest first: the last shards are small, and each one's texts of like length.
        missing = missing[np.argsort(-item_texts.lengths(items[missing]), kind="stable")]
        done, total = len(known.hashes) - len(missing), len(known.hashes)
        work = Work(texts, items[missing], hashes[missing], model.tokenizer(config.max_length))
        for shard in _encode(work, state, f"{shards}/{made_by}", model, config, plan):
            shards_done.append(shard)
            done += int(shard["items"])
            if progress:
                progress(done, total)
        _add_shards(known, state, shards, made_by)
    facts = {"model": made_by, "items": len(items), "rows": len(items), "copied": copied}
    facts |= {"encoded": len(items) - copied, "device": ", ".join(sorted({shard["device"] for shard in shards_done}))}
    began_at, ended_at = ([float(shard[name]) for shard in shards_done] or [0.0] for name in ("began", "ended"))
    facts["texts_encoded"] = sum(int(shard["items"]) for shard in shards_done)
    facts["encoders_seconds"] = max(ended_at) - min(began_at)
    with state.create(output, inputs, facts) as folder:
        table = create_text_table(folder, len(item_texts), known.dim, config.table)
        known.fill(table, items)
        by_row = np.zeros(len(table), np.uint64)
        by_row[items] = hashes
        facts["dim"] = seal_text_table(folder, table, by_row, made_by, catalog).dim
        facts["encode_seconds"] = time.monotonic() - began
    state.sweep(shards, set())
    return state.find(output, inputs)


def _add_tables(known: TextVectors, state: State, tables: Iterable[Manifest], made_by: str) -> int:
    """Take in tables by the same model that are not damaged, until none is missing; how many texts gain a vector."""
    gained = 0
    for table in tables:
        if not len(known.missing):
            break
        if table.facts.get("model") == made_by:
            try:
                if not known.lacks(np.load(BytesIO(state.read(table, HASHES_FILE)))):
                    continue  # of many days' tables few are opened
                folder = state.local(table.name)
                gained += known.add(load_text_hashes(folder), load_text_table(folder, model=made_by))
            except UserError as error:
                print(f"warning: {error}. It is left aside", flush=True)
    return gained


def _add_shards(known: TextVectors, state: State, folder: str, made_by: str) -> None:
    """Take in what this try and earlier ones have encoded with the same model."""
    for name in state.names(folder):
        if name.startswith(f"{folder}/{made_by}-"):
            shard = state.local(name)
            known.add(np.load(shard / HASHES), np.load(shard / VECTORS, mmap_mode="r"))


def _encode(
    work: Work, state: State, shards: str, model: Source, config: EncodeConfig, plan: Plan
) -> Iterator[dict[str, Any]]:
    """Encode texts into shards of the state; yields what `ShardEncoder` says of each, as it is written."""
    size = config.shard_items or (16384 if plan.gpus else 1024)
    size = min(size, -(-len(work) // (4 * plan.encoders)))  # some for each encoder, so that they end together
    count = -(-len(work) // size)
    most = min(plan.encoders, count)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    encoded = (
        numbers(count)
        # Asks for another share of a CPU than the actors do: Ray would fuse the two, and nothing ran ahead.
        .map_batches(partial(tokenised, state.uri, ray.put(work), size), batch_size=1, num_cpus=0.5)
        .map_batches(
            ShardEncoder,
            batch_size=size,
            batch_format="pyarrow",
            # Begins with all that there is room for, and lets go of them as shards run out.
            compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=2),
            num_cpus=plan.worker_cpus,
            num_gpus=plan.encoder_gpus or None,
            fn_constructor_kwargs={
                "model": model,
                "config": config,
                "state": state.uri,
                "shards": shards,
                "threads": plan.threads,
                "gpu": plan.gpus > 0,
            },
        )
    )
    for row in encoded.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield row
