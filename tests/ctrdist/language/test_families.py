import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from ctrdist.errors import UserError
from ctrdist.language.model import POOLINGS, LanguageModel, check_model, draws_head
from ctrdist.language.tokens import TokenBatch, tokenize

ENCODERS = {"bert": "cls", "minilm": "mean", "roberta": "cls", "deberta-v2": "cls", "modernbert": "mean"}
DECODERS = {"gpt2": "last", "opt": "last", "opt-projected": "last", "qwen2": "last"}
FAMILIES = ENCODERS | DECODERS | {"bart": "last"}
LAST_LAYER_ONLY = {"opt-projected": r" .*\(8\) .*\(16\)", "bart": r" .*two stacks"}
TEXTS = ["red dog and the sea", "war", "a long sad film about love and the old house", "cat"]


def tokens(model: LanguageModel, texts: list[str] = TEXTS) -> TokenBatch:
    return tokenize(model.tokenizer, texts, range(len(texts)), max_length=10**6)


@pytest.fixture(params=FAMILIES)
def family(request, lm_family) -> tuple[str, Path]:
    return request.param, lm_family(request.param)


def alone(folder: Path, texts: list[str] = TEXTS):
    """Of each text without padding, by Hugging Face's own classes: all layers' states and the logits of every word."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loader = AutoModelForCausalLM if folder.name in DECODERS else AutoModelForMaskedLM
    model = loader.from_pretrained(folder).eval()
    for text in texts:
        with torch.no_grad():
            out = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True)
        layers = out.decoder_hidden_states if folder.name == "bart" else out.hidden_states
        yield [states[0] for states in layers], out.logits[0]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_states_vectors_and_logits_are_hugging_faces_own(family):
    name, folder = family
    for pooling in POOLINGS:
        if name in LAST_LAYER_ONLY and pooling in ("first-last", "top-2"):
            with pytest.raises(UserError, match=f"pooling: not '{pooling}'" + LAST_LAYER_ONLY[name]):
                LanguageModel.load(str(folder), pooling)
            continue
        model = LanguageModel.load(str(folder), pooling, head=True).eval()
        batch = tokens(model)
        with torch.no_grad():
            last, states = model.states(batch.input_ids, batch.attention_mask)
            vectors = model(batch.input_ids, batch.attention_mask)
            bare = LanguageModel.load(str(folder), pooling).eval()(batch.input_ids, batch.attention_mask)
        assert vectors.shape == (len(TEXTS), model.width) and torch.equal(vectors, bare)
        assert model.is_decoder == (name in DECODERS) and model.has_head and not model.drawn
        for row, (layers, logits) in enumerate(alone(folder)):
            length = len(layers[-1])
            assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
            pooled = {
                "cls": lambda x: x[-1][0],
                "mean": lambda x: x[-1].mean(0),
                "last": lambda x: x[-1][-1],
                "first-last": lambda x: ((x[1] + x[-1]) / 2).mean(0),
                "top-2": lambda x: ((x[-2] + x[-1]) / 2).mean(0),
            }[pooling](layers)
            close(last[row, :length], layers[-1])
            close(vectors[row], pooled)
            close(model.token_logits(last[row, :length]), logits)


def test_the_default_pooling_is_the_familys(family):
    name, folder = family
    assert LanguageModel.load(str(folder)).pooling == FAMILIES[name]


def test_a_text_that_is_too_long_is_cut_to_what_the_model_reads(family):
    model = LanguageModel.load(str(family[1])).eval()
    batch = tokens(model, [" ".join(TEXTS * 5), "war"])
    assert batch.input_ids.shape == (2, 24)
    assert model(batch.input_ids, batch.attention_mask).isfinite().all()


@pytest.mark.parametrize("pooling", ["auto", "top-2"])
def test_every_named_parameter_gets_a_gradient(family, pooling: str):
    name, folder = family
    if name in LAST_LAYER_ONLY and pooling == "top-2":
        return
    model = LanguageModel.load(str(folder), pooling, head=True)
    batch = tokens(model)
    for rows in (4, 0):
        model.zero_grad()
        mask = batch.attention_mask[:rows]
        last, states = model.states(batch.input_ids[:rows], mask)
        vectors = model.pool(states, mask)
        assert vectors.shape == (rows, model.width)
        logits = model.token_logits(last.flatten(0, 1))
        assert logits.shape == (rows * batch.input_ids.shape[1], model.vocabulary_size)
        (vectors.square().sum() + logits.square().sum()).backward()
        named = [p for group in model.parameter_groups(1e-3, 0.1) for p in group["params"]]
        assert sorted(id(p) for p in named) == sorted(id(p) for p in model.parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in named)
        assert any(p.grad.any() for p in named) == bool(rows)


def test_saved_and_loaded_alike(family, tmp_path: Path):
    name, folder = family
    for pooling in ("auto", "mean", "first-last", "top-2"):
        if name in LAST_LAYER_ONLY and pooling in ("first-last", "top-2"):
            continue
        model, saved = LanguageModel.load(str(folder), pooling, head=True).eval(), tmp_path / pooling
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        model.save(saved)
        again = LanguageModel.load(str(saved), head=True).eval()
        assert again.pooling == model.pooling and again.fingerprint() == model.fingerprint()
        assert not again.drawn and not draws_head(str(saved))
        batch = tokens(model)
        assert torch.equal(tokens(again).input_ids, batch.input_ids)
        inputs = batch.input_ids, batch.attention_mask
        assert torch.equal(model(*inputs), again(*inputs))
        # sentence-transformers would pool as its file says: there is one only where it can say what we do.
        path = saved / "1_Pooling" / "config.json"
        assert path.exists() == (saved / "modules.json").exists() == (pooling not in ("first-last", "top-2"))
        if path.exists():
            content = json.loads(path.read_text())
            modes = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
            assert [key for key, on in content.items() if on is True] == [f"pooling_mode_{modes[model.pooling]}"]


@pytest.mark.parametrize("family", ["roberta", "deberta-v2", "modernbert", "qwen2"])
def test_a_head_that_the_checkpoint_lacks_is_drawn(lm_family, tmp_path: Path, family: str):
    LanguageModel.load(str(lm_family(family))).save(tmp_path)
    check_model(str(tmp_path), head=True)
    assert draws_head(str(tmp_path)) and not draws_head(str(lm_family(family)))
    model = LanguageModel.load(str(tmp_path), head=True)
    base = {id(p) for p in model.base.parameters()}
    assert model.drawn == {name for name, p in model.model.named_parameters() if id(p) not in base}
    rates = {id(p): g["lr"] for g in model.parameter_groups(1e-6, 0.1, drawn_lr=1e-3) for p in g["params"]}
    assert all(rate == (1e-6 if key in base else 1e-3) for key, rate in rates.items()) and len(rates) > len(base)


def test_a_tied_head_is_never_lacking(lm_family, tmp_path: Path):
    LanguageModel.load(str(lm_family("gpt2"))).save(tmp_path)
    assert not draws_head(str(tmp_path)) and not LanguageModel.load(str(tmp_path), head=True).drawn


def test_gradient_checkpointing_changes_no_gradient(family):
    gradients = []
    for checkpointing in (False, True):
        model = LanguageModel.load(str(family[1]), "mean")
        if checkpointing:
            model.checkpoint_layers()
            seen = count_layer_calls(model)
        batch = tokens(model)
        torch.manual_seed(0)  # of dropout
        model(batch.input_ids, batch.attention_mask).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert sum(count == 2 for count in seen.values()) >= 3  # one a layer at least, up to where it needs no more
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def count_layer_calls(model: LanguageModel) -> dict[str, int]:
    """How often each layer's normalisations are computed from now on: twice in a step, if layers are checkpointed."""
    seen: dict[str, int] = {}
    for name, module in model.base.named_modules():
        inside = any(part.isdigit() for part in name.split("."))
        if inside and "norm" in type(module).__name__.lower():
            module.register_forward_hook(lambda *_, name=name: seen.update({name: seen.get(name, 0) + 1}))
    return seen
