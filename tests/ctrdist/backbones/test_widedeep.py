import pytest
import torch

from ctrdist.backbones.widedeep import Config, WideDeep


def test_logit_is_the_wide_sum_and_the_deep_network(by_hand):
    torch.manual_seed(0)
    model = WideDeep(by_hand.shape, Config(hidden=(6, 4))).double().eval()
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    logits = model.head(representation) + direct
    assert auxiliary == {}
    for b in by_hand.rows:
        deep = by_hand.deep(model.mlp, by_hand.joined(b))
        assert representation[b].tolist() == pytest.approx(deep, rel=1e-10, abs=1e-14)
        assert direct[b].item() == pytest.approx(by_hand.linear(b), rel=1e-12)
        assert logits[b].item() == pytest.approx(by_hand.linear(b) + by_hand.output(model.output, deep), rel=1e-10)
