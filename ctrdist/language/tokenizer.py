"""Texts -> token ids, columnar, and where they are kept. Needs neither torch nor a language model."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tokenizers import Encoding, Tokenizer

from ctrdist.errors import UserError
from ctrdist.items import Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 20_000
"""Texts whose encodings are held at a time."""


def token_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_length: int) -> Ragged:
    """Token ids of n texts, with special tokens, cut to `max_length` and to what the model can read; none is padded."""
    limit = min(max_length, tokenizer.model_max_length)
    found = tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False) if texts else {}
    return columnar(found.get("input_ids", []))


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer for a process that only tokenises: it pickles small and is ready in a tenth of a second.

    Args:
        content: JSON of the library `tokenizers`; or Hugging Face's tokenizer itself, where it is not one of those.
        limit: most tokens of a text, special tokens included.
        padding: id of the padding token.
    """

    content: "str | PreTrainedTokenizerBase"
    limit: int
    padding: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> "TextTokenizer":
        """Does what `token_ids` does with `LanguageModel.tokenizer` and `max_length`."""
        limit, content = min(max_length, tokenizer.model_max_length), tokenizer
        if getattr(tokenizer, "is_fast", False):
            own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            own.no_padding()
            own.enable_truncation(limit)
            content = own.to_str()
        return cls(content, limit, tokenizer.pad_token_id or 0)

    def __call__(self, texts: list[str]) -> Ragged:
        """`token_ids` of n texts."""
        if not isinstance(self.content, str):
            return token_ids(self.content, texts, self.limit)
        return columnar([found.ids for found in _ready(self.content).encode_batch_fast(texts)])

    def shorten(self, texts: list[str], count: int) -> list[str]:
        """The beginning of each text: as many whole words as make at most `count` tokens, special ones not counted. Of
        a first word that is longer, its own first tokens. Words are the tokenizer's, or what is between spaces where it
        knows none.

        Raises:
            UserError: see `uncut`.
        """
        out = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            found = self.uncut.encode_batch(chunk, add_special_tokens=False)
            out += [
                text if len(tokens) <= count else _beginning(text, tokens, count)
                for text, tokens in zip(chunk, found, strict=True)
            ]
        return out

    @property
    def uncut(self) -> Tokenizer:
        """The same without a limit, as the library `tokenizers` has it: it tells where in a text its tokens stand.

        Raises:
            UserError: it is none of that library.
        """
        if not isinstance(self.content, str):
            raise UserError(
                f"the language model's tokenizer ({type(self.content).__name__}) has no tokenizer.json, so that it "
                "cannot be told where in a text its tokens stand; take a model that has one"
            )
        return _uncut(self.content)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any text's tokens."""
        content = self.content
        if not isinstance(content, str):
            content = json.dumps([type(content).__name__, sorted(content.get_vocab().items())])
        return hashlib.sha256(f"{self.limit} {self.padding} {content}".encode()).hexdigest()[:16]


def _beginning(text: str, tokens: Encoding, count: int) -> str:
    """Of a text of more than `count` tokens what `TextTokenizer.shorten` leaves."""
    words, offsets = tokens.word_ids, tokens.offsets

    def is_cut(end: int) -> bool:
        between = text[offsets[end - 1][1] - 1 : offsets[end][0] + 1]
        return words[end - 1] != words[end] or (words[0] == words[-1] and any(c.isspace() for c in between))

    end = next((end for end in range(count, 0, -1) if is_cut(end)), count)
    while end and offsets[end - 1][1] > offsets[end][0]:  # amid the bytes of a character
        end -= 1
    return text[: offsets[end - 1][1]].rstrip() if end else ""


@lru_cache(maxsize=2)
def _ready(content: str) -> Tokenizer:
    return Tokenizer.from_str(content)


@lru_cache(maxsize=2)
def _uncut(content: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_truncation()
    return tokenizer


def columnar(ids: list[list[int]]) -> Ragged:
    """Lists of token ids as int32 values and offsets."""
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(row) for row in ids], out=offsets[1:])
    return Ragged(np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets)


@dataclass(frozen=True)
class StoredTokens:
    """The tokens of some items' texts, memory-mapped: nothing is held in memory.

    Args:
        rows: int64 [n], catalog rows, ascending.
        tokens: of each.
        padding: id of the padding token.
    """

    rows: np.ndarray
    tokens: Ragged
    padding: int

    @staticmethod
    def write(folder: Path, rows: np.ndarray, parts: Iterable[Ragged], padding: int) -> None:
        """Write the tokens of `rows`, which come in parts, in the order of the rows; one part is in memory."""
        lengths: list[Any] = [np.zeros(1, np.int64)]
        with (folder / "ids.int32").open("wb") as file:
            for part in parts:
                part.values.tofile(file)
                lengths.append(np.diff(part.offsets))
        offsets = np.cumsum(np.concatenate(lengths))
        assert len(offsets) == len(rows) + 1, (len(offsets), len(rows))
        np.save(folder / "offsets.npy", offsets)
        np.save(folder / "rows.npy", rows)
        (folder / "tokens.json").write_text(json.dumps({"padding": padding}))

    @classmethod
    def load(cls, folder: Path) -> "StoredTokens":
        """Map what `write` wrote."""
        path = folder / "ids.int32"
        ids = np.memmap(path, np.int32, "r") if path.stat().st_size else np.empty(0, np.int32)
        offsets, rows = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "rows"))
        return cls(rows, Ragged(ids, offsets), json.loads((folder / "tokens.json").read_text())["padding"])

    def take(self, rows: np.ndarray) -> Ragged:
        """The tokens of the given catalog rows, all of which are there."""
        at = np.searchsorted(self.rows, rows)
        assert (self.rows[at] == rows).all()
        return self.tokens.take(at)


def tokens_to_arrow(hashes: np.ndarray, tokens: Ragged) -> pa.Table:
    """Texts on their way to an encoder: `hash` (uint64, `ItemTexts.hashes`) and `tokens` (lists of int32) of each."""
    lists = pa.LargeListArray.from_arrays(pa.array(tokens.offsets), pa.array(tokens.values))
    return pa.table({"hash": hashes, "tokens": lists})


def tokens_from_arrow(table: pa.Table) -> tuple[np.ndarray, Ragged]:
    """The hashes and tokens that `tokens_to_arrow` was given, or of a part of its rows."""
    lists = table["tokens"].combine_chunks()
    offsets = lists.offsets.to_numpy()
    return table["hash"].to_numpy(), Ragged(lists.flatten().to_numpy(), (offsets - offsets[0]).astype(np.int64))
