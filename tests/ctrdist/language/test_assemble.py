import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ctrdist.errors import UserError
from ctrdist.interaction_text import TextConfig
from ctrdist.language import source
from ctrdist.language.assemble import SPECIAL, RowTokenizer, say
from ctrdist.language.model import load_tokenizer
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.schema import Field
from tests.conftest import WORDS, build_tokenizer

CORPUS = ["user is u1. genres is war, love. title is A Long Sad Film (1999). it's so it is. " + " ".join(WORDS)] * 3


def byte_pairs(kind: str, prefix_space: bool = False):
    """GPT-2's or RoBERTa's."""
    from tokenizers import pre_tokenizers

    made = build_tokenizer(kind)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    return made


def qwen():
    """Byte-level pairs after NFC and a pattern of their own, as Qwen2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.decoder = decoders.ByteLevel()
    pattern = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])
    marks = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=bytes_.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, marks)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")


def unigram(split: bool = True):
    """SentencePiece's, as XLM-R's; without `split` a token may hold several words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=split)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def llama():
    """Pairs over the whole text, spaces included, as Llama 2's: no cut at all."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")


def swallowing():
    """Byte-level pairs with a mask that takes the space before it, and a mark that takes the one after it."""
    from tokenizers import AddedToken

    made = byte_pairs("roberta")
    made.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    made.add_tokens([AddedToken("<br>", rstrip=True)])
    return made


def word_pieces():
    """BERT's: letters, lower case without accents, and the words."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'()<>={}"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters), *WORDS]
    return BertTokenizer(vocab={token: row for row, token in enumerate(dict.fromkeys(tokens))})


MAKERS = {
    "word pieces": word_pieces,
    "gpt2": lambda: byte_pairs("gpt2"),
    "roberta": lambda: byte_pairs("roberta"),
    "prefix space": lambda: byte_pairs("roberta", prefix_space=True),
    "opt": lambda: byte_pairs("opt"),
    "qwen": qwen,
    "unigram": unigram,
    "swallowing": swallowing,
    "several words": lambda: unigram(split=False),
    "llama": llama,
}
CUT = ["several words", "llama"]
"""Those that do not cut at spaces."""


@pytest.fixture(scope="module", params=MAKERS)
def kind(request):
    made = MAKERS[request.param]()
    made.model_max_length = 64
    return request.param, made


PLAIN = ["", " ", "u1", "war, love", "It's", "7", "é", "e\u0301", "\u0301", "日本", "ー", "a  b", "'s"]
ODD = ["<mask>", "<br>", "a <br>", "<mask> b", "[SEP]", "</s>", "▁", "a\u00a0b", "\u0085", "x\n", "\t y", "\x00"]
VALUES = st.one_of(st.none(), st.sampled_from(PLAIN), st.sampled_from(ODD), st.text(max_size=12))
TEMPLATES = ["{field} is {value}.", "{value}", "<{field}={{{value}}}>"]


def sentences(columns: list[list[str | None]], parts: list[str], names: list[str]) -> list[str]:
    """By Python: what is said of each row, without a value that says nothing."""
    out = []
    for row in zip(*columns, strict=True):
        said = [
            pa.compute.utf8_trim_whitespace(pa.scalar(part.format(**{name: text}))).as_py()
            for value, part, name in zip(row, parts, names, strict=True)
            if value is not None and (text := pa.compute.utf8_trim_whitespace(pa.scalar(value)).as_py())
        ]
        out.append(" ".join(text for text in said if text))
    return out


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=5),
    template=st.sampled_from(TEMPLATES),
    limit=st.sampled_from([5, 12, 64]),
)
def test_rows_are_the_tokens_of_their_sentences(kind, rows, template, limit):
    name, tokenizer = kind
    names, columns = ["user id", "genres", "title"], [list(column) for column in zip(*rows, strict=True)]
    parts = TextConfig(template=template).parts(tuple(Field(one) for one in names))
    said = [
        say(pa.array(column, pa.string()).dictionary_encode(), part, one)
        for column, part, one in zip(columns, parts, names, strict=True)
    ]
    assembler = RowTokenizer.of(TextTokenizer.of(tokenizer, limit), [texts for texts, _ in said])
    found = assembler(np.stack([codes for _, codes in said], 1))
    expected = tokenizer(sentences(columns, parts, names), truncation=True, max_length=limit)["input_ids"]
    assert [part.tolist() for part in np.split(found.tokens.values, found.tokens.offsets[1:-1])] == expected
    assert found.tokens.values.dtype == np.int32 and found.fields.dtype == np.int16
    for row, fields in enumerate(np.split(found.fields, found.tokens.offsets[1:-1])):
        body = fields[fields != SPECIAL]
        assert (np.diff(body) >= 0).all() and all(said[field][1][row] >= 0 for field in body)
    if name in CUT:
        assert not assembler.clean[3:].any()


