import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrdist.batch import Lookup
from ctrdist.embedding import EmbeddingTable
from ctrdist.group import Group
from ctrdist.optim import ROW_OPTIMIZERS
from ctrdist.packing import pack, unpack, zeros

VALUES = {
    "odd": torch.randn(5, 3).bfloat16(),
    "count": torch.arange(5.0),
    "matrix": torch.randn(5, 2, 3),
    "one": torch.randn(5, 1).bfloat16(),
}


def test_packed_rows_are_unpacked_as_they_were():
    packed = pack(VALUES, 7)
    # 6 bytes and 2 until the next number, 4, 24, 2, and 4 until the next word
    assert packed.shape == (7, 5) and packed.nbytes == 7 * (6 + 2 + 4 + 24 + 2 + 2)
    for name, found in unpack(packed, VALUES).items():
        assert torch.equal(found[:5], VALUES[name]) and found.dtype == VALUES[name].dtype, name
        assert not found[5:].any() and found.shape == (7, *VALUES[name].shape[1:]), name
    some = torch.tensor([4, 1])
    for name, found in unpack(packed[some], VALUES).items():
        assert torch.equal(found, VALUES[name][some]), name
    assert all(len(found) == 0 for found in unpack(pack(VALUES, 5)[:0], VALUES).values())


def test_unpacked_rows_are_views():
    packed = pack(VALUES, 5)
    found = unpack(packed, VALUES)
    for number, value in enumerate(found.values()):
        value.fill_(number + 1)
    assert all((value == number + 1).all() for number, value in enumerate(unpack(packed, VALUES).values()))


def advice(tensor: Tensor) -> list[str]:
    """What the kernel was told of the memory where a tensor ends: flags of `/proc/self/smaps`, proc(5)."""
    last, inside = tensor.data_ptr() + tensor.nbytes - 1, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            first, end = (int(part, 16) for part in head.split("-"))
            inside = first <= last < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages here")
def test_a_large_table_asks_for_huge_pages():
    assert "hg" in advice(zeros(100_000, 16, torch.device("cpu")))
    assert "hg" in advice(EmbeddingTable(100_000, 16, ROW_OPTIMIZERS["adam"]()).packed)


def one_buffer(table: EmbeddingTable) -> bool:
    """Whether what a table has by name is what it has packed."""
    expected = unpack(table.packed, table.row_buffers())
    return all(value.data_ptr() == expected[name].data_ptr() for name, value in table.row_buffers().items())


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ROW_OPTIMIZERS)
def test_a_table_stays_in_one_buffer(rule: str, storage: torch.dtype):
    table = EmbeddingTable(9, 3, ROW_OPTIMIZERS[rule](), storage=storage)
    for change in (
        lambda: table.grow(20),
        lambda: table(Lookup.of(np.array([3, 5]))).sum().backward() or table.push(Group()),
        lambda: table.load_state_dict(EmbeddingTable(20, 3, table.optimizer, storage=storage, seed=1).state_dict()),
        lambda: table.renew(torch.tensor([3])),
        lambda: table.settle(),
        lambda: table.to("cpu"),
        lambda: table.double(),
    ):
        change()
        assert one_buffer(table), change
    assert table.weight.dtype == torch.float64
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert one_buffer(other) and other.weight.data_ptr() != table.weight.data_ptr()
        assert torch.equal(other.weight, table.weight)


def test_conversion_keeps_the_values():
    table = EmbeddingTable(9, 3, ROW_OPTIMIZERS["adagrad"]())
    table(Lookup.of(np.array([3, 5]))).sum().backward()
    table.push(Group())
    weight, sums = table.weight.clone(), table.sum.clone()
    assert sums[3] > 0
    packed = table.to("cpu", torch.float32).packed
    assert table.packed is packed, "nothing to do"
    table.double()
    assert torch.equal(table.weight, weight.double()) and torch.equal(table.sum, sums.double())


def test_a_table_moves_to_another_device():
    table = EmbeddingTable(9, 3, ROW_OPTIMIZERS["adam"](), storage=torch.bfloat16).to("meta")
    assert {value.device.type for value in (table.packed, *table.buffers())} == {"meta"}
    assert table.exp_avg.stride() == (table.packed[0].nbytes // 4, 1)
