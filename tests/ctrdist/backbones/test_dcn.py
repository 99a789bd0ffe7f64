import pytest
import torch

from ctrdist.backbones.dcn import DCN, Config, VectorCross


def cross(layers: list[VectorCross], x0: list[float]) -> list[float]:
    """Equation 3, number by number: x_i <- x0_i (sum_j x_j w_j) + b_i + x_i."""
    x = x0
    for layer in layers:
        w, b = layer.w.weight[0].tolist(), layer.b.tolist()
        x = [x0[i] * sum(x[j] * w[j] for j in range(len(x))) + b[i] + x[i] for i in range(len(x))]
    return x


@pytest.mark.parametrize("cross_layers", [1, 3])
def test_logit_number_by_number(by_hand, cross_layers: int):
    torch.manual_seed(0)
    model = DCN(by_hand.shape, Config(cross_layers=cross_layers, hidden=(6, 4))).double().eval()
    for layer in model.cross:
        torch.nn.init.normal_(layer.b)
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    assert len(model.cross) == cross_layers and not direct.any() and auxiliary == {}
    for b in by_hand.rows:
        x0 = by_hand.joined(b)
        expected = cross(list(model.cross), x0) + by_hand.deep(model.mlp, x0)
        assert representation[b].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-14)
        logit = by_hand.output(model.output, expected)
        assert model.head(representation)[b].item() == pytest.approx(logit, rel=1e-10)
