"""Rows of a log -> the tokens of what is said of them, put together from the tokens of their values.

A value is tokenised once, however many rows have it; a row is a few numbers. What comes out are the tokens that the
tokenizer makes of the row's whole sentence: what is said of its fields, joined by one space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Encoding, Tokenizer

from ctrdist.language.tokenizer import CHUNK, TextTokenizer, columnar
from ctrdist.serving.ragged import Ragged, offsets_of, spans
from ctrdist.texts import join_texts

SPECIAL = -1
"""The field number of a token that is of no field."""
_EMPTY, _BEFORE, _AFTER, _FIRST = range(4)
"""The pieces that rows share, and the first of those of values."""
_NEIGHBOUR = "so it is."


def say(column: pa.Array | pa.ChunkedArray, part: str, name: str) -> tuple[pa.Array, np.ndarray]:
    """What is said of a field, once for each distinct value of a dictionary-encoded column.

    Args:
        column: [rows], of what `join_texts` takes, or a dictionary of it.
        part: the template as `TextConfig.parts` fills it, `genres is {genres}.`
        name: of the column in it.

    Returns:
        The distinct texts, large_string, and each row's, int64 [rows]; -1 where nothing is said.
    """
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values, codes = column, None
    if pa.types.is_dictionary(column.type):
        values, codes = column.dictionary, column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    said = join_texts(pa.table({name: values}), [part]).dictionary_encode()
    empty = pc.equal(said.dictionary, "").to_numpy(zero_copy_only=False)
    of_value = said.indices.to_numpy().astype(np.int64)
    of_value[empty[of_value]] = -1
    return said.dictionary, of_value if codes is None else np.append(of_value, -1)[codes]


@dataclass(frozen=True)
class RowTokens:
    """The tokens of n rows.

    Args:
        tokens: of each row, special tokens included.
        fields: int16, of each token the number of its field, or `SPECIAL`.
    """

    tokens: Ragged
    fields: np.ndarray


@dataclass(frozen=True)
class RowTokenizer:
    """Gathers the tokens of rows from pieces: the special tokens around a sentence, and of each value two, one for the
    start of a sentence and one for after a space.

    That pieces meet where the tokenizer would have cut is not taken for granted. It must cut at spaces, and a value
    between two others must leave their tokens as they are. A value that does not (one that ends in a special token
    which swallows the next space, for example) has its rows tokenised whole, each distinct one once a call; a tokenizer
    that does not cut at spaces (Llama 2) has all of them so.

    Args:
        tokenizer: with the most tokens of a row, special ones included.
        texts: of each field, the texts of its distinct values, as `say` gives them.
        pieces: `_EMPTY`, `_BEFORE`, `_AFTER`, then each field's, those for the start first.
        clean: bool [pieces], whether a piece may be used.
    """

    tokenizer: TextTokenizer
    texts: tuple[pa.Array, ...]
    pieces: Ragged
    clean: np.ndarray

    @classmethod
    def of(cls, tokenizer: TextTokenizer, texts: Sequence[pa.Array]) -> "RowTokenizer":
        """Tokenise each text by itself and between two others.

        Raises:
            UserError: see `TextTokenizer.uncut`.
        """
        own, near = tokenizer.uncut, _NEIGHBOUR
        marked = own.encode(near)
        words = np.flatnonzero(np.array(marked.special_tokens_mask) == 0)
        parts = [columnar([[], marked.ids[: words[0]], marked.ids[words[-1] + 1 :]])]
        left = _body(own, [near])[0].ids
        right = _body(own, [f"{near} {near}"])[0].ids[len(left) :]
        cuts, clean = _cuts_at_spaces(own), [np.ones(_FIRST, bool)]
        for field in texts:
            fits, between = [], []
            for at in range(0, len(field), CHUNK):
                chunk = field.slice(at, CHUNK).to_pylist()
                parts.append(columnar([found.ids for found in _body(own, chunk)]))
                ids = [found.ids for found in _body(own, [f"{near} {text} {near}" for text in chunk])]
                fits.append(np.array([cuts and _starts_and_ends(one, left, right) for one in ids]))
                between.append(columnar([one[len(left) : -len(right)] for one in ids]))
            parts += between
            clean += fits * 2
        values = np.concatenate([part.values for part in parts])
        offsets = offsets_of(np.concatenate([np.diff(part.offsets) for part in parts]))
        return cls(tokenizer, tuple(texts), Ragged(values, offsets), np.concatenate(clean))

    def __call__(self, codes: np.ndarray) -> RowTokens:
        """The tokens of n rows, those beyond the most that a row may have cut from its end.

        Args:
            codes: int64 [n, fields], the text of each field, -1 where nothing is said.
        """
        rows, fields = codes.shape
        said = codes >= 0
        later = said & (said.cumsum(1) > 1)
        sizes = np.array([len(texts) for texts in self.texts], np.int64)
        firsts = _FIRST + 2 * (np.cumsum(sizes) - sizes)
        at = np.tile([_BEFORE, *[_EMPTY] * fields, _AFTER], (rows, 1))
        at[:, 1:-1] = np.where(said, firsts + codes + later * sizes, _EMPTY)
        starts = self.pieces.offsets[at]
        lengths = self.pieces.offsets[at + 1] - starts
        odd = ~self.clean[at].all(1)
        distinct, which = np.unique(codes[odd], axis=0, return_inverse=True)
        whole = self._whole(distinct)
        held = len(self.pieces.values)
        starts[odd, 1:-1] = held + whole.offsets[:-1].reshape(-1, fields)[which]
        lengths[odd, 1:-1] = np.diff(whole.offsets).reshape(-1, fields)[which]

        room = self.tokenizer.limit - lengths[:, [0, -1]].sum(1, keepdims=True)
        body = lengths[:, 1:-1]
        lengths[:, 1:-1] = np.clip(room - (body.cumsum(1) - body), 0, body)
        places = spans(starts.ravel(), lengths.ravel())
        values = self.pieces.values[np.minimum(places, held - 1)]
        from_whole = places >= held
        values[from_whole] = whole.values[places[from_whole] - held]
        numbers = np.tile(np.array([SPECIAL, *range(fields), SPECIAL], np.int16), rows)
        return RowTokens(Ragged(values, offsets_of(lengths.sum(1))), np.repeat(numbers, lengths.ravel()))

    def _whole(self, codes: np.ndarray) -> Ragged:
        """Rows that are tokenised whole -> the tokens of each of their fields, a row of [n, fields] after the other."""
        values, counts = [np.zeros(0, np.int32)], np.zeros(codes.shape, np.int64)
        for start in range(0, len(codes), CHUNK):
            own, chunk = self.tokenizer.uncut, codes[start : start + CHUNK]
            said = [
                [(field, self.texts[field][code].as_py()) for field, code in enumerate(row) if code >= 0]
                for row in chunk.tolist()
            ]
            found = own.encode_batch([" ".join(text for _, text in row) for row in said], add_special_tokens=False)
            for row, (parts, encoding) in enumerate(zip(said, found, strict=True), start):
                if encoding.ids:
                    ends = np.cumsum([len(text) + 1 for _, text in parts])  # a space is its next part's
                    last = np.maximum.accumulate([stop - 1 for _, stop in encoding.offsets])
                    part = np.searchsorted(ends - 1, last, side="right")
                    np.add.at(counts[row], np.array([field for field, _ in parts])[part], 1)
                    values.append(np.array(encoding.ids, np.int32))
        return Ragged(np.concatenate(values), offsets_of(counts.ravel()))


def _body(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding]:
    return tokenizer.encode_batch_fast(texts, add_special_tokens=False)


def _cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether no token may reach over a single space between two words, by the tokenizer's own first cut."""
    text = "it. is, (so) 7 é' ー s"
    if tokenizer.pre_tokenizer is None:
        return False
    read = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    starts = {start for _, (start, _) in tokenizer.pre_tokenizer.pre_tokenize_str(read)}
    return all({at, at + 1} & starts for at, character in enumerate(read) if character in " ▁")


def _starts_and_ends(ids: list[int], left: list[int], right: list[int]) -> bool:
    return len(ids) >= len(left) + len(right) and ids[: len(left)] == left and ids[-len(right) :] == right
