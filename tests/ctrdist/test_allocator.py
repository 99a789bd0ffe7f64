"""What is freed stays with the process, where the C library lets us say so."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, resource
from ctrdist.allocator import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # no huge pages, of which one fault makes 512
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 64 * 2**20
for repeat in range(3):  # the first blocks are new in any case
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str, **environment: str) -> int:
    script = SCRIPT.format(call=call)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the setting")
def test_freed_memory_is_used_again_without_page_faults():
    pages = faults("")
    if pages < 100:
        pytest.skip("this C library keeps large blocks anyway")
    assert faults("keep_freed_memory()") < pages / 10
    assert faults("keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072") > pages / 2, "the environment wins"


KERNELS = """
import torch
from ctrdist.allocator import keep_few_kernels
{call}
torch.set_num_threads(1)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
weight = torch.randn(1536, 384, dtype=torch.bfloat16)
for rows in range(16, 1016):
    torch.nn.functional.linear(torch.ones(rows, 384, dtype=torch.bfloat16), weight)
    before = resident() if rows == 40 else before if rows > 40 else 0
print((resident() - before) // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_products_of_many_shapes_leave_few_kernels_behind():
    def grown(call: str, **environment: str) -> int:
        script = KERNELS.format(call=call)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        return int(done.stdout)

    many = grown("")
    if many < 30:
        pytest.skip("bfloat16 products of this chip, or build of PyTorch, keep no kernels")
    assert grown("keep_few_kernels()") < many / 3
    assert grown("keep_few_kernels()", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") > many / 2, "the environment wins"
