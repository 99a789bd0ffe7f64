"""ELEC on MovieTweetings: the vanilla network beside its own backbone alone, the gain network and the M-LLM.

One modified language model, on the states of the items' texts, serves the networks of all seeds. A pair and its
backbone have the same seed, and so the same initial weights and order of rows; `p` is of a paired t-test over these.
`--variants` are the paper's table 3, `--lms` its table 4. Nothing is chosen here.

With `--keep` every stage and every network is written when it is done, and a rerun computes only what is missing or
depends on something that has changed; what the code does is not among these.
"""

import json
import re
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

from benchmarks.cells import language  # noqa: E402
from benchmarks.cells.click import ClickCell  # noqa: E402
from benchmarks.cells.elec import PairCell, train_m_llm  # noqa: E402
from benchmarks.cells.options import LogOptions, kept_in  # noqa: E402
from benchmarks.cells.study import Study, paired_p, processes, spread  # noqa: E402
from ctrdist.config import to_dict  # noqa: E402
from ctrdist.interaction_text import TextConfig, item_texts  # noqa: E402
from ctrdist.items import by_catalog_row, read_items  # noqa: E402
from ctrdist.language import source as language_models  # noqa: E402
from ctrdist.language.encode import EncodeConfig, Source  # noqa: E402
from ctrdist.storage import Manifest, State  # noqa: E402
from ctrdist.tasks.click import ClickConfig  # noqa: E402
from ctrdist.tasks.distill import DistillConfig  # noqa: E402
from ctrdist.tasks.m_llm import MLLMConfig  # noqa: E402
from ctrdist.tasks.pretrain import PretrainConfig  # noqa: E402
from ctrdist.text_training import LanguageModelConfig  # noqa: E402

ELEC = "elec"
VARIANTS: dict[str, dict[str, Any]] = {
    ELEC: {},
    "without-text": {"without_text": True},
    "without-clid": {"clid_weight": 0.0},
    "without-mse": {"mse_weight": 0.0},
    "share-embeddings": {"share_embeddings": True},
}
"""What each variant changes of `distill`."""
METRICS = ("auc", "log_loss", "auc_cold", "calibration_error")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        log: rows, days and texts.
        lm: the language model.
        lms: what ELEC reads with: `plain`, the language model as it comes; `dap`, after CELA's pre-training on the
            items' texts; `first-3`, its first three layers, or another number; `random`, one like it that has learnt
            nothing; or another one, by name or folder.
        variants: of ELEC, with the first of `lms`: those of the paper's table 3, and `share-embeddings`.
        seeds: one backbone, and one pair for each language model and variant.
        processes: networks at a time, a thread each; 0 is one a core.
        keep: folder for what is done; a temporary one if not given.
        ctr: the network.
        m_llm: the layers on the language model.
        distill: how the gain network teaches.
        text: what the language model reads of an item.
        pretrain: DAP.
        encode: texts to states.
    """

    log: LogOptions = field(default_factory=LogOptions)
    lm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    lms: tuple[str, ...] = ("plain",)
    variants: tuple[str, ...] = (ELEC,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    processes: int = 0
    keep: Path | None = None
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(backbone="dcnv2"))
    m_llm: MLLMConfig = field(default_factory=MLLMConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    text: TextConfig = field(default_factory=TextConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)

    def plan(self) -> Iterator[tuple[str, str]]:
        """Language model and variant, in the order in which they are computed."""
        yield from ((lm, ELEC) for lm in self.lms)
        yield from ((self.lms[0], variant) for variant in dict.fromkeys(self.variants) if variant != ELEC)


@dataclass
class ElecStudy(Study):
    """The study of the tables' rows.

    Args:
        options: all of them.
        data: the prepared log.
    """

    options: Options
    data: str

    def rows(self) -> Iterator[dict[str, Any]]:
        """What every network scores, and what it took."""
        options = self.options
        alone = self.cells([ClickCell(options.ctr, seed, name="backbone") for seed in options.seeds])
        for cell, made in alone.items():
            yield row("backbone", "", "", cell.seed, made.facts)
        for lm, variant in options.plan():
            distill, m_llm = replace(options.distill, **VARIANTS[variant]), ""
            if not distill.without_text:
                made = self.m_llm(lm)
                m_llm = made.name
                if variant == ELEC:
                    yield row("m_llm", lm, "", 0, made.facts)
            name = f"{variant} {lm}"
            cells = [PairCell(options.ctr, distill, seed, m_llm, name) for seed in options.seeds]
            for cell, made in self.cells(cells).items():
                yield row("gain", lm, variant, cell.seed, made.facts | made.facts["gain"])
                yield row("vanilla", lm, variant, cell.seed, made.facts)

    def m_llm(self, lm: str) -> Manifest:
        """The layers on a language model, and the rows' representations."""
        options, config = self.options, self.options.encode
        name, known = self.language_model(lm)
        source, items = Source(name, pooling="mean"), read_items(self.data, self.log.schema)
        texts = item_texts(items, self.log.schema, options.text, source.tokenizer(config.max_length))
        log = replace(self.log, texts=by_catalog_row(texts, items, self.log.catalog.ids))
        log = log.with_texts_of(options.log.share)
        encode = partial(language.encode, log, source, config)
        states = self.stage("states", known, to_dict(config), log.text_fingerprint, make=encode)

        def make(out: Path) -> dict[str, Any]:
            table = np.load(self.state.local(states.name) / language.TABLE)
            return train_m_llm(log, table, options.m_llm, 0, out)

        return self.stage("m_llm", states.name, to_dict(options.m_llm), log.fingerprint, make=make)

    def language_model(self, lm: str) -> tuple[str, list[Any]]:
        """Name or folder of one of `Options.lms`, and what tells it from any other."""
        name = self.options.lm.name
        known = [name, language_models.identity(name)]
        layers = re.fullmatch(r"first-(\d+)", lm)
        if lm == "dap":
            made = self.pretrained(self.options.lm, self.options.pretrain, 0)
        elif layers:
            count = int(layers[1])
            made = self.stage("first", *known, count, make=partial(language.first_layers, name, count))
        elif lm == "random":
            made = self.stage("random", *known, make=partial(language.random_weights, name, 0))
        else:
            return (name, known) if lm == "plain" else (lm, [lm, language_models.identity(lm)])
        return str(self.state.local(made.name)), [made.name]


