"""The report of a day's run: `report.json` for machines, `report.html` for people, one table for the job's end.

All three are made from one plain dictionary that holds what JSON holds:

    date, release          str
    rows                   {"train", "valid", "test", "cold", "quarantined": count}
    window                 {"train", "valid", "test": [first day, last day]}
    quarantine             {"folder": str or None, "reasons": {reason: count}}
    models                 {name: as `metrics.evaluate`}; "best" scores by the true click
                           probability, which only a synthetic world knows: no model does better
    gain                   as `metrics.gain`
    groups                 as `metrics.popularity_groups`
    quadrants              as `metrics.quadrants`
    gate                   as `gate.decide`: whether the release became champion, and why
    attention              {field: [share of each prompt]}, of the attention of a field's masked words
    stages                 {name: {"seconds", "rows", "skipped", "losses": [[step, loss], ...],
                           "valid_auc": [[epoch, auc], ...], "data_wait": share of the training
                           time spent waiting for the next batch}}, in the order they ran
    text_table             {"items", "dim"}
    peak_memory_bytes      count or None
    config, versions       dictionaries of what the run was made with

Only `date` and `models` must be there. What is missing, None or NaN is shown as a dash, or not at all.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ctrdist.metrics import json_safe

if TYPE_CHECKING:
    from markupsafe import Markup

STAGE_TITLES = {
    "id": "ID model",
    "dap": "Domain-adaptive pre-training",
    "roma": "Item alignment",
    "encode": "Text table",
    "mf2": "Fused model",
    "train": "Training",
    "m_llm": "Modified language model",
    "represent": "Representations",
    "backbone": "Backbone alone",
    "distill": "Gain and vanilla network",
    "tokens": "Rows as tokens",
    "pretrain": "Masked words with prompts",
    "without_plm": "Fine-tuning without the language model",
    "with_plm": "Fine-tuning with the language model",
    "evaluate": "Evaluation",
    "inference": "Inference time",
}
"""What a person calls each stage; a second round of one is named `roma_2`."""


def write_report(report: Mapping, folder: Path) -> Path:
    """Writes `report.json` and a self-contained `report.html` to `folder`; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    report = json_safe(report)
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render_html(report), encoding="utf-8")
    return page


