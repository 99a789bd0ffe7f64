"""What each part of CELA is worth (the paper's table 4), and what it adds to other backbones (table 5).

Every variant is trained on the same rows and scored on the same test rows, by the tasks, the loop and the defaults of
the daily job in plain processes. The stages of the language model use all cores, and variants share those whose inputs
are the same; then the CTR models run one a core with the seeds of the ID model, with which each is paired: `p` is of a
paired t-test over these seeds. Variants have one run of the language model, CELA several: there a row is one run, and
the last one pairs each seed's mean over the runs.

With `--keep` every stage and every CTR model is written when it is done, and a rerun computes only what is missing or
depends on something that has changed; what the code does is not among these.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells import language  # noqa: E402
from benchmarks.cells.click import TARGETS, ClickCell  # noqa: E402
from benchmarks.cells.log import Log  # noqa: E402
from benchmarks.cells.options import LogOptions, kept_in  # noqa: E402
from benchmarks.cells.study import Study, paired_p, processes, spread  # noqa: E402
from ctrdist import backbones  # noqa: E402
from ctrdist.config import to_dict  # noqa: E402
from ctrdist.language.encode import EncodeConfig, Source  # noqa: E402
from ctrdist.storage import Manifest, State  # noqa: E402
from ctrdist.tasks.align import AlignConfig  # noqa: E402
from ctrdist.tasks.click import ClickConfig  # noqa: E402
from ctrdist.tasks.pretrain import PretrainConfig  # noqa: E402
from ctrdist.text_field import FuseConfig  # noqa: E402
from ctrdist.text_training import LanguageModelConfig  # noqa: E402

ID, CELA = "id", "cela"
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    ID: {},
    CELA: {},
    "plain-lm": {"pretrain": {"epochs": 0}, "align": {"epochs": 0}},
    "without-dap": {"pretrain": {"epochs": 0}},
    "without-roma": {"align": {"epochs": 0}},
    "without-simcse": {"pretrain": {"simcse_weight": 0.0}},
    "without-mlm": {"pretrain": {"mlm_weight": 0.0}},
    "roma-without-plm": {"align": {"freeze_language_model": True}},
    "cosine": {"align": {"similarity": "cosine"}},
    "without-text": {"fuse": {"source": "id"}},
    "popular-80": {"align": {"popular_share": 0.8}},
    "on-target": {"fuse": {"on": "target"}},
    "on-behaviours": {"fuse": {"on": "behaviours"}},
}
"""What each variant changes of the options' groups; the ID model has no text and uses `ctr` alone."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        table: the paper's table: 4, the variants, or 5, the ID model and CELA on each of `backbones`.
        log: rows, days and texts.
        variants: variants of table 4.
        backbones: networks of table 5.
        seeds: of the CTR models.
        lm_seeds: of the language model's runs; CELA takes all of them in table 4, all else the first one.
        processes: CTR models at a time, a thread each; 0 is one a core.
        keep: folder for what is done; a temporary one if not given.
        lm: the language model.
        ctr: the CTR model.
        pretrain: DAP.
        align: ROMA.
        encode: items to the text table.
        fuse: the text field.
    """

    table: Literal[4, 5] = 4
    log: LogOptions = field(default_factory=LogOptions)
    variants: tuple[str, ...] = tuple(VARIANTS)
    backbones: tuple[str, ...] = ("autoint", "dcnv2", "deepfm", "din")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lm_seeds: tuple[int, ...] = (0, 1, 2)
    processes: int = 0
    keep: Path | None = None
    lm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    ctr: ClickConfig = field(default_factory=ClickConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)

    def of(self, variant: str) -> "Options":
        """The options as a variant has them."""
        groups = {group: replace(getattr(self, group), **changes) for group, changes in VARIANTS[variant].items()}
        return replace(self, **groups)

    def plan(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Backbone, variant and runs of the language model, in the order in which they are computed; ID comes first."""
        if self.table == 5:
            yield from ((backbone, variant, self.lm_seeds[:1]) for backbone in self.backbones for variant in (ID, CELA))
            return
        for variant in dict.fromkeys((ID, *self.variants)):
            yield self.ctr.backbone, variant, self.lm_seeds if variant == CELA else self.lm_seeds[:1]


