"""The arithmetic that a model computes in: float32, or bfloat16 where the chip is faster for it."""

from functools import cache
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16", "float64"]


def computing_in(precision: Precision, device: str | torch.device) -> torch.autocast:
    """A context in which matrix products are of that precision: bfloat16 by autocast, any other as the weights are."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=use_bfloat16(precision, device))


def use_bfloat16(precision: Precision, device: str | torch.device) -> bool:
    """Whether a precision means bfloat16 on a device; `auto` is that where the chip computes in it."""
    if precision != "auto":
        return precision == "bfloat16"
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and "avx512_bf16" in _cpu_flags()


@cache
def _cpu_flags() -> str:
    try:
        return next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    except OSError:
        return ""
