"""ClickPrompt's training steps beside the plain masked-word step of the same language model, in one run.

Same texts, same batches, same language model, one process, in turns; the median counts. `mlm` is the language model
alone on masked words, `pretrain` PA-MLM (the CTR model writes prompts that it reads), `with_plm` and `without_plm` the
two fine-tunings. A step is batch, forward, backward and update. Texts have the lengths of rows of ids, names and a
title. A peak is the best rate of a sweep of square matrix products in the same run; of a step all matrix products
count that it computes, padding's included.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import encode  # noqa: E402
from ctrdist.allocator import keep_freed_memory  # noqa: E402
from ctrdist.batch import Batch, join_items  # noqa: E402
from ctrdist.embedding import tables_of  # noqa: E402
from ctrdist.group import Group  # noqa: E402
from ctrdist.items import Ragged, offsets_of  # noqa: E402
from ctrdist.language.model import load_tokenizer  # noqa: E402
from ctrdist.language.prompts import PromptConfig  # noqa: E402
from ctrdist.language.source import DEFAULT  # noqa: E402
from ctrdist.language.tokens import pad  # noqa: E402
from ctrdist.loop import make_optimizer, update  # noqa: E402
from ctrdist.precision import Precision, computing_in, use_bfloat16  # noqa: E402
from ctrdist.prompted import finetuning_task, pretraining_task, rates  # noqa: E402
from ctrdist.schema import Field, Schema  # noqa: E402
from ctrdist.tasks import Task  # noqa: E402
from ctrdist.tasks.click import ClickConfig, ClickModel  # noqa: E402
from ctrdist.tasks.pretrain import PretrainConfig  # noqa: E402
from ctrdist.tasks.prompted import PromptPretrainConfig  # noqa: E402
from ctrdist.tasks.prompted_click import PromptFinetuneConfig  # noqa: E402
from ctrdist.text_training import LanguageModelConfig  # noqa: E402
from ctrdist.text_training import pretraining_task as plain_task  # noqa: E402

SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"),), history_length=20)


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        lm: a Hugging Face name or a local folder.
        rows: of a batch.
        length: tokens of a text on average, special tokens included; they vary by a third of it.
        users: rows of the users' table.
        items: rows of the items' table.
        steps: of each, in turns.
        ctr: the CTR model.
        prompts: what the language model reads besides.
        precision: of the language model; `auto` computes in bfloat16 where the chip does.
        threads: 0 takes all cores.
        device: cpu or cuda.
    """

    lm: str = DEFAULT
    rows: int = 128
    length: int = 48
    users: int = 100_000
    items: int = 100_000
    steps: int = 7
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(backbone="dcnv2"))
    prompts: PromptConfig = field(default_factory=PromptConfig)
    precision: Precision = "auto"
    threads: int = 0
    device: str = "cpu"


def batches(options: Options) -> list[Batch]:
    """As many batches as steps, and one to begin with."""
    draw, tokenizer = np.random.default_rng(0), load_tokenizer(options.lm)
    special = tokenizer("", add_special_tokens=True)["input_ids"]
    limit = tokenizer.model_max_length
    made = []
    for _ in range(options.steps + 1):
        lengths = np.clip(draw.normal(options.length, options.length / 3, options.rows), 4, limit).astype(int)
        ids = draw.integers(max(special, default=0) + 1, len(tokenizer), lengths.sum()).astype(np.int32)
        offsets = offsets_of(lengths)
        if len(special) == 2:
            ids[offsets[:-1]], ids[offsets[1:] - 1] = special
        item = draw.integers(2, options.items, options.rows)
        batch = join_items(
            draw.random(options.rows) < 0.4,
            {"user_id": draw.integers(2, options.users, options.rows).astype(np.int32)},
            item,
            draw.integers(0, options.items, (options.rows, SCHEMA.history_length)),
            {"item_id": np.arange(options.items, dtype=np.int32)},
        )
        made.append(replace(batch, tokens=pad(Ragged(ids, offsets), item, tokenizer.pad_token_id or 0)))
    return made


def contestants(options: Options) -> dict[str, Task]:
    """The tasks, each with a language model of its own."""
    lm = LanguageModelConfig(name=options.lm, precision=options.precision)
    sizes = {"user_id": options.users, "item_id": options.items}
    pretrain, finetune = PromptPretrainConfig(), PromptFinetuneConfig()

    def click(config: ClickConfig) -> ClickModel:
        return ClickModel(SCHEMA, sizes, config)

    return {
        "mlm": plain_task(lm, PretrainConfig(simcse_weight=0.0), 0),
        "pretrain": pretraining_task(click(rates(options.ctr, pretrain)), lm, options.prompts, pretrain, 0),
        "with_plm": finetuning_task(click(rates(options.ctr, finetune)), lm, options.prompts, finetune, None, 0),
        "without_plm": click(options.ctr),
    }


def stepper(task: Task, options: Options) -> Callable[[Batch], None]:
    """One step of training, as the loop takes it."""
    task.to(options.device).train()
    optimizer, tables, group = make_optimizer(task), tables_of(task), Group()
    plain = not tables  # the language model alone, whose precision is then the loop's
    precision = options.precision if plain else options.ctr.precision

    def step(batch: Batch) -> None:
        batch = (batch.tokens if plain else batch).to(options.device)
        with computing_in(precision, options.device):
            loss = task(batch)["loss"]
        update(loss, optimizer, tables, group)
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def main(options: Options) -> None:
    """Measure, print the table, and the JSON line."""
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    first, *rest = batches(options)
    steps = {name: stepper(task, options) for name, task in contestants(options).items()}
    work = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step(first)
        work[name] = counter.get_total_flops()
    took: dict[str, list[float]] = {name: [] for name in steps}
    for batch in rest:
        for name, step in steps.items():
            began = time.perf_counter()
            step(batch)
            took[name].append(time.perf_counter() - began)
    peaks = encode.peak(encode.Options(device=options.device))
    half = use_bfloat16(options.precision, options.device)
    own = {name: peaks["bfloat16" if half and name != "without_plm" else "float32"] for name in steps}
    seconds = {name: median(times) for name, times in took.items()}
    rows = [
        {"step": name, "samples_s": options.rows / seconds[name], "ms": 1000 * seconds[name],
         "cost_of_mlm": seconds[name] / seconds["mlm"], "peak_share": work[name] / seconds[name] / own[name]}
        for name in steps
    ]  # fmt: skip
    lengths = np.concatenate([batch.tokens.lengths for batch in rest])
    table = Table(title=f"batches of {options.rows}, {lengths.mean():.0f} tokens a row, {options.device}")
    for name in ("", "samples/s", "ms a step", "cost of a plain step", "share of the peak"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        cells = (
            f"{row['samples_s']:,.0f}",
            f"{row['ms']:,.1f}",
            f"{row['cost_of_mlm']:.2f}",
            f"{row['peak_share']:.1%}",
        )
        table.add_row(row["step"], *cells)
    Console(width=100).print(table)
    ratios = {f"{row['step']}_over_mlm": row["cost_of_mlm"] for row in rows[1:]}
    ratios |= {f"peak_share_{row['step']}": row["peak_share"] for row in rows}
    print(json.dumps({"benchmark": "prompt_step", "rows": rows, "peaks": peaks, "ratios": ratios}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
