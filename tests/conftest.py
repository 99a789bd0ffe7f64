"""Fixtures for all tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
WORDS = "red blue old new long short funny sad film book story of the a and with war love dog cat house sea".split()

_WORKER = """
import json, runpy, sys
import torch
import torch.distributed as dist
file, name, arguments, store, rank, size, out = sys.argv[1:]
torch.set_num_threads(1)
function = runpy.run_path(file)[name]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size))
from ctrdist.group import DistributedGroup
torch.save(function(DistributedGroup(), *json.loads(arguments)), out)
dist.destroy_process_group()
"""


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT, 16 wide, with a word list of its own and no masked-word head; needs no download."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny_lm")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "##s", *WORDS]
    tokenizer = BertTokenizer(vocab={token: row for row, token in enumerate(tokens)}, model_max_length=32)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def two_workers(tmp_path: Path) -> Callable[..., list[Any]]:
    """`two_workers(function, *arguments)`: call a module-level `function(group, *arguments)` of the test's file in two
    gloo processes; returns what each returned (tensors in dicts and lists). Arguments go through JSON."""

    def call(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        file, outs = function.__code__.co_filename, [tmp_path / f"worker{rank}.pt" for rank in range(2)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        start = [sys.executable, "-c", _WORKER, file, function.__name__, json.dumps(arguments), str(tmp_path / "store")]
        workers = [
            subprocess.Popen([*start, str(rank), "2", str(out)], env=environment, stderr=subprocess.PIPE, text=True)
            for rank, out in enumerate(outs)
        ]
        try:
            errors = [worker.communicate(timeout=120)[1] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        for worker, error in zip(workers, errors, strict=True):
            assert worker.returncode == 0, error
        return [torch.load(out, weights_only=True) for out in outs]

    return call
