import pytest
import torch

from ctrdist.backbones.xdeepfm import CIN, Config, XDeepFM
from ctrdist.errors import UserError


def pooled(cin: CIN, x0: list[list[float]]) -> list[float]:
    """Equations 6 and 7, number by number: x^k_h[f] = sum_i sum_j W^kh_ij x^(k-1)_i[f] x^0_j[f], summed over f."""
    x, out = x0, []
    for layer in cin.layers:
        maps = []
        for weights in layer.weight.tolist():
            feature_map = [0.0] * len(x0[0])
            for f in range(len(feature_map)):
                for i in range(len(x)):
                    for j in range(len(x0)):
                        feature_map[f] += weights[i * len(x0) + j] * x[i][f] * x0[j][f]
            maps.append(feature_map)
        x = maps
        out += [sum(feature_map) for feature_map in maps]
    return out


@pytest.mark.parametrize("sizes", [(3,), (5, 2), (2, 3, 4)])
def test_logit_number_by_number(by_hand, sizes: tuple[int, ...]):
    torch.manual_seed(0)
    model = XDeepFM(by_hand.shape, Config(cin=sizes, hidden=(6, 4))).double().eval()
    before = (4, *sizes[:-1])
    assert [layer.weight.shape for layer in model.cin.layers] == [
        (n, 4 * m) for m, n in zip(before, sizes, strict=True)
    ]
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    logits = model.head(representation) + direct
    assert auxiliary == {} and model.width == sum(sizes) + 4
    for b in by_hand.rows:
        expected = pooled(model.cin, by_hand.fields(b)) + by_hand.deep(model.mlp, by_hand.joined(b))
        assert representation[b].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-14)
        logit = by_hand.linear(b) + by_hand.output(model.output, expected)
        assert logits[b].item() == pytest.approx(logit, rel=1e-10)


def test_a_layer_raises_the_order_by_one():
    torch.manual_seed(0)
    cin, fields = CIN(3, (2, 2, 2)).double(), torch.randn(5, 3, 4, dtype=torch.float64)
    once, twice = cin(fields), cin(2 * fields)
    for k in range(3):
        layer = slice(2 * k, 2 * k + 2)
        torch.testing.assert_close(twice[:, layer], 2 ** (k + 2) * once[:, layer], rtol=1e-12, atol=1e-14)


def test_no_layers():
    with pytest.raises(UserError, match="xdeepfm.cin: no layers"):
        Config(cin=())