def test_rows_of_the_default_language_model():
    tokenizer, names = load_tokenizer(source.DEFAULT), ["user_id", "genres", "title"]
    parts = TextConfig().parts(tuple(Field(name) for name in names))
    columns = [["u1", "u2", "Ü 3"], ["war, love", None, "Amélie"], [None, "The Old Sea (1999)", "日本 <b>"]]
    said = [say(pa.array(c), part, name) for c, part, name in zip(columns, parts, names, strict=True)]
    found = RowTokenizer.of(TextTokenizer.of(tokenizer, 16), [texts for texts, _ in said])(
        np.stack([codes for _, codes in said], 1)
    )
    expected = tokenizer(sentences(columns, parts, names), truncation=True, max_length=16)["input_ids"]
    assert [part.tolist() for part in np.split(found.tokens.values, found.tokens.offsets[1:-1])] == expected


def test_clean_values_are_those_that_leave_their_neighbours_alone(kind):
    name, tokenizer = kind
    texts = pa.array(["title is Old Sea.", "war", "é, 日本 (7)", "<br>", "a <mask>"], pa.large_string())
    clean = RowTokenizer.of(TextTokenizer.of(tokenizer, 64), [texts]).clean[3:]
    swallows = name == "swallowing"
    assert clean.tolist() == 2 * ([False] * 5 if name in CUT else [True, True, True, not swallows, True])


def test_each_token_has_the_field_that_it_came_from(kind):
    name, tokenizer = kind
    texts = [pa.array([text], pa.large_string()) for text in ("user is u1.", "genres is war, love.", "title is sea.")]
    assembler = RowTokenizer.of(TextTokenizer.of(tokenizer, 64), texts)
    codes = np.array([[0, 0, 0], [-1, 0, 0], [0, -1, 0], [-1, -1, 0], [-1, -1, -1]])
    found = assembler(codes)
    for row, fields in enumerate(np.split(found.fields, found.tokens.offsets[1:-1])):
        values = found.tokens.values[found.tokens.offsets[row] : found.tokens.offsets[row + 1]]
        for field in range(3):
            text = tokenizer.decode(values[fields == field]).replace("▁", " ")
            said = texts[field][0].as_py() if codes[row, field] == 0 else ""
            assert text.replace(" ", "").lower() == said.replace(" ", "").lower() or name in CUT
        assert (fields == SPECIAL).sum() == tokenizer.num_special_tokens_to_add()
    assert len(assembler(codes[:0]).tokens.offsets) == 1


def test_the_same_texts_whole_and_from_pieces_have_the_same_fields():
    tokenizer = MAKERS["word pieces"]()
    texts = [pa.array([f"{field} is {n}, a b." for n in range(9)], pa.large_string()) for field in ("u", "v", "w")]
    assembler = RowTokenizer.of(TextTokenizer.of(tokenizer, 20), texts)
    codes = np.random.default_rng(0).integers(-1, 9, (50, 3))
    clean = np.arange(len(assembler.clean)) < 3
    whole = RowTokenizer(assembler.tokenizer, assembler.texts, assembler.pieces, clean)
    one, other = assembler(codes), whole(codes)
    assert (one.tokens.values == other.tokens.values).all() and (one.tokens.offsets == other.tokens.offsets).all()
    assert (one.fields == other.fields).all()


def test_every_value_is_said_once_and_looked_up_by_rows():
    column = pa.chunked_array([["war", None, "sea"], ["war", " ", "sea "]]).dictionary_encode()
    texts, codes = say(column, "genres is {genres}.", "genres")
    assert texts.to_pylist() == ["genres is war.", "genres is sea.", ""] and codes.tolist() == [0, -1, 1, 0, -1, 1]
    assert say(column.cast(pa.string()), "genres is {genres}.", "genres")[1].tolist() == [0, -1, 2, 0, -1, 2]
    lists = pa.array([["war", None], [], None, ["war", "love"], ["war"]], pa.list_(pa.string()))
    texts, codes = say(lists, "<{g}>", "g")
    assert [texts[int(code)].as_py() if code >= 0 else None for code in codes] == [
        "<war>", None, None, "<war, love>", "<war>",
    ]  # fmt: skip
    texts, codes = say(pa.array([3, None, 3, 5]), "{n}", "n")
    assert texts.to_pylist() == ["3", "", "5"] and codes.tolist() == [0, -1, 0, 2]


def test_a_tokenizer_without_its_file_is_refused():
    class Slow:
        pass

    tokenizer = TextTokenizer(Slow(), 8, 0)
    with pytest.raises(UserError, match=r"tokenizer \(Slow\) has no tokenizer.json"):
        RowTokenizer.of(tokenizer, [])
