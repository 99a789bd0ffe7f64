"""ClickPrompt on MovieTweetings: the backbone beside what pre-training makes of it, without and with the LM.

All of a seed have the same order of rows; the backbone alone and a new CTR model begin alike. `no_prompts`,
`no_pretraining` and `neither` are the variants of the paper's table 5, with the language model. Nothing is chosen here.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells.click import score, train_click  # noqa: E402
from benchmarks.cells.clickprompt import finetune, pretrain, with_tokens  # noqa: E402
from benchmarks.cells.options import LogOptions, kept_in  # noqa: E402
from ctrdist.export import load_click_model  # noqa: E402
from ctrdist.items import read_items  # noqa: E402
from ctrdist.language.prompts import PromptConfig  # noqa: E402
from ctrdist.row_texts import RowTextConfig  # noqa: E402
from ctrdist.tasks.click import ClickConfig  # noqa: E402
from ctrdist.tasks.prompted import PromptPretrainConfig  # noqa: E402
from ctrdist.tasks.prompted_click import PromptFinetuneConfig  # noqa: E402
from ctrdist.text_training import LanguageModelConfig  # noqa: E402

Variant = Literal["with_plm", "no_prompts", "no_pretraining", "neither"]
METRICS = {"auc": "AUC", "log_loss": "log loss", "auc_cold": "AUC cold"}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        log: rows, days and texts.
        row_share: share of the training rows, the newest ones: less for a quick run.
        lm: the language model.
        text: what it reads of a row.
        prompts: what it reads besides.
        ctr: the CTR model.
        pretrain: masked words with prompts.
        finetune: fine-tuning with the language model.
        seeds: one of each model each.
        variants: which fine-tunings with the language model.
        device: cpu or cuda.
    """

    log: LogOptions = field(default_factory=LogOptions)
    row_share: float = 1.0
    lm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    text: RowTextConfig = field(default_factory=RowTextConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(backbone="dcnv2"))
    pretrain: PromptPretrainConfig = field(default_factory=PromptPretrainConfig)
    finetune: PromptFinetuneConfig = field(default_factory=PromptFinetuneConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[Variant, ...] = ("with_plm",)
    device: str = "cpu"


def main(options: Options) -> None:
    """Measure, print a table, and the JSON line."""
    with kept_in(None) as folder:
        log = options.log.open(folder, raw=True)
        log = with_tokens(log, read_items(options.log.prepared(folder), log.schema), options.lm.name, options.text)
    log = replace(log, train=log.train.slice(round((1 - options.row_share) * log.train.num_rows)))
    rows = []
    for seed in options.seeds:
        backbone, took = train_click(log, options.ctr, seed)
        rows.append({"model": "backbone", "seed": seed} | score(log, backbone) | took)
        with tempfile.TemporaryDirectory() as scratch:
            start = Path(scratch)
            parts = options.ctr, options.lm, options.prompts
            took = pretrain(log, *parts, options.pretrain, seed, start, options.device)
            rows.append({"model": "pretrain", "seed": seed} | took)
            model, took = train_click(log, options.ctr, seed, start=load_click_model(start, log.schema, options.ctr))
            rows.append({"model": "without_plm", "seed": seed} | score(log, model) | took)
            for name in options.variants:
                config = replace(options.finetune, prompts=name not in ("no_prompts", "neither"))
                before = None if name in ("no_pretraining", "neither") else start
                model, took = finetune(log, *parts, config, seed, before, options.device)
                rows.append({"model": name, "seed": seed} | score(log, model) | took)
        found = {row["model"]: row["auc"] for row in rows if row["seed"] == seed and "auc" in row}
        print(seed, *(f"{name} {auc:.4f}" for name, auc in found.items()), file=sys.stderr, flush=True)
    report(options, log.train.num_rows, log.test.num_rows, rows)


def report(options: Options, train: int, test: int, rows: list[dict]) -> None:
    """Print the means over seeds, and the JSON line."""
    names = dict.fromkeys(row["model"] for row in rows)
    means = {
        (name, key): float(np.mean([row.get(key, np.nan) for row in rows if row["model"] == name]))
        for name in names
        for key in (*METRICS, "seconds")
    }
    table = Table(title=f"{train:,} training, {test:,} test rows; {options.ctr.backbone}, {options.lm.name}")
    table.add_column("model")
    for title in (*METRICS.values(), "seconds", "spread of AUC"):
        table.add_column(title, justify="right")
    for name in names:
        aucs = [row["auc"] for row in rows if row["model"] == name and "auc" in row]
        cells = ["-" if np.isnan(means[name, key]) else f"{means[name, key]:.4f}" for key in METRICS]
        spread = f"{max(aucs) - min(aucs):.4f}" if aucs else "-"
        table.add_row(name, *cells, f"{means[name, 'seconds']:.1f}", spread)
    Console(width=100).print(table)
    ratios = {
        f"{key}_{name}_less_backbone": means[name, key] - means["backbone", key]
        for name in names
        if name not in ("backbone", "pretrain")
        for key in METRICS
    }
    print(json.dumps({"benchmark": "clickprompt", "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