def row(model: str, lm: str, variant: str, seed: int, facts: dict[str, Any]) -> dict[str, Any]:
    """A network as the results have it."""
    about = {"model": model, "lm": lm, "variant": variant, "seed": seed}
    # A network that was kept before there was such a metric has none of it.
    names = (*METRICS, "valid_auc", "ms_a_step", "seconds")
    return about | {name: facts.get(name, float("nan")) for name in names}


def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows summed up over their seeds: `model`, `lm`, `variant`; each of `METRICS`, and `ms_a_step` [seeds]; of a
    vanilla network, `gain_...` over the backbone of the same seed and `p_...` of a paired t-test."""
    names, out = (*METRICS, "ms_a_step"), []
    for key in dict.fromkeys((r["model"], r["lm"], r["variant"]) for r in rows):
        own = sorted((r for r in rows if (r["model"], r["lm"], r["variant"]) == key), key=lambda r: r["seed"])
        line = dict(zip(("model", "lm", "variant"), key, strict=True))
        line |= {name: np.array([r[name] for r in own]) for name in names}
        if line["model"] == "vanilla":
            line |= {f"gain_{name}": line[name] - out[0][name] for name in METRICS}
            line |= {f"p_{name}": paired_p(line[name], out[0][name]) for name in METRICS}
        out.append(line)
    return out


def show(found: list[dict[str, Any]], title: str) -> None:
    """The table for people: means over the seeds and their standard deviations."""
    table = Table(title=title)
    for name in ("model", "LM", "variant"):
        table.add_column(name)
    for name in ("AUC", "log loss", "AUC cold", "ECE", "gain", "p", "gain cold", "p", "ms a step"):
        table.add_column(name, justify="right")
    for line in found:
        shown = [f"{line[name].mean():.4f} ± {spread(line[name]):.4f}" for name in METRICS]
        for name in ("auc", "auc_cold"):
            gain = line.get(f"gain_{name}")
            shown += ["", ""] if gain is None else [f"{gain.mean():+.4f}", f"{line[f'p_{name}']:.3f}"]
        table.add_row(line["model"], line["lm"], line["variant"], *shown, f"{line['ms_a_step'].mean():.1f}")
    Console(width=180).print(table)


def ratios(found: list[dict[str, Any]]) -> dict[str, float]:
    """For machines: what the vanilla network has over its backbone in the mean, and the time of a step; of the first
    language model and ELEC itself without more words, then by language model or variant."""
    out: dict[str, float] = {}
    first = next(line for line in found if line["model"] == "vanilla")
    for line in found:
        if line["model"] != "vanilla":
            continue
        of = line["lm"] if line["variant"] == ELEC else line["variant"]
        suffix = "" if line is first else f"_{Path(of).name.replace('-', '_')}"
        for name in METRICS:
            out[f"{name}_vanilla_less_backbone{suffix}"] = float(line[f"gain_{name}"].mean())
            out[f"p_{name}{suffix}"] = line[f"p_{name}"]
        out[f"pair_step_over_backbone{suffix}"] = float(line["ms_a_step"].mean() / found[0]["ms_a_step"].mean())
    return {name: value for name, value in out.items() if value == value}


def main(options: Options) -> None:
    """Compute what is missing, print the table and the JSON line."""
    unknown = set(options.variants) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"--variants: unknown {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    with kept_in(options.keep) as folder:
        log, data = options.log.open(folder), options.log.prepared(folder)
        with processes(log, options.processes) as pool:
            rows = list(ElecStudy(log, State(folder / "elec"), pool, options, data).rows())
    found = lines(rows)
    sizes = f"{log.train.num_rows:,} training, {log.test.num_rows:,} test rows, {len(options.seeds)} seeds"
    show(found, f"{sizes}; {options.ctr.backbone}{options.log.said}")
    print(json.dumps({"benchmark": "elec", "rows": rows, "ratios": ratios(found)}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
