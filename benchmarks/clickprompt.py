"""ClickPrompt on MovieTweetings: the backbone beside what pre-training makes of it, without and with the LM.

All of a seed have the same order of rows; the backbone alone and a new CTR model begin alike. `backbone_finetune` is
the backbone alone with the rates, batches, epochs and warm-up of fine-tuning: what `with_plm` gains beyond it is the
language model's. Variants of the one with the language model: `first_layer` has prompts in that alone (the paper's
table 4, as is `--prompts.count`), `no_prompts`, `no_pretraining` and `neither` are table 5's; other CTR and language
models (tables 3 and 9) are `--ctr.backbone` and `--lm.name`. `p` is of a paired t-test over the seeds. Nothing is
chosen here.

With `--keep` every stage and every model is written when it is done, and a rerun computes only what is missing or
depends on something that has changed; what the code does is not among these.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells.click import ClickCell  # noqa: E402
from benchmarks.cells.clickprompt import finetune, pretrain, with_tokens  # noqa: E402
from benchmarks.cells.options import LogOptions, kept_in  # noqa: E402
from benchmarks.cells.study import Study, paired_p, processes, spread  # noqa: E402
from ctrdist.config import to_dict  # noqa: E402
from ctrdist.items import read_items  # noqa: E402
from ctrdist.language import source  # noqa: E402
from ctrdist.language.prompts import PromptConfig  # noqa: E402
from ctrdist.prompted import rates  # noqa: E402
from ctrdist.row_texts import RowTextConfig  # noqa: E402
from ctrdist.storage import Manifest, State  # noqa: E402
from ctrdist.tasks.click import ClickConfig  # noqa: E402
from ctrdist.tasks.prompted import PromptPretrainConfig  # noqa: E402
from ctrdist.tasks.prompted_click import PromptFinetuneConfig  # noqa: E402
from ctrdist.text_training import LanguageModelConfig  # noqa: E402

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "with_plm": {},
    "first_layer": {"prompts": {"layers": "first"}},
    "no_prompts": {"finetune": {"prompts": False}},
    "no_pretraining": {"pretrain": {"epochs": 0}},
    "neither": {"pretrain": {"epochs": 0}, "finetune": {"prompts": False}},
}
"""What each variant changes of the options' groups."""
METRICS = {"auc": "AUC", "log_loss": "log loss", "auc_cold": "AUC cold"}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        log: rows, days and texts.
        lm: the language model.
        text: what it reads of a row.
        prompts: what it reads besides.
        ctr: the CTR model.
        pretrain: masked words with prompts.
        finetune: fine-tuning with the language model.
        seeds: one of each model each.
        variants: which fine-tunings with the language model: `with_plm`, `first_layer`, `no_prompts`, `no_pretraining`,
            `neither`.
        processes: CTR models without one at a time, a thread each; 0 is one a core.
        keep: folder for what is done; a temporary one if not given.
        device: cpu or cuda, for what has a language model.
    """

    log: LogOptions = field(default_factory=LogOptions)
    lm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    text: RowTextConfig = field(default_factory=RowTextConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(backbone="dcnv2"))
    pretrain: PromptPretrainConfig = field(default_factory=PromptPretrainConfig)
    finetune: PromptFinetuneConfig = field(default_factory=PromptFinetuneConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("with_plm",)
    processes: int = 0
    keep: Path | None = None
    device: str = "cpu"

    def of(self, variant: str) -> "Options":
        """The options as a variant has them."""
        groups = {group: replace(getattr(self, group), **changes) for group, changes in VARIANTS[variant].items()}
        return replace(self, **groups)

    def ctr_in_finetuning(self) -> ClickConfig:
        """The CTR model's options as they are beside the language model."""
        own = {
            name: getattr(self.finetune, name) for name in ("batch_size", "epochs", "schedule", "warmup", "patience")
        }
        return replace(rates(self.ctr, self.finetune), **own)


