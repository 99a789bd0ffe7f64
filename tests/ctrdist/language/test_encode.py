import time

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from ctrdist.errors import UserError
from ctrdist.language.encode import HASHES, VECTORS, EncodeConfig, Encoder, ShardEncoder, Source, token_batches
from ctrdist.language.tokenizer import tokens_to_arrow
from ctrdist.storage import State

DRAW = np.random.default_rng(0)
WORDS = "red blue old new long short funny sad film book story of the a and with war love dog cat".split()
TEXTS = [" ".join(DRAW.choice(WORDS, n)) for n in DRAW.integers(0, 40, 57)] + [""]


def direct(folder, max_length: int = 16) -> np.ndarray:
    """Each text alone through Hugging Face's model: the mean of its last states, float32."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return np.stack([
            model(**tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt"))
            .last_hidden_state[0].mean(0).numpy()
            for text in TEXTS
        ])  # fmt: skip


def source(tiny_lm, **options) -> Source:
    return Source(str(tiny_lm), pooling="mean", **options)


def encoder(tiny_lm, **options) -> tuple[Encoder, np.ndarray]:
    """An encoder, and the table it makes of the texts."""
    config = EncodeConfig(**{"max_length": 16, "precision": "float32", "table": "float32"} | options)
    made = Encoder(source(tiny_lm).load(), config)
    return made, made.encode(source(tiny_lm).tokenizer(config.max_length)(TEXTS))


@pytest.mark.parametrize("budget", [1, 40, 100, 2048])
def test_vectors_are_those_of_each_text_alone(tiny_lm, budget):
    _, vectors = encoder(tiny_lm, tokens_per_batch=budget)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, direct(tiny_lm), atol=2e-6)


def test_precisions_and_table_types(tiny_lm):
    expected = direct(tiny_lm)
    for precision, table, within in (
        ("float32", "float16", 2e-3), ("bfloat16", "float32", 0.05), ("float64", "float32", 2e-6)
    ):  # fmt: skip
        made, vectors = encoder(tiny_lm, precision=precision, table=table)
        assert vectors.dtype == np.dtype(table)
        assert {p.dtype for p in made.model.parameters()} == {getattr(torch, precision)}
        np.testing.assert_allclose(vectors, expected, atol=within)
        cosine = (vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.999


def test_buffers_keep_their_precision(tmp_path, tiny_lm):
    """Rotary frequencies in bfloat16 would turn far positions by much of a circle."""
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    Qwen2Model(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path)
    made = Encoder(Source(str(tmp_path)).load(), EncodeConfig(precision="bfloat16", table="float32"))
    floats = [buffer for buffer in made.model.buffers() if buffer.is_floating_point()]
    assert floats and {buffer.dtype for buffer in floats} == {torch.float32}
    assert made.encode(Source(str(tmp_path)).tokenizer(16)(TEXTS)).shape == (58, 16)


def test_no_texts_give_no_vectors(tiny_lm):
    made, _ = encoder(tiny_lm)
    assert made.encode(source(tiny_lm).tokenizer(16)([])).shape == (0, 16)


def test_vectors_that_overflow_are_an_error(tiny_lm):
    model = source(tiny_lm).load()
    with torch.no_grad():
        model.base.encoder.layer[-1].output.LayerNorm.bias.fill_(1e6)
    made = Encoder(model, EncodeConfig(precision="float32", table="float16"))
    with pytest.raises(UserError, match="not finite in float16; try --encode.table float32"):
        made.encode(source(tiny_lm).tokenizer(16)(TEXTS))


@pytest.mark.parametrize("budget", [1, 17, 128, 1000, 10**9])
def test_batches_keep_to_the_budget_and_have_each_text_once(budget):
    lengths = np.random.default_rng(budget).integers(0, 129, 500)
    batches = list(token_batches(lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    for batch in batches:
        assert len(batch) * lengths[batch].max() <= budget or len(batch) == 1
    longest = [lengths[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)
    if budget >= 1000:
        padded = sum(len(batch) * lengths[batch].max() for batch in batches[:-1])
        assert padded <= 1.2 * lengths.sum() or budget > lengths.sum()
    assert list(token_batches(lengths[:0], budget)) == []


def test_default_budgets_follow_the_device(tiny_lm):
    assert encoder(tiny_lm)[0].budget == 2048 and encoder(tiny_lm, tokens_per_batch=5)[0].budget == 5


def test_a_model_s_fingerprint(tiny_lm, tmp_path):
    config = EncodeConfig(max_length=16)
    before = source(tiny_lm).fingerprint(config)
    state = State(tmp_path)
    with state.create("lm") as folder:
        source(tiny_lm).load().save(folder)
    saved = Source("lm", state.uri)
    assert saved.fingerprint(config) == saved.fingerprint(EncodeConfig(max_length=16, tokens_per_batch=9))
    found = {before, saved.fingerprint(config), Source(str(tiny_lm), pooling="cls").fingerprint(config)}
    for other in ({"max_length": 17}, {"precision": "float32"}, {"table": "float32"}):
        found.add(source(tiny_lm).fingerprint(EncodeConfig(**{"max_length": 16} | other)))
    with state.create("lm") as folder:
        model = source(tiny_lm).load()
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-3
        model.save(folder)
    assert len(found | {saved.fingerprint(config)}) == 7


def test_a_shard_is_named_by_what_is_in_it(tiny_lm, tmp_path):
    state = State(tmp_path)
    config = EncodeConfig(max_length=16, precision="float32", table="float32")
    actor = ShardEncoder(source(tiny_lm), config, state.uri, "out.shards/model", threads=1)
    hashes, tokens = np.arange(1, 59, dtype=np.uint64), source(tiny_lm).tokenizer(16)(TEXTS)
    table = tokens_to_arrow(hashes, tokens)
    for _ in range(2):
        before = time.time()
        said = {name: value.item() for name, value in actor(table).items()}
        assert before <= said.pop("began") <= said.pop("ended") <= time.time()
    assert said == {"items": 58, "device": "cpu", "error": ""}
    assert actor(table.slice(0, 0))["items"].tolist() == [0]
    (name,) = state.names("out.shards")
    assert name.startswith("out.shards/model-")
    np.testing.assert_array_equal(np.load(state.local(name) / HASHES), hashes)
    np.testing.assert_allclose(np.load(state.local(name) / VECTORS), direct(tiny_lm), atol=2e-6)


@pytest.mark.parametrize(
    ("option", "value"), [("max_length", 0), ("tokens_per_batch", -1), ("gpu_share", 1.5), ("gpu_share", 0.0)]
)
def test_options_out_of_range(option, value):
    with pytest.raises(UserError, match=f"encode.{option}: {value}"):
        EncodeConfig(**{option: value})
