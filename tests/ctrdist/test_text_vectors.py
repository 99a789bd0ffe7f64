import numpy as np

from ctrdist import text_vectors
from ctrdist.text_vectors import TextVectors


def vectors(*numbers: int) -> np.ndarray:
    return np.array([[n, -n] for n in numbers], np.float32)


def hashes(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def test_each_text_gets_its_vector_wherever_it_lies(monkeypatch):
    monkeypatch.setattr(text_vectors, "BLOCK", 2)
    draw = np.random.default_rng(0)
    texts = draw.integers(1, 40, 100)
    known = TextVectors(texts.astype(np.uint64))
    assert known.missing.tolist() == sorted(np.unique(texts, return_index=True)[1].tolist())
    for part in np.array_split(draw.permutation(np.arange(1, 60)), 4):
        known.add(part.astype(np.uint64), vectors(*part))
    assert not len(known.missing) and known.dim == 2
    table, rows = np.zeros((120, 2), np.float32), draw.permutation(120)[:100]
    known.fill(table, rows)
    expected = np.zeros((120, 2), np.float32)
    for row, text in zip(rows, texts, strict=True):
        expected[row] = text, -text
    np.testing.assert_array_equal(table, expected)


def test_what_is_missing_and_what_an_addition_gains():
    known = TextVectors(hashes(5, 3, 5, 9))
    assert known.missing.tolist() == [0, 1, 3]
    assert known.add(hashes(0, 5, 4), vectors(0, 5, 4)) == 2
    assert known.missing.tolist() == [1, 3]
    assert known.add(hashes(5, 3), vectors(-1, 3)) == 1
    assert known.add(hashes(), vectors(1)[:0]) == 0
    assert known.add(hashes(9), vectors(9)) == 1 and not len(known.missing)
    table = np.zeros((4, 2), np.float32)
    known.fill(table, np.arange(4))
    assert table[:, 0].tolist() == [5, 3, 5, 9]  # the first vector of a text stays


def test_a_text_without_a_vector_is_an_error():
    known = TextVectors(hashes(1, 2))
    known.add(hashes(1), vectors(1))
    try:
        known.fill(np.zeros((2, 2)), np.arange(2))
    except AssertionError as error:
        assert "1 texts have no vector" in str(error)
    else:
        raise AssertionError