@dataclass
class ClickPromptStudy(Study):
    """The study of the table's rows.

    Args:
        options: all of them.
    """

    options: Options

    def rows(self) -> Iterator[dict[str, Any]]:
        """What every model scores, and what it took."""
        options, seeds = self.options, dict.fromkeys(self.options.seeds)
        yield from self.click_models("backbone", options.ctr, dict.fromkeys(seeds, ""))
        yield from self.click_models("backbone_finetune", options.ctr_in_finetuning(), dict.fromkeys(seeds, ""))
        starts = {seed: self.pretrained(options, seed) for seed in seeds}
        for seed, made in starts.items():
            yield {"model": "pretrain", "seed": seed} | took(made.facts)
        yield from self.click_models("without_plm", options.ctr, {seed: made.name for seed, made in starts.items()})
        for variant in dict.fromkeys(options.variants):
            for seed in seeds:
                made = self.finetuned(options.of(variant), variant, seed)
                yield {"model": variant, "seed": seed} | scored(made.facts)

    def click_models(self, name: str, ctr: ClickConfig, starts: dict[int, str]) -> Iterator[dict[str, Any]]:
        """CTR models without the language model, by seed from an output with a model to begin with."""
        cells = [ClickCell(ctr, seed, name=name, start=start) for seed, start in starts.items()]
        for cell, made in self.cells(cells).items():
            yield {"model": name, "seed": cell.seed} | scored(made.facts)

    def pretrained(self, options: Options, seed: int) -> Manifest:
        """Both models and the prompt writer after pre-training."""
        made_of = [*self.parts(options), to_dict(options.pretrain), seed]
        args = options.ctr, options.lm, options.prompts, options.pretrain, seed, options.device
        return self.stage("pretrain", *made_of, make=partial(pretrain, self.log, *args))

    def finetuned(self, options: Options, variant: str, seed: int) -> Manifest:
        """A fine-tuning with the language model."""
        name = self.pretrained(options, seed).name if options.pretrain.epochs else ""
        start = self.state.local(name) if name else None
        args = options.ctr, options.lm, options.prompts, options.finetune, seed, start, options.device
        made_of = [*self.parts(options), to_dict(options.finetune), seed, name]
        return self.stage(variant, *made_of, make=partial(finetune, self.log, *args))

    def parts(self, options: Options) -> list[Any]:
        """What every model with a language model depends on."""
        groups = [to_dict(part) for part in (options.lm, options.text, options.prompts, options.ctr)]
        return [self.log.fingerprint, source.identity(options.lm.name), *groups]


def took(facts: dict[str, Any]) -> dict[str, float]:
    """What of an output's facts tells its costs."""
    return {name: facts[name] for name in ("seconds", "ms_a_step")}


def scored(facts: dict[str, Any]) -> dict[str, float]:
    """What of an output's facts the table is made of."""
    return {name: facts[name] for name in (*METRICS, "valid_auc")} | took(facts)


def main(options: Options) -> None:
    """Compute what is missing, print the table and the JSON line."""
    unknown = set(options.variants) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"--variants: unknown {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    if not options.pretrain.epochs:
        raise SystemExit("--pretrain.epochs 0: nothing is pre-trained; that is variant no_pretraining")
    with kept_in(options.keep) as folder:
        log = options.log.open(folder, raw=True)
        items = read_items(options.log.prepared(folder), log.schema)
        log = with_tokens(log, items, options.lm.name, options.text, options.prompts)
        with processes(log, options.processes) as pool:
            rows = list(ClickPromptStudy(log, State(folder / "clickprompt"), pool, options).rows())
    found = lines(rows)
    title = f"{log.train.num_rows:,} training, {log.test.num_rows:,} test rows, {len(options.seeds)} seeds"
    show(found, f"{title}; {options.ctr.backbone}, {options.lm.name}")
    print(json.dumps({"benchmark": "clickprompt", "rows": rows, "ratios": ratios(found)}))


def lines(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows summed up over their seeds, by model: `auc`, `log_loss`, `auc_cold` [seeds] where it has them, `gain_...` of
    these over the backbone of the same seed, `p_...` of a paired t-test, and mean `seconds`."""
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        line: dict[str, Any] = {key: np.array([row[key] for row in own]) for key in METRICS if key in own[0]}
        if name not in ("backbone", "pretrain"):
            line |= {f"gain_{key}": line[key] - out["backbone"][key] for key in METRICS}
            line |= {f"p_{key}": paired_p(line[key], out["backbone"][key]) for key in METRICS}
        out[name] = line | {"seconds": float(np.mean([row["seconds"] for row in own]))}
    return out


def show(found: dict[str, dict[str, Any]], title: str) -> None:
    """The table for people: means over the seeds and their standard deviations."""
    table = Table(title=title)
    for name in ("model", *METRICS.values(), "gain", "p", "gain cold", "p", "seconds"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, line in found.items():
        shown = [f"{line[key].mean():.4f} ± {spread(line[key]):.4f}" if key in line else "" for key in METRICS]
        for key in ("auc", "auc_cold"):
            gain = line.get(f"gain_{key}")
            shown += ["", ""] if gain is None else [f"{gain.mean():+.4f}", f"{line[f'p_{key}']:.3f}"]
        table.add_row(name, *shown, f"{line['seconds']:.0f}")
    Console(width=120).print(table)


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """For machines: what each model has over the backbone in the mean."""
    out: dict[str, float] = {}
    for name, line in found.items():
        for key in METRICS:
            if f"gain_{key}" in line:
                out[f"{key}_{name}_less_backbone"] = float(line[f"gain_{key}"].mean())
                out[f"p_{key}_{name}"] = line[f"p_{key}"]
    return {name: value for name, value in out.items() if value == value}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