# --- the study: what the cells need, in the order in which they need it ---


@dataclass
class Ablation(Study):
    """The study of the tables' rows.

    Args:
        options: all of them.
    """

    options: Options

    def rows(self, backbone: str, variant: str, lm_seeds: tuple[int, ...]) -> list[dict[str, Any]]:
        """A variant's scores, one row for each run of the language model and seed of the CTR model."""
        options = self.options.of(variant)
        config = replace(options.ctr, backbone=backbone)
        cells = [ClickCell(config, seed, name=variant) for seed in dict.fromkeys((*options.seeds, *lm_seeds))]
        ids = by_seed(self.cells(cells))
        if variant == ID:
            return [self.row(backbone, ID, None, ids[seed], seed, 0.0) for seed in options.seeds]
        rows = []
        for lm_seed in lm_seeds:
            table, seconds = self.text_table(options, ids[lm_seed], lm_seed)
            cells = [ClickCell(config, seed, table, options.fuse, variant) for seed in options.seeds]
            done = by_seed(self.cells(cells))
            rows += [self.row(backbone, variant, lm_seed, done[seed], seed, seconds) for seed in options.seeds]
        return rows

    def row(
        self, backbone: str, variant: str, lm_seed: int | None, cell: Manifest, seed: int, lm_seconds: float
    ) -> dict[str, Any]:
        """A cell as the results have it."""
        about = {"backbone": backbone, "variant": variant, "lm_seed": lm_seed, "seed": seed}
        names = ("auc", "log_loss", "auc_cold", "valid_auc", "seconds")
        return about | {name: cell.facts[name] for name in names} | {"lm_seconds": lm_seconds}

    def text_table(self, options: Options, id_model: Manifest, seed: int) -> tuple[str, float]:
        """Name of a variant's text table, and seconds of the stages that made it, here or where they are shared."""
        if options.fuse.source == "id":
            return self.stage("tables", id_model.name, make=partial(self.table_of_embeddings, id_model.name)).name, 0.0
        log, local, lm = self.log, self.state.local, options.lm
        dap = self.pretrained(lm, options.pretrain, seed)
        stages, name = [dap], dap.name
        if options.align.epochs:
            made_of = [to_dict(lm), name, id_model.name, to_dict(options.align), seed, log.fingerprint]
            targets = np.load(local(id_model.name) / TARGETS)
            align = partial(language.align, log, lm, local(name), targets, options.align, seed)
            stages.append(self.stage("roma", *made_of, make=align))
            name = stages[-1].name
        made_of = [name, to_dict(options.encode), log.text_fingerprint]
        encode = partial(language.encode, log, Source(str(local(name))), options.encode)
        stages.append(self.stage("tables", *made_of, make=encode))
        return stages[-1].name, sum(stage.facts["seconds"] for stage in stages)

    def table_of_embeddings(self, id_model: str, out: Path) -> dict[str, Any]:
        """An ID model's item embeddings in place of a text table."""
        targets = np.load(self.state.local(id_model) / TARGETS)
        np.save(out / language.TABLE, targets * self.log.catalog.present[:, None])
        return {}


def by_seed(done: dict[ClickCell, Manifest]) -> dict[int, Manifest]:
    """Cells of several seeds, by these."""
    return {cell.seed: made for cell, made in done.items()}


# --- the tables ---


