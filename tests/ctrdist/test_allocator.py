"""What is freed stays with the process, where the C library lets us say so."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, resource
from ctrdist.allocator import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
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
