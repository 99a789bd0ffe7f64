import pytest
import torch

from ctrdist.backbones.dnn import DNN, Config


@pytest.mark.parametrize("hidden", [(5,), (6, 4, 3), ()])
def test_logit_unit_by_unit(by_hand, hidden: tuple[int, ...]):
    torch.manual_seed(0)
    model = DNN(by_hand.shape, Config(hidden=hidden)).double().eval()
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    assert not direct.any() and auxiliary == {} and not model.first_order
    for b in by_hand.rows:
        expected = by_hand.deep(model.mlp, by_hand.joined(b))
        assert len(expected) == (hidden[-1] if hidden else 8) == model.width
        assert representation[b].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-14)
        logit = by_hand.output(model.output, expected)
        assert model.head(representation)[b].item() == pytest.approx(logit, rel=1e-10)
