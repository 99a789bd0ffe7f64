import numpy as np
import pytest
import torch

from ctrdist.draws import held_out, mix, uniform


def test_mix_is_splitmix64():
    # The first numbers of the generator from states 0 and 1: the state counts up by the golden gamma.
    gamma = 0x9E3779B97F4A7C15 - (1 << 64)
    found = mix(torch.tensor([0, gamma, 1]))
    assert [value % (1 << 64) for value in found.tolist()] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x910A2DEC89025CC1,
    ]  # fmt: skip


def test_uniform_takes_the_upper_bits():
    values = torch.tensor([0, -1, 1 << 62, -(1 << 63)])
    assert uniform(values).tolist() == [0.0, 1 - 2.0**-53, 0.25, 0.5]


def test_held_out_items_are_a_matter_of_item_and_seed():
    items = np.arange(2, 20002)
    held = held_out(items, 0.2, seed=3)
    assert held.dtype == bool and held.mean() == pytest.approx(0.2, abs=0.01)
    draw = np.random.default_rng(0).permutation(len(items))[:500]
    assert (held_out(items[draw], 0.2, seed=3) == held[draw]).all()
    assert (held_out(items, 0.3, seed=3) >= held).all()
    other = held_out(items, 0.2, seed=4)
    assert (held & other).mean() == pytest.approx(0.04, abs=0.006)
    assert not held_out(items, 0.0, seed=3).any() and not held_out(items[:0], 0.5, seed=3).any()
