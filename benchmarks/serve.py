"""What a request costs to score (ELEC's table 5): the networks, and the language model where one has to run for it.

A request is one user with one history and its candidates, as integers, and timed is from there to probabilities. Each
model answers in a process of its own, all the same requests in turns, round by round; a round's first request is
answered once before the clock starts. The networks have the sizes of the log's vocabularies, are written and read as a
release's are, and their weights are random: no number here depends on them.

`vanilla` is what ELEC releases, `clickprompt` what ClickPrompt does (without the language model), `backbone` the same
network trained alone (the ID model), `cela` the network with a text table: each as PyTorch runs it. `ours_...` is the
same network as it is served (`ctrdist.serving`): the item side is looked up as the network takes it, the user's side is
computed once a request, and the rest is a compiled graph, if there is a C++ compiler.

`gain` finds the vector of each row in memory; `gain_lm` and `m_llm` have the language model read each candidate's text
with the user's, and `clickprompt_lm` with the prompts of each candidate besides, of fewer candidates: compare these by
the time a candidate, which falls with the number for a network.

In the paper, on Amazon, the gain network takes 2.1 times the vanilla one's time with RoBERTa, 8.4 times with Qwen2-7B.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells.latency import (  # noqa: E402
    Clock,
    Score,
    answer_in_turns,
    draw_requests,
    scorer,
    server,
    summary,
    time_requests,
)
from benchmarks.cells.log import Log, raw_fields  # noqa: E402
from benchmarks.cells.options import LogOptions, kept_in  # noqa: E402
from benchmarks.cells.study import spread  # noqa: E402
from ctrdist.allocator import keep_freed_memory  # noqa: E402
from ctrdist.batch import collate  # noqa: E402
from ctrdist.encode import ITEM  # noqa: E402
from ctrdist.export import load_click_model, save_click_model  # noqa: E402
from ctrdist.interaction_text import TextConfig, interaction_texts, item_sides  # noqa: E402
from ctrdist.items import Catalog, Ragged, by_catalog_row, read_items  # noqa: E402
from ctrdist.language.encode import EncodeConfig, Encoder, Source  # noqa: E402
from ctrdist.language.prompts import PromptConfig  # noqa: E402
from ctrdist.language.source import DEFAULT  # noqa: E402
from ctrdist.language.tokens import pad  # noqa: E402
from ctrdist.prompted import finetuning_task, load_prompted, save_prompted  # noqa: E402
from ctrdist.schema import Schema  # noqa: E402
from ctrdist.served import write_served  # noqa: E402
from ctrdist.serving.model import ServedModel  # noqa: E402
from ctrdist.tasks.click import ClickConfig, ClickModel  # noqa: E402
from ctrdist.tasks.distill import Distillation, DistillConfig  # noqa: E402
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel  # noqa: E402
from ctrdist.tasks.prompted_click import PromptFinetuneConfig  # noqa: E402
from ctrdist.text_field import FuseConfig  # noqa: E402
from ctrdist.text_training import LanguageModelConfig  # noqa: E402

OURS = "ours_"
NETWORKS = ("backbone", "vanilla", "clickprompt", "cela")
RUNS_LM = ("gain_lm", "m_llm", "clickprompt_lm")
MODELS = (*NETWORKS, *(OURS + name for name in NETWORKS), "gain", *RUNS_LM)
VECTORS, TEXTS = "vectors.npy", "text_table.npy"


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        log: rows and items.
        models: what is timed; the first one is what the others are compared with.
        rounds: in each of which every model answers the same requests.
        requests: of a round.
        candidates: of a request.
        lm_candidates: of a request to a model that runs the language model.
        threads: of each process; 0 takes all cores.
        seed: of all draws.
        lm: a Hugging Face name or a local folder.
        ctr: the network.
        fuse: the text field of CELA's.
        m_llm: the layers on the language model.
        prompts: what ClickPrompt's language model reads besides.
        text: what the language model reads.
        encode: how it does.
    """

    log: LogOptions = field(default_factory=LogOptions)
    models: tuple[str, ...] = MODELS
    rounds: int = 10
    requests: int = 20
    candidates: int = 1000
    lm_candidates: int = 32
    threads: int = 0
    seed: int = 0
    lm: str = DEFAULT
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(backbone="dcnv2"))
    fuse: FuseConfig = field(default_factory=FuseConfig)
    m_llm: MLLMConfig = field(default_factory=MLLMConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    text: TextConfig = field(default_factory=TextConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)


def write_models(log: Log, options: Options, folder: Path) -> None:
    """All models with random weights, as a release has them, a vector for each item, and a text table."""
    width, seed = Source(options.lm).load().width, options.seed
    pair = Distillation.build(log.schema, log.sizes, options.ctr, DistillConfig(), options.m_llm.hidden[-1], seed)
    pair.gain.join.reset_parameters()  # at first it leaves the vector out
    models = {"backbone": ClickModel(log.schema, log.sizes, options.ctr, seed=seed)}
    models |= {"vanilla": pair.vanilla, "gain": pair.gain, "clickprompt": models["backbone"]}
    models["cela"] = ClickModel(log.schema, log.sizes, options.ctr, width, options.fuse, seed)
    ModifiedLanguageModel(width, False, options.m_llm, seed).save(folder)
    if "clickprompt_lm" in options.models:
        (folder / "clickprompt_lm").mkdir()
        parts = models["backbone"], LanguageModelConfig(name=options.lm), options.prompts, PromptFinetuneConfig()
        save_prompted(finetuning_task(*parts, None, seed), folder / "clickprompt_lm")
    draw = np.random.default_rng(seed)
    for file, dim in ((VECTORS, pair.gain.vector_dim), (TEXTS, width)):
        np.save(folder / file, draw.normal(size=(log.catalog.size, dim)).astype(np.float16))
    texts = np.load(folder / TEXTS)
    for name, model in models.items():
        (folder / name).mkdir()
        save_click_model(model, folder / name, optimizer_state=False)
        if OURS + name in options.models:
            write_served(folder / (OURS + name), model.eval(), log.schema, log.encoders, log.catalog, texts)


@dataclass(frozen=True)
class Server:
    """What makes a model ready to answer, in its own process.

    Args:
        schema: of the log.
        catalog: its items.
        data: the prepared log.
        folder: what `write_models` wrote.
        options: all of them.
    """

    schema: Schema
    catalog: Catalog
    data: str
    folder: Path
    options: Options

    def network(self, name: str) -> Score:
        """A network by itself; with a text table, if it takes texts."""
        model = load_click_model(self.folder / name, self.schema)
        return scorer(self.schema, self.catalog, model, np.load(self.folder / TEXTS) if model.text_dim else None)

    def ours(self, name: str) -> Score:
        """A network as it is served."""
        return server(self.schema, ServedModel(self.folder / name))

    def gain(self) -> Score:
        """The gain network; a row's vector is found by its item, as one of memory."""
        vectors = np.load(self.folder / VECTORS)
        return self.with_vectors(lambda request: torch.from_numpy(vectors[request[ITEM].to_numpy()]))

    def gain_lm(self) -> Score:
        """The gain network; the rows' vectors are made of their texts."""
        model, states = ModifiedLanguageModel.load(self.folder), self.states()
        return self.with_vectors(lambda request: model.adapted(states(request)))

    def m_llm(self) -> Score:
        """The modified language model alone."""
        model, states = ModifiedLanguageModel.load(self.folder), self.states()
        return lambda request: torch.sigmoid(model.logits(model.adapted(states(request))))

    def with_vectors(self, vectors: Callable[[pa.Table], Tensor]) -> Score:
        """The gain network with the vectors [candidates, width] of a request."""
        model = load_click_model(self.folder / "gain", self.schema)

        def score(request: pa.Table) -> Tensor:
            batch = collate(request, self.schema, self.catalog)
            return model.predict(replace(batch, vector=vectors(request)))

        return score

    def states(self) -> Callable[[pa.Table], Tensor]:
        """The language model: a request -> the states [candidates, width] of its texts, float32."""
        encoder, tokens = Encoder(Source(self.options.lm, pooling="mean").load(), self.options.encode), self.tokens()
        return lambda request: torch.from_numpy(encoder.encode(tokens(request))).float()

    def tokens(self) -> Callable[[pa.Table], Ragged]:
        """A request -> the tokens of what is said of each candidate and the user."""
        options, items = self.options, read_items(self.data, self.schema)
        tokenizer = Source(options.lm).tokenizer(options.encode.max_length)
        sides = item_sides(items, self.schema, options.text, tokenizer)
        fields, free = (by_catalog_row(side, items, self.catalog.ids) for side in sides)

        def read(request: pa.Table) -> Ragged:
            rows, at = raw_fields(request, self.schema), request[ITEM].to_numpy()
            return tokenizer(interaction_texts(rows, at, (fields, free), self.schema, options.text).to_pylist())

        return read

    def clickprompt_lm(self) -> Score:
        """ClickPrompt with its language model."""
        model, tokens = load_prompted(self.folder / "clickprompt_lm", self.schema), self.tokens()
        padding = model.reader.language_model.tokenizer.pad_token_id or 0

        def score(request: pa.Table) -> Tensor:
            batch = collate(request, self.schema, self.catalog)
            return model.predict(replace(batch, tokens=pad(tokens(request), request[ITEM].to_numpy(), padding)))

        return score

    def ready(self, name: str) -> Score:
        """What answers as the model `name`."""
        special = {name: getattr(self, name) for name in ("gain", *RUNS_LM)}
        if name.startswith(OURS):
            return self.ours(name)
        return special[name]() if name in special else self.network(name)


SCORE: Score
"""The model of this process."""


def start(server: Server, name: str) -> None:
    """Begin a process, with a model that is ready."""
    global SCORE
    if server.options.threads:
        torch.set_num_threads(server.options.threads)
    keep_freed_memory()
    SCORE = server.ready(name)


def answer(requests: list[pa.Table]) -> list[float]:
    """Milliseconds of each request, after one that is not timed."""
    return time_requests(SCORE, [requests[0], *requests])[1:]


def asked(pool: ProcessPoolExecutor, candidates: int) -> Clock:
    """A process's clock, which shows it the first candidates of each request."""
    return lambda requests: pool.submit(answer, [request.slice(0, candidates) for request in requests]).result()


def measure(server: Server, log: Log) -> dict[str, np.ndarray]:
    """Milliseconds [rounds, requests of a round] by model."""
    options = server.options
    requests = draw_requests(log, options.candidates, options.seed, options.rounds * options.requests)
    rounds = ([next(requests) for _ in range(options.requests)] for _ in range(options.rounds))
    with ExitStack() as stack:
        clocks = {}
        for name in options.models:
            pool = ProcessPoolExecutor(1, get_context("spawn"), start, (server, name))
            clocks[name] = asked(stack.enter_context(pool), candidates_of(name, options, log))
        return answer_in_turns(clocks, rounds)


def candidates_of(name: str, options: Options, log: Log) -> int:
    """How many candidates of a request a model answers."""
    asked_for = options.lm_candidates if name in RUNS_LM else options.candidates
    return min(asked_for, options.candidates, len(log.catalog.items))


def row(name: str, ms: np.ndarray, candidates: int) -> dict[str, Any]:
    """A model as the results have it.

    Returns:
        Its `candidates` and `requests`; `p50_ms`, `p99_ms`, `mean_ms` and `sd_ms` of a request; `round_sd_ms`, the
        standard deviation of the rounds' medians; `requests_s`, answered one after another in a second;
        `us_a_candidate`, of the median.
    """
    told = summary(ms) | {"round_sd_ms": spread(np.median(ms, 1)), "requests_s": 1e3 / float(ms.mean())}
    told["us_a_candidate"] = told["p50_ms"] * 1e3 / candidates
    return {"model": name, "candidates": candidates, "requests": ms.size} | told


def show(rows: list[dict[str, Any]], options: Options) -> None:
    """The table for people."""
    threads = options.threads or torch.get_num_threads()
    table = Table(title=f"{options.ctr.backbone}, {rows[0]['requests']} requests in {options.rounds} rounds, {threads} "
                        "threads")  # fmt: skip
    names = (
        "model",
        "candidates",
        "p50 ms",
        "p99 ms",
        "mean",
        "sd",
        "sd of rounds",
        "requests/s",
        "µs a candidate",
        "times",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right")
    for found in rows:
        name = found["model"] + (" *" if found["model"] in RUNS_LM else "")
        numbers = [f"{found[key]:.2f}" for key in ("p50_ms", "p99_ms", "mean_ms", "sd_ms", "round_sd_ms")]
        numbers += [f"{found['requests_s']:.1f}", f"{found['us_a_candidate']:.1f}"]
        times = found["us_a_candidate"] / rows[0]["us_a_candidate"]
        table.add_row(name, f"{found['candidates']:,}", *numbers, f"{times:.2f}")
    console = Console(width=128)
    console.print(table)
    console.print(f"* {options.lm} reads every candidate's text: compare by µs a candidate")


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """For machines: times a candidate, at the median and the 99th percentile: each model's over that of the first one,
    of what is served over the same network's in PyTorch, and over the ID model's as it is served."""
    by_name = {found["model"]: found for found in rows}
    pairs = [(name, rows[0]["model"]) for name in by_name]
    pairs += [(name, name.removeprefix(OURS)) for name in by_name if name.startswith(OURS)]
    pairs += [(name, f"{OURS}backbone") for name in by_name if name.startswith(OURS)]
    out = {}
    for name, other in dict.fromkeys(pairs):
        if name != other and other in by_name:
            for key in ("p50", "p99"):
                own, its = (by_name[each][f"{key}_ms"] / by_name[each]["candidates"] for each in (name, other))
                out[f"{name}_over_{other}_{key}"] = own / its
    return out


def main(options: Options) -> None:
    """Measure, print the table and the JSON line."""
    unknown = set(options.models) - set(MODELS)
    if unknown:
        raise SystemExit(f"--models: unknown {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    with kept_in(None) as folder:
        log = options.log.open(folder, raw=True)
        write_models(log, options, folder)
        server = Server(log.schema, log.catalog, options.log.prepared(folder), folder, options)
        found = measure(server, log)
    rows = [row(name, ms, candidates_of(name, options, log)) for name, ms in found.items()]
    show(rows, options)
    print(json.dumps({"benchmark": "serve", "rows": rows, "ratios": ratios(rows)}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
