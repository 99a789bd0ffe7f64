import pytest
import torch
from torch import nn

from ctrdist import dropout
from ctrdist.language import attention
from ctrdist.language.attention import attend
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import tokenize


class Causal(nn.Module):
    is_causal = True
    num_key_value_groups = 2


class Bidirectional(nn.Module):
    is_causal = False
    num_key_value_groups = 2


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))
    return [x.requires_grad_() for x in (query, key, value)]


def by_hand(query, key, value, seen, scaling):
    """Of each text, head and token alone."""
    out = torch.zeros(3, 5, 4, 8, dtype=torch.float64)
    for b in range(3):
        for h in range(4):
            for t in range(5):
                where = seen[b, t].nonzero().flatten()
                weights = torch.softmax(key[b, h // 2, where] @ query[b, h, t] * scaling, 0)
                out[b, t, h] = weights @ value[b, h // 2, where]
    return out


@pytest.mark.parametrize(("module", "masked"), [(Causal(), False), (Bidirectional(), False), (Bidirectional(), True)])
def test_attention_by_hand_where_hardly_anything_is_dropped(inputs, module, masked, monkeypatch):
    query, key, value = inputs
    seen = torch.ones(3, 5, 5, dtype=torch.bool)
    if module.is_causal:
        seen = seen.tril()
    if masked:
        seen[1, :, 3:] = False
    expected = by_hand(query, key, value, seen, 0.3)
    monkeypatch.setattr(attention, "drop", lambda weights, p: weights)
    mask = seen[:, None] if masked else None
    found, _ = attend(module, query, key, value, mask, dropout=0.1, scaling=0.3)
    torch.testing.assert_close(found, expected)
    monkeypatch.undo()
    plain, _ = attend(module, query, key, value, mask, dropout=0.0, scaling=0.3)  # PyTorch's own
    torch.testing.assert_close(found, plain)
    gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in (found, expected)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_weights_are_dropped_and_the_mean_stays(inputs):
    query, key, value = (x.detach() for x in inputs)
    plain, _ = attend(Bidirectional(), query, key, value, None)
    many = [x.repeat(4000, 1, 1, 1) for x in (query, key, value)]
    dropped = attend(Bidirectional(), *many, None, dropout=0.2)[0].unflatten(0, (4000, 3))
    assert len(dropped.unique(dim=0)) > 3900
    spread = dropped.std(0) / 4000**0.5
    assert ((dropped.mean(0) - plain).abs() < 5 * spread).all()


ATTENDS = {"minilm": 3, "roberta": 3, "gpt2": 3, "bart": 0, "qwen2": 0, "opt": 0, "modernbert": 0, "deberta-v2": 0}
"""How often each family attends with dropout; the others have none by default, or an attention of their own."""


@pytest.mark.parametrize("name", ATTENDS)
def test_a_family_in_training_is_what_it_is_in_evaluation_but_for_what_is_dropped(lm_family, name, monkeypatch):
    model = LanguageModel.load(str(lm_family(name)))
    batch = tokenize(model.tokenizer, ["red dog and the sea", "war"], range(2), 64)
    attended = []
    monkeypatch.setattr(dropout, "drop", lambda x, p: x)
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p=0.5, training=True, inplace=False: x)
    monkeypatch.setattr(attention, "drop", lambda weights, p: attended.append(p) or weights)
    states = model.train().states(batch.input_ids, batch.attention_mask)[0]
    expected = model.eval().states(batch.input_ids, batch.attention_mask)[0]
    real = batch.attention_mask.bool()
    torch.testing.assert_close(states[real], expected[real], rtol=1e-4, atol=1e-5)
    assert len(attended) == ATTENDS[name] and set(attended) <= {0.1}
