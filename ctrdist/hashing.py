"""A 64-bit hash of each text of a column, the same in every process and on every machine; no Python string is made."""

import numpy as np
import pyarrow as pa

MULTIPLIERS = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)
_SEED, _STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0x52DCE729)
_WORD = 8
"""Bytes that are mixed in at a time."""


def text_hashes(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A hash of the UTF-8 bytes of each text, uint64 [n]: MurmurHash3's mixing, of eight bytes of all texts at a time.

    Args:
        texts: strings or binary without nulls, [n].
    """
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    texts = texts.cast(pa.large_binary())
    if not len(texts):
        return np.empty(0, np.uint64)
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    words = np.lib.stride_tricks.sliding_window_view(np.append(content, np.zeros(_WORD, np.uint8)), _WORD)
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    order = np.argsort(-lengths, kind="stable")  # the longest first: who still has bytes at a place come first
    starts, left = starts[order], lengths[order]
    hashes = _SEED ^ left.astype(np.uint64)
    while (active := int(np.searchsorted(-left, 0))) > 0:
        starts, left = starts[:active], left[:active]
        word = np.ascontiguousarray(words[starts]).view("<u8").ravel().astype(np.uint64)
        beyond = (_WORD - left).clip(0).astype(np.uint64) * np.uint64(8)
        hashes[:active] = _mixed_in(hashes[:active], word << beyond)
        starts, left = starts + _WORD, left - _WORD
    out = np.empty_like(hashes)
    out[order] = _finished(hashes)
    return out


def _mixed_in(hashes: np.ndarray, word: np.ndarray) -> np.ndarray:
    """The hashes after one more word each."""
    first, second = MULTIPLIERS
    return _rotated(hashes ^ (_rotated(word * first, 31) * second), 27) * np.uint64(5) + _STEP


def _rotated(values: np.ndarray, bits: int) -> np.ndarray:
    return (values << np.uint64(bits)) | (values >> np.uint64(64 - bits))


def _finished(hashes: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on all of a hash's."""
    for multiplier in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * multiplier
    return hashes ^ (hashes >> np.uint64(33))
