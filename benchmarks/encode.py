"""Texts to vectors: sentence-transformers, our encoder as a plain loop, and the same through Ray, in one run.

Same weights, same texts, same cut of them. `st` is sentence-transformers' `encode` as users call it, `st_bf16` the same
in bfloat16 at several batch sizes, the best of which counts, `loop` our encoder in one process, tokenising included,
and `ray` the whole path of the job, from texts in a state to a checked table. Each runs in a process of its own, all
in turns and under the same settings of the C allocator; the median counts. Of `ray` the speed is that from the first
shard's begin to the last one's end: actors take seconds to start, once a table, meanwhile the first shards are
tokenised, and `whole_s` has all of that as well. A peak
is the best rate of a sweep of square products in the same run, and work counts on real tokens, padding not counted.
Vectors must agree with `st` to a cosine of .999.

sentence-transformers is measured where it is installed: `pip install -e '.[peers]'`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ctrdist.allocator import KEEP  # noqa: E402
from ctrdist.items import ItemTexts, build_catalog, grow_catalog_ids  # noqa: E402
from ctrdist.language.encode import EncodeConfig, Encoder, Source  # noqa: E402
from ctrdist.language.source import DEFAULT  # noqa: E402
from ctrdist.schema import ITEM_ID, Field, Schema  # noqa: E402
from ctrdist.storage import State  # noqa: E402
from ctrdist.text_table import load_text_table  # noqa: E402
from ctrdist.vocabulary import Vocabulary  # noqa: E402
from raycluster import cluster, planning  # noqa: E402
from raycluster.encoder import encode_items  # noqa: E402

AGREEMENT = 0.999
"""The least cosine between a vector and sentence-transformers' of the same text."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        texts: JSON lines with `text`; where there is no such file texts are made up.
        count: texts to encode, drawn from these; 0 takes all.
        synthetic: so many made-up texts in place of others, their lengths heavy-tailed.
        lm: a Hugging Face name or a local folder; it must be one that sentence-transformers loads.
        roberta: measure a RoBERTa of base size with random weights, in place of `lm`.
        max_length: tokens of a text that are read.
        tokens_per_batch: of our encoder; 0 takes its own choice.
        batches: texts a batch of `st_bf16`; the best counts.
        rounds: runs of each, in turns.
        threads: of each process but Ray's, which divides the cores among its actors; 0 takes all cores.
        device: cpu or cuda.
        who: which of them run.
        run: one contestant alone, in this process: how the others are started.
    """

    texts: Path = ROOT.parent / "shared" / "data" / "movietweetings" / "extracts.jsonl"
    count: int = 1024
    synthetic: int = 0
    lm: str = DEFAULT
    roberta: bool = False
    max_length: int = 128
    tokens_per_batch: int = 0
    batches: tuple[int, ...] = (16, 32, 64)
    rounds: int = 3
    threads: int = 0
    device: str = "cpu"
    who: tuple[str, ...] = ("peak", "st", "st_bf16", "loop", "ray")
    run: str = ""


def read_texts(options: Options) -> list[str]:
    """The texts: given ones, or words of the synthetic world's kind with log-normal lengths, 75 on average."""
    draw = np.random.default_rng(0)
    if options.texts.exists() and not options.synthetic:
        found = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()]
    else:
        size = options.synthetic or options.count or 1024
        words = np.array(
            "the of a and in film was by his first drama directed book american story with life war".split()
        )
        lengths = np.minimum(draw.lognormal(3.8, 1.0, size).astype(int) + 1, 2000)
        found = [" ".join(words[draw.integers(0, len(words), n)]) for n in lengths]
    count = 0 if options.synthetic else options.count
    return [found[i] for i in draw.permutation(len(found))[: count or None]]


def model_folder(options: Options, folder: Path) -> str:
    """The language model's folder; one of RoBERTa's base size is made there, with the default model's tokenizer."""
    if not options.roberta:
        return Source(options.lm).folder()
    from transformers import RobertaConfig, RobertaModel

    from ctrdist.language.model import LanguageModel, load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(Source(DEFAULT).folder())
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 101, "eos_token_id": 102}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=514, **ids)
    LanguageModel(RobertaModel(config, add_pooling_layer=False), tokenizer, "mean").save(folder / "roberta")
    return str(folder / "roberta")


