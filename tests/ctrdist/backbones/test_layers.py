import math

import pytest
import torch
from torch import Tensor, nn

from ctrdist.backbones.layers import MLP, Dice, Dropout, GlobalBatchNorm


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_pytorchs(affine: bool):
    ours = GlobalBatchNorm(4, affine=affine, momentum=0.3, eps=1e-3).double()
    theirs = nn.BatchNorm1d(4, affine=affine, momentum=0.3, eps=1e-3).double()
    if affine:
        for module in (ours, theirs):
            with torch.no_grad():
                module.weight.copy_(rows(1, 4, seed=8)[0])
                module.bias.copy_(rows(1, 4, seed=9)[0])
    for step, count in enumerate([5, 2, 9]):
        results = []
        for module in (ours, theirs):
            x = rows(count, 4, seed=step).requires_grad_()
            module.zero_grad()
            out = module(x)
            (out.sin() * rows(count, 4, seed=20)).sum().backward()
            results.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=0)
    before = ours.running_var.clone()
    x = rows(3, 4, seed=30)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-14)
    assert torch.equal(ours.running_var, before)


@pytest.mark.parametrize("count", [0, 1])
def test_batch_norm_of_fewer_than_two_rows_uses_the_running_statistics(count: int):
    norm = GlobalBatchNorm(3).double()
    norm(rows(6, 3))
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = rows(count, 3, seed=1).requires_grad_()
    out = norm(x)
    torch.testing.assert_close(out.detach(), (x.detach() - mean) / (var + 1e-5).sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)
    out.sum().backward()
    assert x.grad.shape == x.shape and all(p.grad.isfinite().all() for p in (norm.weight, norm.bias))
    torch.testing.assert_close(x.grad, (1 / (var + 1e-5).sqrt()).expand(count, 3), rtol=1e-12, atol=0)


def test_batch_norm_of_a_constant_column_is_finite():
    norm = GlobalBatchNorm(2, eps=1e-8)
    x = torch.full((64, 2), 0.1).requires_grad_()
    norm(x).square().sum().backward()
    assert x.grad.isfinite().all() and norm(x).abs().max() < 1e-2


def test_statistics_of_half_precision_are_taken_in_float32():
    # 1001 is no bfloat16 number, and sums of a thousand rows are none either.
    x = rows(1001, 4).to(torch.bfloat16)
    norm = GlobalBatchNorm(4, momentum=1.0)
    out = norm(x)
    torch.testing.assert_close(norm.running_mean, x.double().mean(0).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, x.double().var(0).float(), rtol=1e-4, atol=1e-5)
    expected = (x.double() - x.double().mean(0)) / x.double().std(0)
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


def test_dice_is_equation_4_of_din():
    dice, x = Dice(3).double(), rows(7, 3)
    with torch.no_grad():
        dice.alpha.copy_(torch.tensor([0.25, -1.0, 0.0]))
    out = dice(x)
    for column in range(3):
        values = x[:, column].tolist()
        mean = sum(values) / 7
        var = sum((v - mean) ** 2 for v in values) / 7
        for row, v in enumerate(values):
            p = 1 / (1 + math.exp(-(v - mean) / math.sqrt(var + 1e-8)))
            assert out[row, column].item() == pytest.approx(p * v + (1 - p) * dice.alpha[column].item() * v, rel=1e-9)
    # On its own batch's statistics a row's place in the batch matters; after training it does not.
    assert not torch.allclose(dice(x[:3]), out[:3])
    dice.eval()
    torch.testing.assert_close(dice(x[:3]), dice(x)[:3], rtol=1e-12, atol=0)


def test_mlp_is_its_layers_one_after_the_other():
    mlp, x = MLP(3, (5, 2)).double(), rows(4, 3)
    linears = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]
    assert [layer.weight.shape for layer in linears] == [(5, 3), (2, 5)] and mlp.width == 2
    hidden = x
    for layer in linears:
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden, rtol=1e-12, atol=1e-14)
    assert torch.equal(MLP(3, ())(x), x) and MLP(3, ()).width == 3


def test_mlp_normalises_before_the_activation_and_drops_after_it():
    mlp, x = MLP(3, (6,), dropout=0.5, batch_norm=True).double(), rows(400, 3)
    linear, norm = mlp.layers[0], nn.BatchNorm1d(6).double()
    torch.manual_seed(0)
    out, full = mlp(x), norm(x @ linear.weight.T + linear.bias).clamp(min=0)
    kept = out != 0
    torch.testing.assert_close(out[kept], 2 * full[kept], rtol=1e-9, atol=1e-12)
    assert kept.sum().item() / (full != 0).sum().item() == pytest.approx(0.5, abs=0.1)
    assert isinstance(MLP(3, (6,), "dice").layers[1], Dice)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_dropout_keeps_the_mean_and_each_value_by_itself(p: float):
    dropout, x = Dropout(p), torch.full((1001, 203), 3.0, requires_grad=True)
    torch.manual_seed(0)
    out = dropout(x)
    dropped = out == 0
    torch.testing.assert_close(out[~dropped], torch.full_like(out[~dropped], 3 / (1 - p)))
    # Four values share a draw of 64 bits: each of the four places, and each pair of neighbours, as often as others.
    spread = 5 * math.sqrt(p * (1 - p) / (x.numel() // 4))
    for place in range(4):
        assert dropped.flatten()[place::4].float().mean().item() == pytest.approx(p, abs=spread)
    pairs = dropped.flatten()[1:] & dropped.flatten()[:-1]
    assert pairs.float().mean().item() == pytest.approx(p * p, abs=spread)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach() / 3)
    torch.manual_seed(0)
    assert torch.equal(dropout(x) == 0, dropped)
    assert torch.equal(dropout.eval()(x), x) and torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()
