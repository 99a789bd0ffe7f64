import pytest
import torch

from ctrdist.precision import use_bfloat16


@pytest.mark.parametrize("computes", [True, False])
def test_auto_is_bfloat16_where_a_gpu_computes_in_it_and_not_where_it_only_emulates_it(computes, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or computes
    )
    assert use_bfloat16("auto", "cuda") == computes
    assert use_bfloat16("bfloat16", "cuda") and not use_bfloat16("float32", "cuda")
