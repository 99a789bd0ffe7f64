import pytest
import torch

from ctrdist.backbones.base import Inputs, Shape
from ctrdist.backbones.fm import FM, Config


def test_logit_pair_by_pair(by_hand):
    model = FM(by_hand.shape, Config()).double()
    torch.nn.init.constant_(model.bias, 0.75)
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    logits = model.head(representation) + direct
    assert representation.shape == (4, 2) and auxiliary == {}
    for b in by_hand.rows:
        assert representation[b].tolist() == pytest.approx(by_hand.pairs(b), rel=1e-12)
        assert direct[b].item() == pytest.approx(0.75 + by_hand.linear(b), rel=1e-12)
        fields = by_hand.fields(b)
        dots = [
            sum(p * q for p, q in zip(fields[i], fields[j], strict=True))
            for i in range(len(fields))
            for j in range(len(fields))
            if i < j
        ]
        assert len(dots) == 6
        assert logits[b].item() == pytest.approx(0.75 + by_hand.linear(b) + sum(dots), rel=1e-12)


def test_one_field_alone_has_no_pairs():
    model, vectors = FM(Shape(1, 0, 3), Config()).double(), torch.randn(5, 1, 3, dtype=torch.float64)
    weights = torch.randn(5, 1, dtype=torch.float64)
    inputs = Inputs(vectors, vectors.new_zeros(5, 0, 0, 3), torch.zeros(5, 0).bool(), (), weights)
    representation, direct, _ = model.represent(inputs)
    assert representation.abs().max() < 1e-15 and torch.equal(direct, weights[:, 0])
