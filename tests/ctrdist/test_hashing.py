"""Hashes of texts: by a plain computation of one text at a time, without collisions, wherever a column is cut."""

import numpy as np
import pyarrow as pa

from ctrdist.hashing import text_hashes

TEXTS = ["", "a", "b", "ab", "ba", "a\0", "\0", "\0\0", "eight by", "eight byt", "été", "x" * 1000, "x" * 1001]
ONES = 2**64 - 1


def by_hand(text: str) -> int:
    """MurmurHash3's mixing of one text, in whole numbers; the last word's bytes stand at its upper end."""
    content = text.encode()

    def rotated(value: int, bits: int) -> int:
        return (value << bits | value >> 64 - bits) & ONES

    found = 0x9E3779B97F4A7C15 ^ len(content)
    for start in range(0, len(content), 8):
        part = content[start : start + 8]
        word = int.from_bytes(part, "little") << 8 * (8 - len(part))
        found ^= rotated(word * 0x87C37B91114253D5 & ONES, 31) * 0x4CF5AD432745937F & ONES
        found = (rotated(found, 27) * 5 + 0x52DCE729) & ONES
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        found = (found ^ found >> 33) * multiplier & ONES
    return found ^ found >> 33


def test_each_texts_hash_is_that_of_the_text_alone():
    assert text_hashes(pa.array(TEXTS)).tolist() == [by_hand(text) for text in TEXTS]
    assert len(set(map(by_hand, TEXTS))) == len(TEXTS)
    for type_ in (pa.large_string(), pa.binary()):
        assert text_hashes(pa.array(TEXTS).cast(type_)).tolist() == [by_hand(text) for text in TEXTS]
    assert text_hashes(pa.array(TEXTS).slice(3, 5)).tolist() == [by_hand(text) for text in TEXTS[3:8]]
    assert text_hashes(pa.chunked_array([TEXTS[:4], TEXTS[4:]])).tolist() == [by_hand(text) for text in TEXTS]
    assert text_hashes(pa.array([], pa.string())).dtype == np.uint64


def test_texts_that_are_nearly_alike_hash_apart_and_evenly():
    """Half a million texts: no two alike, and every bit is set in half of them."""
    texts = [f"user_id is {n}." for n in range(300_000)] + [f"{n}" for n in range(100_000)]
    texts += [f"item {n} {'y' * (n % 50)}" for n in range(100_000)]
    found = text_hashes(pa.array(texts))
    assert len(np.unique(found)) == len(texts)
    bits = np.array([((found >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert np.abs(bits - 0.5).max() < 0.005
