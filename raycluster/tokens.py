"""Texts -> tokens by Ray tasks on CPUs. Their processes load neither torch nor the language model."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from ctrdist.items import ItemTexts, Ragged
from ctrdist.language.tokenizer import StoredTokens, TextTokenizer, tokens_to_arrow
from ctrdist.storage import Manifest, State, fingerprint
from raycluster.cluster import in_parallel

PART = 8192
"""Texts of a task."""


def stored_tokens(state: State, texts: Manifest, tokenizer: TextTokenizer, items: np.ndarray) -> Manifest:
    """The output with the tokens of `items`, made if it is not there; named by texts, tokenizer and items.

    Args:
        texts: output with `texts.arrow`.
        items: catalog rows, ascending.
    """
    rows = hashlib.sha256(np.ascontiguousarray(items)).hexdigest()
    content = fingerprint(texts.files["texts.arrow"], tokenizer.fingerprint, rows)
    name = f"{texts.name}.tokens-{content}"
    found = state.find(name)
    if found is None:
        with state.create(name, content, {"rows": len(items)}) as folder:
            StoredTokens.write(folder, items, _in_order(state.uri, texts.name, tokenizer, items), tokenizer.padding)
        found = state.find(name)
    return found


def _in_order(state: str, texts: str, tokenizer: TextTokenizer, items: np.ndarray) -> Iterator[Ragged]:
    """Tokens of parts of `items`, in their order. A single part is not worth a task."""
    parts = [items[start : start + PART] for start in range(0, len(items), PART)]
    if len(parts) == 1:
        yield tokenizer(_texts(str(State(state).local(texts))).take(items))
        return
    shared, waiting, number = ray.put(tokenizer), {}, 0
    for done, tokens in in_parallel(_part, [(n, state, texts, shared, part) for n, part in enumerate(parts)]):
        waiting[done] = tokens
        while number in waiting:
            yield waiting.pop(number)
            number += 1


def _part(number: int, state: str, texts: str, tokenizer: TextTokenizer, items: np.ndarray) -> tuple[int, Ragged]:
    return number, tokens_of(state, texts, tokenizer, items)


@dataclass(frozen=True)
class Work:
    """Texts to tokenise and to encode.

    Args:
        texts: output with `texts.arrow`.
        rows: [n], catalog rows, in the order in which they are dealt out.
        hashes: uint64 [n], of their texts.
        tokenizer: of the language model.
    """

    texts: str
    rows: np.ndarray
    hashes: np.ndarray
    tokenizer: TextTokenizer

    def __len__(self) -> int:
        return len(self.rows)


def tokenised(state: str, work: ray.ObjectRef, size: int, batch: dict[str, np.ndarray]) -> pa.Table:
    """A task of Ray Data: the shard of `size` texts whose number is `id` [1], as `tokens_to_arrow` has it."""
    (number,), all_ = batch["id"], ray.get(work)
    part = slice(number * size, (number + 1) * size)
    return tokens_to_arrow(all_.hashes[part], tokens_of(state, all_.texts, all_.tokenizer, all_.rows[part]))


def tokens_of(state: str, texts: str, tokenizer: TextTokenizer, items: np.ndarray) -> Ragged:
    """The tokens of some items' texts, on one core: what a task does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return tokenizer(_texts(str(State(state).local(texts))).take(items))


@lru_cache(maxsize=2)
def _texts(folder: str) -> ItemTexts:
    return ItemTexts(Path(folder) / "texts.arrow")
