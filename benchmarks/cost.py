"""What CELA costs (the paper's table 3), in one run on one dataset: an ID model, CELA's stages, CTRL's first stage.

All stages run in this process, with all its threads, by the tasks, the loop and the defaults of the daily job. The ID
model and MF² take an epoch each in turns, and MF²'s part of CELA is the median epoch times the epochs; DAP, ROMA and
the encoder run once, on all items. CTRL's first stage reads the text of every interaction; it is measured on a share of
them, half before ROMA and half after it, and extrapolated to an epoch by the number of interactions. Tokenising is in
the seconds of CELA's stages and not in CTRL's.

A request is one user with one history and 1,000 candidates, as integers. Timed is from there to probabilities:
finding the distinct items, gathering their fields and text vectors, and the forward pass in eager mode, which projects
the text of each distinct item once. Both models answer the same requests in turns.

A later day is one on which DAP is not due: warm epochs of the ID model and of MF² on a new day's rows, which are the
validation days' here, warm epochs of ROMA on all items, and all items encoded. Where ROMA is not due either
(`align.every_days`), only items that no training row has seen are encoded.

In the paper, on AppGallery, MF² takes 1.30 times DIN's training, all of CELA 3.1 times, CTRL 9.6 times CELA, and a
batch is scored in 1.13 times DIN's milliseconds.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells import language  # noqa: E402
from benchmarks.cells.click import train_click  # noqa: E402
from benchmarks.cells.interaction import (  # noqa: E402
    InteractionAlignment,
    interaction_batches,
    interaction_texts,
)
from benchmarks.cells.latency import answer_in_turns, draw_requests, scorer, summary, time_requests  # noqa: E402
from benchmarks.cells.log import Log  # noqa: E402
from benchmarks.cells.options import LogOptions, kept_in  # noqa: E402
from benchmarks.cells.study import say  # noqa: E402
from ctrdist.language.encode import EncodeConfig, Source  # noqa: E402
from ctrdist.language.model import LanguageModel  # noqa: E402
from ctrdist.loop import fit  # noqa: E402
from ctrdist.tasks.align import AlignConfig  # noqa: E402
from ctrdist.tasks.click import ClickConfig, ClickModel  # noqa: E402
from ctrdist.tasks.pretrain import PretrainConfig  # noqa: E402
from ctrdist.text_field import FuseConfig  # noqa: E402
from ctrdist.text_training import LanguageModelConfig, alignment_targets, text_loop  # noqa: E402


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        log: rows, days and texts.
        rounds: epochs of the ID model and of MF² that are measured in turns.
        ctrl_rows: interactions on which CTRL's first stage is measured.
        ctrl_length: tokens of an interaction's text that are read.
        paper_epochs: epochs of DAP, of ROMA and of the CTR models in the code of CELA's authors.
        ctrl_epochs: epochs of CTRL's first stage beside those; with our own epochs it has as many as ROMA.
        candidates: of a request.
        requests: to each of the two models.
        threads: of this process; 0 takes all cores.
        seed: of all draws.
        keep: folder for the prepared log; a temporary one if not given.
        lm: the language model.
        ctr: the CTR model.
        pretrain: DAP.
        align: ROMA.
        encode: items to the text table.
        fuse: the text field.
    """

    log: LogOptions = field(default_factory=LogOptions)
    rounds: int = 4
    ctrl_rows: int = 2048
    ctrl_length: int = 256
    paper_epochs: tuple[int, int, int] = (10, 10, 10)
    ctrl_epochs: int = 10
    candidates: int = 1000
    requests: int = 200
    threads: int = 0
    seed: int = 0
    keep: Path | None = None
    lm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    ctr: ClickConfig = field(default_factory=ClickConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)


class Interactions:
    """CTRL's first stage on a share of the training rows, which are drawn and tokenised once.

    Args:
        log: with the raw values of its fields.
        data: the prepared log.
        folder: with the language model.
        model: the CTR model's options.
    """

    def __init__(self, log: Log, data: str, folder: Path, options: Options) -> None:
        count, self.options, self.log = min(options.ctrl_rows, log.train.num_rows), options, log
        self.drawn = np.random.default_rng(options.seed).permutation(log.train.num_rows)[:count]
        tokenizer = Source(str(folder)).tokenizer(options.ctrl_length)
        texts = interaction_texts(log, data, log.train.take(pa.array(self.drawn)))
        self.tokens, self.padding = tokenizer(texts), tokenizer.padding
        click = ClickModel(log.schema, log.sizes, options.ctr, seed=options.seed)
        self.task = InteractionAlignment(LanguageModel.load(str(folder)), click, options.align)

    @property
    def mean_tokens(self) -> float:
        """Real tokens of an interaction."""
        return int(self.tokens.offsets[-1]) / len(self.drawn)

    def seconds(self, half: int) -> float:
        """Train on the first or the second half of the share; seconds an interaction."""
        own = np.array_split(np.arange(len(self.drawn)), 2)[half]
        rows, tokens = self.log.train.take(pa.array(self.drawn[own])), self.tokens.take(own)
        options = self.options
        progress = fit(
            self.task,
            lambda _: interaction_batches(self.log, rows, tokens, self.padding, options.align.batch_size),
            text_loop(options.align, len(own), 1, options.lm.precision, options.seed),
        )
        return progress.seconds / len(own)


