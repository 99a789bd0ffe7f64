import pytest
import torch
from torch import nn

from ctrdist.dropout import Dropout, drop, quicken


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_rest_scaled(p):
    torch.manual_seed(0)
    dropped = drop(torch.full((1000, 997), 3.0), p)
    zeros = dropped == 0
    assert abs(zeros.float().mean().item() - p) < 4 * (p * (1 - p) / zeros.numel()) ** 0.5
    torch.testing.assert_close(dropped[~zeros], torch.full_like(dropped[~zeros], 3.0 / (1 - p)))
    assert abs((zeros[:, 1:] & zeros[:, :-1]).float().mean().item() - p * p) < 0.003  # neighbours know nothing


def test_nothing_or_all_is_dropped_at_the_ends():
    x = torch.randn(5, 3)
    assert torch.equal(drop(x, 0.0), x) and not drop(x, 1.0).any()


def test_the_gradient_is_zero_where_the_value_is():
    x = torch.randn(64, 65, requires_grad=True)
    torch.manual_seed(1)
    dropped = drop(x, 0.25)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, (dropped != 0).to(x.dtype) / 0.75)


def test_a_module_drops_in_training_only_and_by_the_seed():
    module, x = Dropout(0.5), torch.ones(100)
    assert torch.equal(module.eval()(x), x)
    module.train()
    torch.manual_seed(3)
    first = module(x)
    assert not torch.equal(module(x), first)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)


def test_quicken_takes_the_place_of_pytorchs_dropout_everywhere():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.3), nn.Dropout1d(0.4)))
    names = list(module.state_dict())
    quicken(module)
    assert [type(part) for part in module[2]] == [Dropout, nn.Dropout1d]
    assert (type(module[1]), module[1].p, module[2][0].p) == (Dropout, 0.2, 0.3)
    assert list(module.state_dict()) == names