def render_html(report: Mapping) -> str:
    """The report as one HTML page with no outside assets: charts are inline SVG, and it follows light or dark mode."""
    # Jinja2 and matplotlib take a second to import, which `--help` and the workers would pay for nothing.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from ctrdist.charts import SCHEMES

    report = json_safe(report)
    environment = Environment(
        loader=PackageLoader("ctrdist"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "count": count,
        "metric": metric,
        "signed": signed,
        "duration": duration,
        "size": size,
        "rate": rate,
        "p_value": p_value,
        "share": share,
        "stage": stage_title,
        "model": model_title,
        "gate_rows": gate_rows,
        "json": lambda value: json.dumps(value, indent=2, default=str),
    }
    models, stages = report["models"], report.get("stages") or {}
    sections = {name: report.get(name) or {} for name in _SECTIONS}
    return environment.get_template("report.html.j2").render(
        report=report, **sections, models=models, stages=stages, plots=plots(report), schemes=SCHEMES
    )


_SECTIONS = ("rows", "window", "quarantine", "gain", "gate", "text_table", "config", "versions")


def plots(report: Mapping) -> dict[str, "Markup"]:
    """The report's charts by name, as <svg> elements for a page that defines the colours of `charts.SCHEMES`.

    `popularity`, `calibration`, `attention`, and for each stage that has them `STAGE_loss`, `STAGE_auc` and
    `STAGE_valid_loss`.
    """
    from ctrdist import charts

    report = json_safe(report)
    models, stages, groups = report["models"], report.get("stages") or {}, report.get("groups") or []
    bins = {model_title(name): model["calibration"] for name, model in models.items() if model.get("calibration")}
    grouped = {name: model_title(name) for name in models if any(name in group["auc"] for group in groups)}
    drawn = {"popularity": charts.popularity(groups, grouped)} if groups else {}
    if bins:
        drawn["calibration"] = charts.calibration(bins)
    if report.get("attention"):
        drawn["attention"] = charts.shares(report["attention"], "prompt")
    for name, stage in stages.items():
        if loss := finite(stage.get("losses")):
            drawn[f"{name}_loss"] = charts.curve(loss, "step", "loss")
        if valid := finite(stage.get("valid_auc")):
            drawn[f"{name}_auc"] = charts.curve(valid, "epoch", "validation AUC", series=1)
        if held := finite(stage.get("valid_loss")):
            drawn[f"{name}_valid_loss"] = charts.curve(held, "epoch", "loss of held-out items", series=1)
    return drawn


def write_plots(report: Mapping, folder: Path) -> None:
    """Writes each chart of `plots` to a file `NAME.svg` of its own in `folder`."""
    from ctrdist import charts

    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in plots(report).items():
        (folder / f"{name}.svg").write_text(charts.standalone(plot), encoding="utf-8")


def console_table(report: Mapping, width: int = 100) -> str:
    """The report in about 20 lines of plain text, `width` columns wide: what the job prints last."""
    report = json_safe(report)
    rows, quarantine = report.get("rows") or {}, report.get("quarantine") or {}
    gain = report.get("gain") or {}
    models = _table("model", "AUC", "log loss", "GAUC", "AUC cold", "log loss cold")
    for name, model in report["models"].items():
        values = (model.get(key) for key in ("auc", "log_loss", "gauc", "auc_cold", "log_loss_cold"))
        models.add_row(model_title(name), *map(metric, values))
    gained = [Text(f"gain  overall {_gain_phrase(gain, 'auc')},  cold {_gain_phrase(gain, 'cold')}")] if gain else []
    stages = _table("stage", "seconds", "rows", "rows/s", "waiting for data", "")
    for name, stage in (report.get("stages") or {}).items():
        note = "skipped: complete from an earlier run" if stage.get("skipped") else ""
        seconds = "-" if stage.get("seconds") is None else f"{stage['seconds']:,.1f}"
        stages.add_row(name, seconds, count(stage.get("rows")), rate(stage), share(stage.get("data_wait")), note)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("rows", ", ".join(f"{count(rows.get(part))} {part}" for part in ("train", "valid", "test", "cold")))
    folder = f" in {quarantine['folder']}" if quarantine.get("folder") else ""
    facts.add_row("quarantined", f"{count(rows.get('quarantined'))}{folder}")
    facts.add_row("release", report.get("release") or "-")
    facts.add_row("peak memory", size(report.get("peak_memory_bytes")))
    return _as_text(width, Text(f"CTR report {report['date']}"), Text(), models, *gained, Text(), stages, Text(), facts)


def gate_rows(decision: Mapping) -> list[tuple[str, ...]]:
    """The numbers of a gate's decision as text: measure, challenger, champion, difference, 95% interval, p value.

    The p value is of what the gate asks: of a loss to a champion, or of a gain over the constant click rate.
    """
    mine, champion = decision.get("challenger"), decision.get("champion")
    if not mine:
        return []
    other, rows = champion or decision["constant"], []
    for name, title, lost, gained in (
        ("auc", "AUC", "not_below", "not_above"),
        ("log_loss", "log loss", "not_above", "not_below"),
    ):
        drawn = decision[name]
        interval, p = f"{signed(drawn['low'])} to {signed(drawn['high'])}", drawn[lost if champion else gained]
        rows.append((title, metric(mine[name]), metric(other[name]), signed(drawn["value"]), interval, p_value(p)))
    for name, title in (("calibration_ratio", "prediction / click rate"), ("calibration_error", "calibration error")):
        rows.append((title, metric(mine[name]), metric(other[name]), "", "", ""))
    for name in ("known_users", "known_items") if champion else ():
        rows.append((name.replace("_", " "), share(mine[name]), share(other[name]), "", "", ""))
    return rows


def gate_table(decision: Mapping, challenger: str, other: str, width: int = 100) -> str:
    """`gate_rows` as plain text, with what to call the two."""
    return text_table(["", challenger, other, "difference", "95% interval", "p"], gate_rows(decision), width)


def text_table(titles: list[str], rows: list[list[str]], width: int = 100) -> str:
    """A table as plain text; the first column, and one without a title, are to the left."""
    table = _table(*titles)
    for row in rows:
        table.add_row(*row)
    return _as_text(width, table)


def _as_text(width: int, *parts: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(Group(*parts))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _table(name: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(name, min_width=12)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    return table


def _gain_phrase(gain: Mapping, key: str) -> str:
    if gain.get(key) is None:
        return "-"
    error = "" if gain.get(f"{key}_se") is None else f" ± {gain[f'{key}_se']:.4f}"
    p = "" if gain.get(f"{key}_p") is None else f" ({p_value(gain[f'{key}_p'])})"
    return f"{signed(gain[key])}{error}{p}"


def finite(points: list | None) -> list:
    """The points [[x, y], ...] that can be drawn."""
    return [point for point in points or [] if point[1] is not None]


def stage_title(name: str) -> str:
    """A stage's name for people: "roma_2" is "Item alignment (2)"; an unknown name stays."""
    base, _, turn = (name, "", "") if name in STAGE_TITLES else name.partition("_")
    return STAGE_TITLES.get(base, base) + (f" ({turn})" if turn else "")


def model_title(name: str) -> str:
    """A model's name for people: "best" is the known truth of a synthetic world."""
    return "best possible" if name == "best" else name


def count(value: float | None) -> str:
    """12345 as "12,345"; None as a dash."""
    return "-" if value is None else f"{value:,.0f}"


def metric(value: float | None) -> str:
    """Four decimals, as the papers print them; None as a dash."""
    return "-" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """A difference with its sign and four decimals; None as a dash."""
    return "-" if value is None else f"{value:+.4f}".replace("-", "−")


def p_value(value: float | None) -> str:
    """ "p = 0.012", or "p < 0.001" where it is smaller; None as a dash."""
    if value is None:
        return "-"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def duration(seconds: float | None) -> str:
    """12.3 s, 4 min 5 s, 2 h 3 min; None as a dash."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def share(value: float | None) -> str:
    """0.0123 as "1.2%"; None as a dash."""
    return "-" if value is None else f"{value:.1%}"


def size(value: float | None) -> str:
    """Bytes as GiB or MiB; None as a dash."""
    if value is None:
        return "-"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def rate(stage: Mapping) -> str:
    """Rows a second of a stage, or a dash where it was skipped or has no rows."""
    rows, seconds = stage.get("rows"), stage.get("seconds")
    return "-" if stage.get("skipped") or not rows or not seconds else count(rows / seconds)