def in_turns(log: Log, options: Options, table: np.ndarray) -> tuple[dict[str, list[float]], dict[str, ClickModel]]:
    """Epochs of the ID model and of MF² in turns, each going on from its last: seconds by model, and the models."""
    config, found, models = replace(options.ctr, epochs=1), {"id": [], "mf2": []}, {}
    kinds = {"id": (None, None), "mf2": (table, options.fuse)}
    for number in range(options.rounds):
        for name in sorted(kinds, reverse=bool(number % 2)):
            seed = options.seed + number
            models[name], facts = train_click(log, config, seed, *kinds[name], start=models.get(name))
            found[name].append(facts["train_seconds"])
    return found, models


def latencies(
    log: Log, models: dict[str, tuple[ClickModel, np.ndarray | None]], options: Options
) -> dict[str, np.ndarray]:
    """Milliseconds of each request by model; the first tenth of the requests, at least one, only warms up."""
    warm, schema, catalog = max(1, options.requests // 10), log.schema, log.catalog
    clocks = {name: partial(time_requests, scorer(schema, catalog, *model)) for name, model in models.items()}
    rounds = draw_requests(log, options.candidates, options.seed, options.requests + warm)
    return {name: ms[warm:].ravel() for name, ms in answer_in_turns(clocks, ([r] for r in rounds)).items()}


def measure(log: Log, data: str, folder: Path, options: Options) -> dict[str, Any]:
    """All figures, seconds by stage and epoch, as `table_3` takes them."""
    lm, seed = options.lm, options.seed
    dap, roma = folder / "dap", folder / "roma"
    model, _ = train_click(log, options.ctr, seed)
    say("ID model trained")
    found: dict[str, Any] = {"dap": language.pretrain(log, lm, options.pretrain, seed, dap)}
    say(f"DAP {found['dap']['seconds']:.0f} s")
    interactions = Interactions(log, data, dap, options)
    targets = alignment_targets(model, log.schema, log.catalog).numpy()
    before = interactions.seconds(0)
    found["roma"] = language.align(log, lm, dap, targets, options.align, seed, roma)
    ctrl = mean([before, interactions.seconds(1)])
    say(f"ROMA {found['roma']['seconds']:.0f} s, CTRL {ctrl * 1e3:.1f} ms an interaction")
    found["encode"] = language.encode(log, Source(str(roma)), options.encode, folder)
    say(f"encode {found['encode']['seconds']:.0f} s")
    table = np.load(folder / language.TABLE)
    rows = log.train.num_rows
    found["ctrl"] = {
        "epoch": ctrl * rows,
        "measured_rows": len(interactions.drawn),
        "tokens": round(interactions.mean_tokens * rows),
        "mean_tokens": interactions.mean_tokens,
    }
    epochs, models = in_turns(log, options, table)
    found |= {name: {"epochs": values, "epoch": median(values)} for name, values in epochs.items()}
    pairs = {"id": (models["id"], None), "fused": (models["mf2"], table)}
    found["latency"] = latencies(log, pairs, options)
    warm = replace(options.ctr, epochs=options.ctr.warm_epochs)
    for name, fuse, text in (("id", None, None), ("mf2", options.fuse, table)):
        _, facts = train_click(log, warm, seed, text, fuse, rows=log.valid, start=models[name])
        found[name]["later"] = facts["train_seconds"]
    new = np.unique(log.valid["item"].to_numpy())
    found["encode"]["new"] = int((log.counts[new] == 0).sum()) / len(log.catalog.items)
    for name, config in (("dap", options.pretrain), ("roma", options.align)):
        found[name]["epoch"] = found[name]["train_seconds"] / config.epochs
        found[name]["once"] = found[name]["seconds"] - found[name]["train_seconds"]
    return found


def whole(found: dict[str, Any], epochs: tuple[int, int, int], ctrl_epochs: int) -> dict[str, float]:
    """Seconds of each stage, and of both methods, at numbers of epochs.

    Args:
        epochs: of DAP, of ROMA and of the CTR models.
        ctrl_epochs: of CTRL's first stage. Its second one trains the CTR model as the ID model is trained.
    """
    dap, roma, click = epochs
    out = {
        "id": found["id"]["epoch"] * click,
        "dap": found["dap"]["epoch"] * dap + found["dap"]["once"],
        "roma": found["roma"]["epoch"] * roma + found["roma"]["once"],
        "encode": found["encode"]["seconds"],
        "mf2": found["mf2"]["epoch"] * click,
    }
    out["cela"] = sum(out.values())
    out["ctrl_1"] = found["ctrl"]["epoch"] * ctrl_epochs
    out["ctrl"] = out["ctrl_1"] + out["id"]
    return out


def own_epochs(options: Options) -> tuple[tuple[int, int, int], int]:
    """Epochs of DAP, ROMA and the CTR models by the options, and those of CTRL's first stage beside them."""
    return (options.pretrain.epochs, options.align.epochs, options.ctr.epochs), options.align.epochs


def ratios(found: dict[str, Any], options: Options) -> dict[str, float]:
    """What the measurement is for."""
    ours, papers = whole(found, *own_epochs(options)), whole(found, options.paper_epochs, options.ctrl_epochs)
    roma, ctrl, latency = found["roma"], found["ctrl"], found["latency"]
    models = found["id"]["later"] + found["mf2"]["later"]
    aligned = roma["epoch"] * options.align.warm_epochs + roma["once"] + found["encode"]["seconds"]
    by_epoch, by_tokens = roma["epoch"] / ctrl["epoch"], roma["tokens"] / ctrl["tokens"]
    out = {"mf2_over_id": found["mf2"]["epoch"] / found["id"]["epoch"]}
    for percent in (50, 99):
        fused, bare = (np.percentile(latency[name], percent) for name in ("fused", "id"))
        out[f"latency_fused_over_id_p{percent}"] = float(fused / bare)
    for name, costs in (("", ours), ("_papers_epochs", papers)):
        out[f"cela_over_id{name}"] = costs["cela"] / costs["id"]
        out[f"cela_over_ctrl{name}"] = costs["cela"] / costs["ctrl"]
    return out | {
        "roma_over_ctrl_epoch": by_epoch,
        "item_tokens_over_interaction_tokens": by_tokens,
        "roma_over_ctrl_over_tokens": by_epoch / by_tokens,
        "later_day_over_id": (models + aligned) / ours["id"],
        "later_day_not_aligned_over_id": (models + found["encode"]["seconds"] * found["encode"]["new"]) / ours["id"],
    }


def show(found: dict[str, Any], log: Log, options: Options) -> None:
    """The tables for people."""
    own, ctrl_own = own_epochs(options)
    ours, papers = whole(found, own, ctrl_own), whole(found, options.paper_epochs, options.ctrl_epochs)
    ctrl, threads = found["ctrl"], torch.get_num_threads()
    title = f"{log.train.num_rows:,} rows, {found['roma']['items']:,} of {len(log.catalog.items):,} items aligned, "
    table = Table(title=title + f"{options.ctr.backbone}, {threads} threads{options.log.said}")
    for name in ("stage", "of", "tokens", "s an epoch", "epochs", "s", "papers' epochs", "s"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    rows = log.train.num_rows
    (dap, roma, click), (dap_, roma_, click_) = own, options.paper_epochs
    for name, key, size, words, before, after in (
        ("ID model", "id", rows, None, click, click_),
        ("DAP", "dap", found["dap"]["items"], found["dap"]["tokens"], dap, dap_),
        ("ROMA", "roma", found["roma"]["items"], found["roma"]["tokens"], roma, roma_),
        ("encode", "encode", found["encode"]["items"], found["encode"]["tokens"], 1, 1),
        ("MF²", "mf2", rows, None, click, click_),
        ("CELA", "cela", None, None, None, None),
        ("CTRL, first stage *", "ctrl_1", rows, ctrl["tokens"], ctrl_own, options.ctrl_epochs),
        ("CTRL *", "ctrl", None, None, None, None),
    ):
        one = found["ctrl" if key == "ctrl_1" else key].get("epoch") if size else None
        shown = ["" if n is None else f"{n:,}" for n in (size, words)] + ["" if one is None else f"{one:,.1f}"]
        shown += ["" if before is None else str(before), f"{ours[key]:,.1f}"]
        table.add_row(name, *shown, "" if after is None else str(after), f"{papers[key]:,.1f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"* extrapolated from {ctrl['measured_rows']:,} interactions; the second stage as the ID model")
    for name, values in found["latency"].items():
        told = summary(values)
        console.print(
            f"{name:6} {len(values)} requests of {options.candidates:,}: {told['p50_ms']:.1f} ms p50, "
            f"{told['p99_ms']:.1f} ms p99"
        )
    for name, key in (("ID", "id"), ("MF²", "mf2")):
        epochs = found[key]["epochs"]
        console.print(f"{name:6} {len(epochs)} epochs in turns: {min(epochs):.1f} to {max(epochs):.1f} s")
    mean_tokens = found["roma"]["tokens"] / found["roma"]["items"]
    console.print(f"tokens {mean_tokens:.0f} of an item in ROMA, {ctrl['mean_tokens']:.0f} of an interaction")


def main(options: Options) -> None:
    """Measure, print the tables and the JSON line."""
    if not (options.pretrain.epochs and options.align.epochs):
        raise SystemExit("--pretrain.epochs and --align.epochs: at least 1 each, or there is nothing to measure")
    if options.threads:
        torch.set_num_threads(options.threads)
    with kept_in(options.keep) as folder, kept_in(None) as scratch:
        log = options.log.open(folder, raw=True)
        found = measure(log, options.log.prepared(folder), scratch, options)
    show(found, log, options)
    rows = [{"stage": name, **facts} for name, facts in found.items() if name != "latency"]
    rows += [{"stage": f"latency {name}", **summary(ms)} for name, ms in found["latency"].items()]
    print(json.dumps({"benchmark": "cost", "rows": rows, "ratios": ratios(found, options)}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
