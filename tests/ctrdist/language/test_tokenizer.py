import pickle
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ctrdist.errors import UserError
from ctrdist.items import Ragged
from ctrdist.language.model import load_tokenizer
from ctrdist.language.tokenizer import (
    StoredTokens,
    TextTokenizer,
    token_ids,
    tokens_from_arrow,
    tokens_to_arrow,
)

TEXTS = ["red dog", "", "a long sad film about love, " * 9, "unheard-of things", "the sea."]


def lists(tokens: Ragged) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.values, tokens.offsets[1:-1])]


def byte_pairs(folder) -> str:
    """A byte-level tokenizer of GPT-2's kind, trained on the texts; it has no padding token and adds none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", model_max_length=64).save_pretrained(folder)
    from transformers import GPT2Config

    GPT2Config(vocab_size=300, n_positions=32).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["word pieces", "byte pairs"])
@pytest.mark.parametrize("max_length", [6, 512])
def test_tokens_are_those_of_hugging_face(tiny_lm, tmp_path, family, max_length):
    folder = str(tiny_lm) if family == "word pieces" else byte_pairs(tmp_path)
    tokenizer, plain = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    quick = TextTokenizer.of(tokenizer, max_length)
    expected = [plain(text)["input_ids"] for text in TEXTS]
    found = lists(quick(TEXTS))
    assert found == lists(token_ids(tokenizer, TEXTS, max_length))
    for one, whole in zip(found, expected, strict=True):
        assert len(one) == min(len(whole), max_length, 32)
        if len(one) == len(whole):
            assert one == whole
    slow = replace(quick, content=tokenizer)  # one that the library `tokenizers` does not know
    assert lists(slow(TEXTS)) == found and slow.fingerprint != quick.fingerprint
    assert quick([]).offsets.tolist() == [0] and quick([]).values.dtype == np.int32


@pytest.mark.parametrize("family", ["word pieces", "byte pairs"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 40])
def test_a_text_is_shortened_to_whole_words_of_so_many_tokens(tiny_lm, tmp_path, family, count):
    """Against the longest beginning of whole words that Hugging Face makes so many tokens of."""
    folder = str(tiny_lm) if family == "word pieces" else byte_pairs(tmp_path)
    tokenizer = load_tokenizer(folder)
    length = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
    texts = [*TEXTS, "été, the  sea (war) : film"]
    found = TextTokenizer.of(tokenizer, 6).shorten(texts, count)  # the limit of whole texts has no part in it
    for text, short in zip(texts, found, strict=True):
        ends = [match.end() for match in re.finditer(r"\w+|[^\w\s]", text)]
        fitting = [text[:end] for end in ends if length(text[:end]) <= count]
        assert text.startswith(short) and length(short) <= count
        if length(text) <= count:
            assert short == text
        elif fitting:
            assert short == fitting[-1]
        else:  # no part that is longer would do
            assert len(short) < ends[0] and length(text[: len(short) + 1]) > count
    slow = replace(TextTokenizer.of(tokenizer, 6), content=tokenizer)
    with pytest.raises(UserError, match="has no tokenizer.json"):
        slow.shorten(texts, count)


def test_a_fingerprint_changes_with_length_and_vocabulary_only(tiny_lm, tmp_path):
    tokenizer = load_tokenizer(str(tiny_lm))
    before = TextTokenizer.of(tokenizer, 16)
    tokenizer(TEXTS, truncation=True, padding=True, max_length=8)
    same, again = TextTokenizer.of(tokenizer, 16), pickle.loads(pickle.dumps(before))
    assert before.fingerprint == same.fingerprint == again.fingerprint and lists(again(TEXTS)) == lists(before(TEXTS))
    others = [TextTokenizer.of(tokenizer, 17), TextTokenizer.of(load_tokenizer(byte_pairs(tmp_path)), 16)]
    assert len({before.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_stored_tokens_are_taken_by_row(tiny_lm, tmp_path):
    tokenizer, rows = TextTokenizer.of(load_tokenizer(str(tiny_lm)), 16), np.array([2, 3, 7, 8, 20])
    StoredTokens.write(tmp_path, rows, (tokenizer(part) for part in (TEXTS[:2], [], TEXTS[2:])), tokenizer.padding)
    stored = StoredTokens.load(tmp_path)
    assert stored.padding == tokenizer.padding and isinstance(stored.tokens.values, np.memmap)
    every = lists(tokenizer(TEXTS))
    assert lists(stored.take(np.array([20, 2, 7, 2]))) == [every[4], every[0], every[2], every[0]]
    with pytest.raises(AssertionError):
        stored.take(np.array([4]))


def test_arrow_keeps_hashes_and_tokens(tiny_lm):
    tokens = TextTokenizer.of(load_tokenizer(str(tiny_lm)), 16)(TEXTS)
    hashes = np.array([1, 2**64 - 1, 3, 4, 5], np.uint64)
    table = tokens_to_arrow(hashes, tokens)
    found, same = tokens_from_arrow(table)
    assert found.tolist() == hashes.tolist() and lists(same) == lists(tokens)
    found, part = tokens_from_arrow(table.slice(1, 3))
    assert found.tolist() == hashes[1:4].tolist() and lists(part) == lists(tokens)[1:4]
    none, empty = tokens_from_arrow(table.slice(0, 0))
    assert len(none) == 0 and empty.offsets.tolist() == [0]


def test_it_needs_neither_torch_nor_transformers():
    code = "import sys, raycluster.tokens; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
