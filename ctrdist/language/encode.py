"""Texts -> vectors: the whole loop, in one process, on a CPU or a GPU.

Tokens are batched by a budget, texts of like length together, so that hardly anything that is computed is padding. On
a GPU the loop never waits for a batch that it has just sent there: it fetches the results of the one before.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ctrdist.allocator import keep_freed_memory
from ctrdist.errors import UserError
from ctrdist.items import Ragged
from ctrdist.language import source
from ctrdist.language.encoder import TextEncoder, load_encoder
from ctrdist.language.model import LanguageModel, load_tokenizer
from ctrdist.language.tokenizer import TextTokenizer, tokens_from_arrow
from ctrdist.language.tokens import pad
from ctrdist.precision import Precision, use_bfloat16
from ctrdist.storage import State, fingerprint
from ctrdist.text_table import TableType

BUDGET = {"cpu": 2048, "cuda": 65536}
"""Tokens of a batch that keep a device busy; on a CPU, more leave its caches."""
VECTORS, HASHES = "vectors.npy", "hashes.npy"


@dataclass(frozen=True)
class EncodeConfig:
    """How texts are encoded.

    Args:
        max_length: tokens of a text that are read, special tokens included.
        tokens_per_batch: tokens that are encoded at a time, padding included; a longer text goes alone. 0 takes 2,048
            on a CPU and 65,536 on a GPU.
        shard_items: texts of a shard, the piece of work that is not done again after a crash; 0 takes 1,024, or 16,384
            where there are GPUs.
        precision: what is computed in; `auto` is bfloat16 where the chip computes in it, else float32.
        table: type of the numbers in the text table.
        encoders: processes that encode at most; 0 takes as many as there is room for as the job starts. A cluster that
            grows by itself grows for them.
        gpu_share: share of a GPU that each of them reserves, where there are GPUs: 0.5 puts two on one.
    """

    max_length: int = 128
    tokens_per_batch: int = 0
    shard_items: int = 0
    precision: Precision = "auto"
    table: TableType = "float16"
    encoders: int = 0
    gpu_share: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("tokens_per_batch", 0), ("shard_items", 0), ("encoders", 0)):
            if getattr(self, name) < least:
                raise UserError(f"encode.{name}: {getattr(self, name)} is under {least}")
        if not 0 < self.gpu_share <= 1:
            raise UserError(f"encode.gpu_share: {self.gpu_share} is not over 0 and at most 1")


@dataclass(frozen=True)
class Source:
    """Where a language model is found, by any process.

    Args:
        name: a Hugging Face name or a folder; with `state`, an output.
        state: URI of the state that has the output.
        pooling: as `LanguageModel.load` takes it.
    """

    name: str
    state: str = ""
    pooling: str = "auto"

    def folder(self) -> str:
        """The local folder with its files."""
        return str(State(self.state).local(self.name)) if self.state else source.fetch(self.name)

    def load(self) -> LanguageModel | TextEncoder:
        """The model, in float32; with its head, where alignment trained the head alone."""
        return load_encoder(self.folder(), self.pooling)

    def tokenizer(self, max_length: int) -> TextTokenizer:
        """Its tokenizer, without the model."""
        return TextTokenizer.of(load_tokenizer(self.folder()), max_length)

    def fingerprint(self, config: EncodeConfig) -> str:
        """Sixteen hex digits that change with the vectors: with weights, tokenizer, pooling, and what `config` says."""
        files, folder = {}, Path(self.folder())
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".json", ".txt", ".model"):
                with path.open("rb") as stream:
                    files[str(path.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
        return fingerprint(files, self.pooling, config.max_length, config.precision, config.table)


class Encoder:
    """A language model that encodes.

    Args:
        model: taken over: moved to `device`, and its weights turned to the precision that is computed in.
        config: how.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self, model: LanguageModel | TextEncoder, config: EncodeConfig, device: str | torch.device = "cpu"
    ) -> None:
        self.config, self.device = config, torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.padding, self.width = model.tokenizer.pad_token_id or 0, model.width
        dtype = torch.bfloat16 if use_bfloat16(config.precision, self.device) else torch.float32
        dtype = torch.float64 if config.precision == "float64" else dtype
        model = model.eval().requires_grad_(False)
        for parameter in model.parameters():  # and no buffers: rotary frequencies would lose the positions
            parameter.data = parameter.data.to(dtype)  # once: autocast does it for every batch
        self.model = model.to(self.device)  # turned before: a GPU need not have room for float32
        self.budget = config.tokens_per_batch or BUDGET.get(self.device.type, BUDGET["cpu"])

    @torch.inference_mode()
    def encode(self, tokens: Ragged) -> np.ndarray:
        """The pooled states of n texts, [n, width] of the type `config.table`, in the order of the texts.

        Raises:
            UserError: a vector is not finite in that type.
        """
        lengths = np.diff(tokens.offsets)
        out = np.empty((len(lengths), self.width), self.config.table)
        before: tuple[np.ndarray, Tensor, Any] | None = None
        for at in token_batches(lengths, self.budget):
            sent = (at, *self._send(tokens, at))
            if before:
                _fetch(out, *before)
            before = sent
        if before:
            _fetch(out, *before)
        if not np.isfinite(out).all():
            raise UserError(
                f"the language model's vectors are not finite in {self.config.table}; try --encode.table float32, or "
                "--encode.precision float32"
            )
        return out

    def _send(self, tokens: Ragged, at: np.ndarray) -> tuple[Tensor, Any]:
        """Vectors of the texts `at`, on their way to this process's memory, and what tells that they are there."""
        batch = pad(tokens.take(at), at, self.padding)
        ids, mask = batch.input_ids, batch.attention_mask
        type_ = torch.from_numpy(np.empty(0, self.config.table)).dtype
        if self.device.type == "cpu":
            return self.model(ids, mask).to(type_), None
        ids, mask = (part.pin_memory().to(self.device, non_blocking=True) for part in (ids, mask))
        vectors = self.model(ids, mask).to(type_)
        host = torch.empty(vectors.shape, dtype=type_, pin_memory=True).copy_(vectors, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return host, arrived


def _fetch(out: np.ndarray, at: np.ndarray, vectors: Tensor, arrived: Any) -> None:
    if arrived is not None:
        arrived.synchronize()
    out[at] = vectors.numpy()


def token_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Texts in batches of like length, the longest first: each text's number once, int64.

    Args:
        lengths: tokens of each text.
        budget: a batch's texts times its longest is at most this, unless it is one text alone.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start:end]
        start = end


class ShardEncoder:
    """What an actor of the pool does: encode a shard of texts and write it to the state, named by what is in it.

    So a shard that is encoded twice, by whomever, is there once.

    Args:
        model: the language model.
        config: how to encode.
        state: URI of the state.
        shards: name of the shards' folder and what each one's name begins with.
        threads: to compute with; 0 leaves PyTorch's choice.
        gpu: use a GPU, if this process sees one.
    """

    def __init__(
        self, model: Source, config: EncodeConfig, state: str, shards: str, threads: int = 0, gpu: bool = False
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.state, self.shards = State(state), shards
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        self.encoder = Encoder(model.load(), config, device)

    def __call__(self, batch: pa.Table) -> dict[str, np.ndarray]:
        """Encode texts (`tokens_to_arrow`).

        Returns:
            One value each: how many `items`, on what `device`, when encoding `began` and `ended` (seconds since 1970),
            and an `error` that the user can act on, "" for none.
        """
        began = time.time()
        hashes, tokens = tokens_from_arrow(batch)
        said = ""
        try:
            if len(hashes):
                with self.state.create(f"{self.shards}-{fingerprint(hashes.tolist())}") as folder:
                    np.save(folder / HASHES, hashes)
                    np.save(folder / VECTORS, self.encoder.encode(tokens))
        except UserError as error:  # as Ray Data passes it on, an exception has lost what it was
            said = str(error)
        values = {"items": len(hashes), "device": self.encoder.device.type, "began": began, "ended": time.time()}
        values["error"] = said
        return {name: np.array([value]) for name, value in values.items()}
