"""ELEC on MovieTweetings: the vanilla network beside its own backbone alone, the gain network and the M-LLM.

One modified language model, on the states of the items' texts, serves the networks of all seeds. A pair and its
backbone have the same seed, and so the same initial weights and order of rows. Nothing is chosen here.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells.click import score, train_click  # noqa: E402
from benchmarks.cells.elec import train_m_llm, train_pair, with_representations  # noqa: E402
from benchmarks.cells.language import text_table  # noqa: E402
from benchmarks.cells.options import LogOptions, kept_in  # noqa: E402
from ctrdist.interaction_text import TextConfig, item_texts  # noqa: E402
from ctrdist.items import by_catalog_row, read_items  # noqa: E402
from ctrdist.language.encode import EncodeConfig, Source  # noqa: E402
from ctrdist.tasks.click import ClickConfig  # noqa: E402
from ctrdist.tasks.distill import DistillConfig  # noqa: E402
from ctrdist.tasks.m_llm import MLLMConfig  # noqa: E402

METRICS = {"auc": "AUC", "log_loss": "log loss", "auc_cold": "AUC cold", "ms_a_step": "ms a step"}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        log: rows, days and texts.
        lm: a Hugging Face name or a local folder.
        seeds: one backbone and one pair each.
        ctr: the network.
        m_llm: the layers on the language model.
        distill: how the gain network teaches.
        text: what the language model reads of an item.
        encode: texts to states.
    """

    log: LogOptions = field(default_factory=LogOptions)
    lm: str = "sentence-transformers/all-MiniLM-L6-v2"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(backbone="dcnv2"))
    m_llm: MLLMConfig = field(default_factory=MLLMConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    text: TextConfig = field(default_factory=TextConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)


def main(options: Options) -> None:
    """Measure, print a table, and the JSON line."""
    torch.set_num_threads(1)
    with kept_in(None) as folder:
        log = options.log.open(folder)
        items = read_items(options.log.prepared(folder), log.schema)
    rows, along, width = [], log, 0
    if not options.distill.without_text:
        texts = by_catalog_row(item_texts(items, log.schema, options.text), items, log.catalog.ids)
        source = Source(options.lm, pooling="mean")
        states, _ = text_table(replace(log, texts=texts), source, options.encode)
        m_llm, took = train_m_llm(log, states, options.m_llm, 0)
        rows.append({"model": "m_llm", "seed": 0} | score(log, m_llm, states) | took)
        along, width = with_representations(log, m_llm, states), m_llm.width
    for seed in options.seeds:
        backbone, took = train_click(log, options.ctr, seed)
        rows.append({"model": "backbone", "seed": seed} | score(log, backbone) | took)
        pair, took = train_pair(along, options.ctr, options.distill, width, seed)
        for name, model in (("gain", pair.whole_gain()), ("vanilla", pair.vanilla)):
            rows.append({"model": name, "seed": seed} | score(along, model) | took)
        print(*(f"{row['model']} {row['auc']:.4f}" for row in rows[-3:]), file=sys.stderr, flush=True)
    means = {(row["model"], key): np.mean([r[key] for r in rows if r["model"] == row["model"]])
             for row in rows for key in METRICS}  # fmt: skip
    table = Table(title=f"{log.train.num_rows:,} training, {log.test.num_rows:,} test rows; {options.ctr.backbone}")
    table.add_column("model")
    for title in (*METRICS.values(), "spread of AUC"):
        table.add_column(title, justify="right")
    for name in dict.fromkeys(row["model"] for row in rows):
        aucs = [row["auc"] for row in rows if row["model"] == name]
        numbers = [f"{means[name, key]:.{1 if key == 'ms_a_step' else 4}f}" for key in METRICS]
        table.add_row(name, *numbers, f"{max(aucs) - min(aucs):.4f}")
    Console(width=100).print(table)
    ratios = {f"{key}_vanilla_less_backbone": float(means["vanilla", key] - means["backbone", key])
              for key in ("auc", "log_loss", "auc_cold")}  # fmt: skip
    ratios["pair_step_over_backbone"] = float(means["vanilla", "ms_a_step"] / means["backbone", "ms_a_step"])
    print(json.dumps({"benchmark": "elec", "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