def lines(rows: list[dict[str, Any]], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows summed up over the seeds: a line for each backbone, variant and run of the language model, and one for the
    mean over the runs where there are several.

    `auc`, `log_loss` and `auc_cold` [seeds] each, `gain_...` of these over the ID model of the same backbone and seed,
    `p_...` of a paired t-test, and mean `seconds`.
    """
    scores = ("auc", "log_loss", "auc_cold")
    found: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        found.setdefault((row["backbone"], row["variant"], row["lm_seed"]), {})[row["seed"]] = row
    out = []
    for backbone, variant in dict.fromkeys(key[:2] for key in found):
        runs = [key for key in found if key[:2] == (backbone, variant)]
        groups = [(key[2], [key]) for key in runs] + ([("all", runs)] if len(runs) > 1 else [])
        for lm_seed, keys in groups:
            line: dict[str, Any] = {"backbone": backbone, "variant": variant, "lm_seed": lm_seed}
            for name in (*scores, "seconds", "lm_seconds"):
                line[name] = np.array([np.mean([found[key][seed][name] for key in keys]) for seed in seeds])
            for name in scores:
                alone = np.array([found[backbone, ID, None][seed][name] for seed in seeds])
                line[f"gain_{name}"] = line[name] - alone
                line[f"p_{name}"] = paired_p(line[name], alone)
            out.append(line)
    return out


def show(found: list[dict[str, Any]], options: Options, log: Log) -> None:
    """The table for people: means over the seeds and their standard deviations."""
    title = f"Table {options.table}: {log.train.num_rows:,} training, {log.test.num_rows:,} test rows, "
    title += f"{len(options.seeds)} seeds" + options.log.said
    table = Table(title=title)
    names = ("variant", "LM run", "AUC", "log loss", "AUC cold", "gain", "p", "gain cold", "p", "LM s", "CTR s")
    for name in names:
        table.add_column(name, justify="left" if name == "variant" else "right")
    for line in found:
        bare = line["variant"] == ID
        shown = [f"{line[name].mean():.4f} ± {spread(line[name]):.4f}" for name in ("auc", "log_loss", "auc_cold")]
        for name in ("auc", "auc_cold"):
            shown += ["", ""] if bare else [f"{line[f'gain_{name}'].mean():+.4f}", f"{line[f'p_{name}']:.3f}"]
        what = line["variant"] if options.table == 4 else f"{line['backbone']} {line['variant']}"
        shown += ["" if bare else f"{line['lm_seconds'].mean():.0f}", f"{line['seconds'].mean():.0f}"]
        table.add_row(what, "" if bare else str(line["lm_seed"]), *shown)
    Console(width=140).print(table)


def ratios(found: list[dict[str, Any]], table: int) -> dict[str, float]:
    """For machines: gains in the mean, by variant or by backbone, of all runs of the language model where there are
    several, and how far apart these runs are."""
    out: dict[str, float] = {}
    for line in found:
        name = line["variant"].replace("-", "_") if table == 4 else line["backbone"]
        if line["variant"] == ID:
            continue
        for what in ("auc", "log_loss", "auc_cold"):  # the line of all runs comes last
            out[f"gain_{what}_{name}"] = float(line[f"gain_{what}"].mean())
            out[f"p_{what}_{name}"] = line[f"p_{what}"]
    runs = [line for line in found if line["variant"] == CELA and line["lm_seed"] != "all"]
    if table == 4 and len(runs) > 1:
        for what in ("auc", "auc_cold"):
            out[f"sd_of_lm_runs_{what}"] = spread(np.array([line[what].mean() for line in runs]))
    return {name: value for name, value in out.items() if value == value}


def main(options: Options) -> None:
    """Compute what is missing, print the table and the JSON line."""
    unknown = set(options.variants) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"--variants: unknown {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    for backbone, _, _ in options.plan():
        backbones.check(backbone)
    with kept_in(options.keep) as folder:
        log = options.log.open(folder)
        with processes(log, options.processes) as pool:
            study = Ablation(log, State(folder / "ablation"), pool, options)
            rows = [row for of in options.plan() for row in study.rows(*of)]
    found = lines(rows, options.seeds)
    show(found, options, log)
    print(json.dumps({"benchmark": "ablation", "rows": rows, "ratios": ratios(found, options.table)}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
