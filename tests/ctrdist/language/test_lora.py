from pathlib import Path

import pytest
import torch

from ctrdist.errors import UserError
from ctrdist.language.lora import ADAPTER, LoraConfig
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import tokenize

ALWAYS = LoraConfig(use="always", rank=2, alpha=8, dropout=0.0)


def adapted(folder: Path, config: LoraConfig = ALWAYS, **options) -> LanguageModel:
    """With adapters that do something, as after training."""
    torch.manual_seed(0)
    model = LanguageModel.load(str(folder), **options)
    model.adapt(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3)
    return model


def vectors(model: LanguageModel) -> torch.Tensor:
    batch = tokenize(model.tokenizer, ["red dog and the sea", "war"], range(2), 16)
    return model(batch.input_ids, batch.attention_mask)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert", "gpt2", "opt", "qwen2"])
def test_what_is_saved_is_a_plain_model_with_the_same_vectors(lm_family, tmp_path: Path, family: str):
    folder = lm_family(family)
    model = adapted(folder, head=True).eval()
    model.save(tmp_path)
    plain, before = LanguageModel.load(str(tmp_path), head=True).eval(), LanguageModel.load(str(folder), head=True)
    assert plain.state_dict().keys() == before.state_dict().keys() and not plain.drawn
    assert not list(tmp_path.glob("adapter*"))
    found, expected = vectors(plain), vectors(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - vectors(before.eval())).abs().max() > 0.01
    assert plain.fingerprint() == model.fingerprint() != before.fingerprint()
    # Adapters stay: saving changes nothing of the model that is saved.
    assert torch.equal(vectors(model), expected)


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "qwen2"])
def test_only_adapters_are_trained(lm_family, family: str):
    model = adapted(lm_family(family), head=True)
    groups = model.parameter_groups(1e-6, 0.1, drawn_lr=1e-2)
    named = {id(p): group["lr"] for group in groups for p in group["params"]}
    trained = {name for name, p in model.named_parameters() if id(p) in named}
    assert trained == {name for name, _ in model.named_parameters() if ADAPTER in name} and trained
    assert set(named.values()) == {ALWAYS.lr}
    vectors(model).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for group in groups for p in group["params"])


def test_a_drawn_head_is_trained_too(tiny_lm: Path):
    model = adapted(tiny_lm, head=True)
    rates = {id(p): g["lr"] for g in model.parameter_groups(1e-6, 0.1, drawn_lr=1e-2) for p in g["params"]}
    for name, parameter in model.model.named_parameters():
        expected = 1e-2 if name in model.drawn else ALWAYS.lr if ADAPTER in name else None
        assert rates.get(id(parameter)) == expected, name
    assert model.drawn


def test_a_new_adapter_changes_nothing(lm_family):
    plain = LanguageModel.load(str(lm_family("gpt2"))).eval()
    model = LanguageModel.load(str(lm_family("gpt2"))).eval()
    model.adapt(LoraConfig())
    assert model.lora and torch.equal(vectors(model.eval()), vectors(plain))
    assert model.fingerprint() == plain.fingerprint()


def test_adapters_are_the_default_of_decoders(lm_family):
    for family, use, expected in [("gpt2", "auto", True), ("bert", "auto", False), ("bert", "always", True),
                                  ("gpt2", "never", False)]:  # fmt: skip
        model = LanguageModel.load(str(lm_family(family)))
        model.adapt(LoraConfig(use=use))
        assert (model.lora is not None) == any(ADAPTER in name for name, _ in model.named_parameters()) == expected


def test_targets(lm_family):
    model = adapted(lm_family("qwen2"), LoraConfig(targets=("down_proj",)))
    names = {name.split(ADAPTER)[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ADAPTER in name}
    assert names == {"down_proj"}
    with pytest.raises(UserError, match="lm.lora.targets: qwen2 .*'query'.*down_proj, gate_proj"):
        adapted(lm_family("qwen2"), LoraConfig(targets=("query",)))
    for wrong in ({"rank": 0}, {"dropout": 1.0}):
        with pytest.raises(UserError, match=f"lm.lora.{next(iter(wrong))}"):
            LoraConfig(**wrong)
