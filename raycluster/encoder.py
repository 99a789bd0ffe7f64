"""Texts -> vectors by a Ray Data actor pool, each item exactly once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy

from ctrdist.errors import UserError
from ctrdist.items import ItemTexts
from ctrdist.language.encoder import load_encoder
from ctrdist.language.tokens import tokenize
from ctrdist.loop import use_bfloat16
from ctrdist.optim import Precision
from ctrdist.storage import Manifest, State, fingerprint
from raycluster.cluster import Plan


@dataclass(frozen=True)
class EncodeConfig:
    """How items are encoded.

    Args:
        max_length: tokens of a text that are read, special tokens included.
        tokens_per_batch: padded tokens that are encoded at a time.
        shard_items: items of a shard, the piece of work that is not done again after a crash.
        precision: as in training; vectors are stored in float16 in any case.
    """

    max_length: int = 128
    tokens_per_batch: int = 8192
    shard_items: int = 1024
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name in ("max_length", "tokens_per_batch", "shard_items"):
            if getattr(self, name) < 1:
                raise UserError(f"encode.{name}: {getattr(self, name)} is under 1")


class Encoder:
    """An actor that encodes shards of items with one language model and writes each shard to the state."""

    def __init__(
        self,
        state: str,
        language_model: str,
        texts: str,
        shards: str,
        inputs: str,
        config: EncodeConfig,
        gpu: bool,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.state, self.shards, self.inputs, self.config = State(state), shards, inputs, config
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = load_encoder(self.state.local(language_model)).eval().to(self.device)
        self.items, self.texts = encoding_order(self.state.local(texts))
        self.bfloat16 = use_bfloat16(config.precision, self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        done = [self.encode_shard(int(number)) for number in batch["shard"]]
        return {"shard": batch["shard"], "items": np.array(done)}

    def encode_shard(self, number: int) -> int:
        """Encode and write one shard; returns its number of items."""
        size = self.config.shard_items
        rows = self.items[number * size : (number + 1) * size]
        with self.state.create(shard_name(self.shards, number), self.inputs) as folder:
            np.save(folder / "rows.npy", rows)
            np.save(folder / "vectors.npy", self.encode(rows))
        return len(rows)

    @torch.inference_mode()
    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Pooled states of the items at `rows`, float16 [n, width], in micro-batches of like length."""
        out = np.empty((len(rows), self.model.width), np.float16)
        order = np.argsort(self.texts.lengths(rows), kind="stable")[::-1]
        step = max(1, self.config.tokens_per_batch // self.config.max_length)
        start = 0
        while start < len(rows):
            at = order[start : start + step]
            tokens = tokenize(self.model.tokenizer, self.texts.take(rows[at]), rows[at], self.config.max_length)
            tokens = tokens.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                vectors = self.model(tokens.input_ids, tokens.attention_mask)
            out[at] = vectors.to(torch.float16).cpu().numpy()
            start += len(at)
            step = max(1, self.config.tokens_per_batch // tokens.input_ids.shape[1])
        return out


def encoding_order(folder: Path) -> tuple[np.ndarray, ItemTexts]:
    """The catalog rows of today's items, the longest text first so that the last shards are small, and all texts."""
    items, texts = np.flatnonzero(np.load(folder / "catalog" / "present.npy")), ItemTexts(folder / "texts.arrow")
    return items[np.argsort(texts.lengths(items), kind="stable")[::-1]], texts


def shard_name(shards: str, number: int) -> str:
    """Name of a shard's output."""
    return f"{shards}/{number:06d}"


def encode_items(
    state: State,
    output: str,
    language_model: str,
    texts: str,
    config: EncodeConfig,
    plan: Plan,
    inputs: str,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Encode all items into output `output`: `text_table.npy`, float16 [catalog rows, width], zeros without an item.

    Shards that an earlier try has written from the same inputs are not encoded again.

    Args:
        language_model: output with the language model to encode with.
        texts: output that holds the catalog and `texts.arrow`.
        progress: called with (items done, items in all).
    """
    began = time.monotonic()
    items, all_texts = encoding_order(state.local(texts))
    all_shards = range(-(-len(items) // config.shard_items))
    shards = f"{output}.shards-{fingerprint(inputs, config.shard_items)}"
    missing = [number for number in all_shards if not state.find(shard_name(shards, number), inputs)]
    done = len(items) - sum(len(items[n * config.shard_items : (n + 1) * config.shard_items]) for n in missing)
    if missing:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = False
        dataset = ray.data.from_items([{"shard": n} for n in missing], override_num_blocks=len(missing)).map_batches(
            Encoder,
            batch_size=1,
            compute=ActorPoolStrategy(size=min(plan.workers, len(missing))),
            num_cpus=plan.worker_cpus,
            num_gpus=plan.gpus or None,
            fn_constructor_kwargs={
                "state": state.uri,
                "language_model": language_model,
                "texts": texts,
                "shards": shards,
                "inputs": inputs,
                "config": config,
                "gpu": plan.gpus > 0,
                "threads": plan.threads,
            },
        )
        for row in dataset.iter_rows():
            done += int(row["items"])
            if progress:
                progress(done, len(items))
    facts = {"items": len(items), "rows": len(items), "encode_seconds": time.monotonic() - began}
    with state.create(output, inputs, facts) as folder:
        facts["dim"] = assemble(state, shards, all_shards, items, len(all_texts), folder / "text_table.npy")
    for number in all_shards:
        state.remove(shard_name(shards, number))
    manifest = state.find(output, inputs)
    assert manifest is not None
    return manifest


def assemble(state: State, shards: str, numbers: range, items: np.ndarray, rows: int, path: Path) -> int:
    """Put the shards together into one memory-mapped table and check that every item came once; returns the width."""
    table, seen = None, np.zeros(rows, np.int8)
    for number in numbers:
        folder = state.local(shard_name(shards, number))
        at, vectors = np.load(folder / "rows.npy"), np.load(folder / "vectors.npy")
        if table is None:
            table = np.lib.format.open_memmap(path, "w+", np.float16, (rows, vectors.shape[1]))
        table[at] = vectors
        seen[at] += 1
    assert (seen[items] == 1).all() and seen.sum() == len(items), (
        "an item is missing from the text table, or twice in it"
    )
    table.flush()
    return table.shape[1]