def flops(folder: str, lengths: np.ndarray) -> float:
    """Multiplications and additions of a forward pass over texts of so many tokens: matrix products of all layers and
    attention, by the model's configuration."""
    config = json.loads((Path(folder) / "config.json").read_text())
    width, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return float((layers * (2 * (4 * width**2 + 2 * width * inner) * lengths + 4 * width * lengths**2)).sum())


# --- contestants: each gets (options, folder, texts) and returns (seconds, vectors or None, more figures) ---


def timed(device: str, encode: Callable[[], np.ndarray]) -> tuple[float, np.ndarray, dict]:
    """Seconds of one call, and what it gave."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    vectors = encode()
    return time.perf_counter() - began, vectors, {}


def sentence_transformers(options: Options, folder: str, texts: list[str], batch: int = 0) -> tuple:
    """`encode` in float32 as users call it; with `batch` texts at a time, in bfloat16."""
    from sentence_transformers import SentenceTransformer

    settings = {"model_kwargs": {"dtype": torch.bfloat16}} if batch else {}
    model = SentenceTransformer(folder, device=options.device, **settings)
    model.max_seq_length = options.max_length
    arguments = {"batch_size": batch} if batch else {}
    model.encode(texts[:64], **arguments)
    return timed(options.device, lambda: model.encode(texts, **arguments))


def loop(options: Options, folder: str, texts: list[str]) -> tuple:
    """Our encoder, in this process."""
    config, model = encoding(options), Source(folder)
    encoder, tokenizer = Encoder(model.load(), config, options.device), model.tokenizer(config.max_length)
    encoder.encode(tokenizer(texts[:64]))
    return timed(options.device, lambda: encoder.encode(tokenizer(texts)))


def through_ray(options: Options, folder: str, texts: list[str]) -> tuple:
    """The job's path: texts in a state, an actor pool, a table."""
    cluster.connect()
    plan = planning.make_plan()
    plan = replace(plan, threads=max(1, (options.threads or len(os.sched_getaffinity(0))) // plan.workers))
    with tempfile.TemporaryDirectory() as scratch:
        state, item = State(scratch), Field(ITEM_ID)
        table = pa.table({ITEM_ID: np.arange(len(texts)), "text": texts})
        ids = grow_catalog_ids(table, Vocabulary())
        schema = Schema(user=(), item=(item,), text=("{text}",))
        with state.create("texts") as out:
            build_catalog(table, ids, schema, {ITEM_ID: Vocabulary()}).save(out / "catalog")
            ItemTexts.write(out / "texts.arrow", table, ids, schema)
        began = time.perf_counter()
        made = encode_items(state, "table", Source(folder), "texts", encoding(options), plan, "")
        more = {"whole_s": time.perf_counter() - began, "device": made.facts["device"]}
        return made.facts["encoders_seconds"], np.array(load_text_table(state.local("table"))[2:]), more


def encoding(options: Options) -> EncodeConfig:
    """How ours encodes: a table of float32, to compare."""
    return EncodeConfig(max_length=options.max_length, tokens_per_batch=options.tokens_per_batch, table="float32")


def peak(options: Options) -> dict[str, float]:
    """The best rate of square matrix products, floating-point operations a second, by precision."""
    best = {}
    for name in ("float32", "bfloat16"):
        for size in (512, 1024, 2048, 4096, *((8192, 16384) if options.device == "cuda" else ())):
            a, b = (torch.randn(size, size, device=options.device).to(getattr(torch, name)) for _ in range(2))
            count = max(2, int((1e14 if options.device == "cuda" else 2e11) / (2 * size**3)))
            a @ b
            seconds, _, _ = timed(options.device, lambda a=a, b=b, n=count: [a @ b for _ in range(n)][-1].sum().item())
            best[name] = max(best.get(name, 0.0), 2 * size**3 * count / seconds)
    return best


CONTESTANTS = {"st": sentence_transformers, "loop": loop, "ray": through_ray}


def contestant(options: Options) -> None:
    """Run `options.run` in this process; print its figures as JSON, and leave the vectors beside its model."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.run == "peak":
        print(json.dumps(peak(options)))
        return
    name, _, batch = options.run.partition(":")
    texts, folder = read_texts(options), options.lm
    arguments = {"batch": int(batch)} if batch else {}
    seconds, vectors, more = CONTESTANTS[name](options, folder, texts, **arguments)
    np.save(os.environ["VECTORS"], vectors)
    print(json.dumps({"seconds": seconds, **more}))


def in_process(options: Options, run: str, folder: str, scratch: Path) -> tuple[dict, np.ndarray | None]:
    """Run one contestant in a process of its own; its figures, and vectors."""
    vectors = scratch / "vectors.npy"
    environment = KEEP | os.environ | {"VECTORS": str(vectors), "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--lm", folder, "--run", run]
    for name in ("texts", "count", "synthetic", "max_length", "tokens_per_batch", "threads", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{run} failed:\n{done.stderr[-3000:]}")
    figures = json.loads(done.stdout.rstrip().splitlines()[-1])
    return figures, np.load(vectors) if run != "peak" else None


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of each row of one with the same row of the other."""
    a, b = (part.astype(np.float64) / np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True) for part in (a, b))
    return float((a * b).sum(1).min())


def measure(options: Options, folder: str, scratch: Path) -> tuple[list[dict], dict[str, float]]:
    """All rounds: a row for each run, and each contestant's least cosine with `st`."""
    who = [name for name in options.who if find_spec("sentence_transformers") or not name.startswith("st")]
    runs = [run for name in who for run in ([f"st:{b}" for b in options.batches] if name == "st_bf16" else [name])]
    found, cosines, reference = [], {}, None
    for number in range(options.rounds):
        for run in runs:
            figures, vectors = in_process(options, run, folder, scratch)
            found.append({"round": number, "run": run, **figures})
            if run == "st":
                reference = vectors
            elif vectors is not None and reference is not None:
                cosines[run] = min(cosines.get(run, 1.0), least_cosine(vectors, reference))
                # bfloat16 of theirs is theirs to answer for
                assert run.startswith("st:") or cosines[run] >= AGREEMENT, f"{run}: cosine {cosines[run]:.5f} with st"
    return found, cosines


def main(options: Options) -> None:
    """Measure, print the table, and the JSON line."""
    if options.run:
        return contestant(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder, texts = model_folder(options, Path(scratch)), read_texts(options)
        lengths = np.diff(Source(folder).tokenizer(options.max_length)(texts).offsets)
        work = flops(folder, lengths)
        found, cosines = measure(options, folder, Path(scratch))

    def middle(run: str, name: str = "seconds") -> float:
        return median([one[name] for one in found if one["run"] == run] or [float("nan")])

    peaks = {name: middle("peak", name) for name in ("float32", "bfloat16")}
    rates = {run: len(texts) / middle(run) for run in dict.fromkeys(one["run"] for one in found) if run != "peak"}
    table = Table(title=f"{len(texts):,} texts, {lengths.mean():.0f} tokens each, {options.device}")
    for name in ("", "texts/s", "share of the float32 peak", "share of the bfloat16 peak", "least cosine with st"):
        table.add_column(name, justify="right" if name else "left")
    for run, rate in rates.items():
        shares = [f"{work / middle(run) / peaks[name]:.1%}" for name in peaks]
        table.add_row(run.replace("st:", "st_bf16, batch "), f"{rate:,.1f}", *shares, f"{cosines.get(run, 1):.5f}")
    Console(width=110).print(table)
    half = max((rate for run, rate in rates.items() if run.startswith("st:")), default=float("nan"))
    ours, nan = rates.get("loop", float("nan")), float("nan")
    ratios = {
        "vs_sentence_transformers": ours / rates.get("st", nan),
        "vs_bf16": ours / half,
        "ray_over_loop": rates.get("ray", nan) / ours,
        "peak_share": work / middle("loop") / peaks["bfloat16"],
    }
    ratios |= {f"least_cosine_{run}": value for run, value in cosines.items() if not run.startswith("st:")}
    ratios = {name: value for name, value in ratios.items() if value == value}
    print(json.dumps({"benchmark": "encode", "rows": found, "peaks": peaks, "flops": work, "ratios": ratios}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
