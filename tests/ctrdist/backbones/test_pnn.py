import pytest
import torch

from ctrdist.backbones.pnn import PNN, Config


def inner(fields: list[list[float]]) -> list[float]:
    """<f_i, f_j> of each pair, a field's with itself among them."""
    count = len(fields)
    return [
        sum(p * q for p, q in zip(fields[i], fields[j], strict=True)) for i in range(count) for j in range(i, count)
    ]


def outer(fields: list[list[float]]) -> list[float]:
    """The upper half of the sum of all f_i f_j^T, each of the count * count matrices by itself."""
    count, dim = len(fields), len(fields[0])
    total = [[0.0] * dim for _ in range(dim)]
    for i in range(count):
        for j in range(count):
            for a in range(dim):
                for b in range(dim):
                    total[a][b] += fields[i][a] * fields[j][b]
    assert total[0][1] == pytest.approx(total[1][0])
    return [total[a][b] for a in range(dim) for b in range(a, dim)]


@pytest.mark.parametrize("product", ["inner", "outer", "both"])
def test_logit_pair_by_pair(by_hand, product: str):
    torch.manual_seed(0)
    model = PNN(by_hand.shape, Config(product=product, hidden=(6, 4))).double().eval()
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    assert not direct.any() and auxiliary == {}
    for b in by_hand.rows:
        fields = by_hand.fields(b)
        signal = by_hand.joined(b)
        signal += inner(fields) if product != "outer" else []
        signal += outer(fields) if product != "inner" else []
        assert len(signal) == {"inner": 8 + 10, "outer": 8 + 3, "both": 8 + 10 + 3}[product]
        expected = by_hand.deep(model.mlp, signal)
        assert representation[b].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-14)
        logit = by_hand.output(model.output, expected)
        assert model.head(representation)[b].item() == pytest.approx(logit, rel=1e-10)
