"""The report's charts as inline SVG, drawn by matplotlib's objects (no pyplot, no state shared with the caller).

Colours are drawn as marks and then replaced by CSS variables, so that one SVG follows the page's light or dark scheme.
`standalone` makes a file of its own of one.
"""

import io
from collections.abc import Iterable

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

_INK, _GRID, _BAR = "#010203", "#010204", "#010205"
_SERIES = ("#010211", "#010212", "#010213", "#010214")
_VARIABLES = {_INK: "var(--soft)", _GRID: "var(--line)", _BAR: "var(--bar)"} | {
    mark: f"var(--series-{number})" for number, mark in enumerate(_SERIES)
}

SCHEMES = {
    "light": {
        "page": "#f5f6f8", "card": "#ffffff", "ink": "#17202c", "soft": "#5d6878", "line": "#e3e7ec", "bar": "#d5dde8",
        "series-0": "#64748b", "series-1": "#0f8b6d", "series-2": "#c2710c", "series-3": "#7c4dca",
        "good": "#0f8b6d", "bad": "#c0352b",
    },
    "dark": {
        "page": "#11151b", "card": "#1a2029", "ink": "#e8ecf2", "soft": "#9aa6b6", "line": "#2b333f", "bar": "#33404f",
        "series-0": "#a3b1c6", "series-1": "#34d3a6", "series-2": "#f2a945", "series-3": "#b494f5",
        "good": "#34d3a6", "bad": "#ff7a6e",
    },
}  # fmt: skip
"""Colours of the report's page and charts by the name of their CSS variable, for each scheme."""


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` inches with one styled plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    _style(axes)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9, length=0, pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)


def _svg(figure: Figure, title: str) -> Markup:
    """`figure` as an <svg> element that scales with the page; `title` is its text for those who cannot see it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    for mark, variable in _VARIABLES.items():
        text = text.replace(mark, variable)
    return Markup(text.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(title), 1))


def standalone(svg: Markup) -> str:
    """A chart as an SVG file: the light scheme's colours on their card, in place of the page's variables."""
    text = str(svg)
    for name, colour in SCHEMES["light"].items():
        text = text.replace(f"var(--{name})", colour)
    style = f'style="background: {SCHEMES["light"]["card"]}"'
    return text.replace("<svg", f"<svg {style}", 1)


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: _SERIES[number % len(_SERIES)] for number, name in enumerate(names)}


def popularity(groups: list[dict], models: dict[str, str]) -> Markup:
    """Figure 3 of the CELA paper: bars of test rows and lines of each model's AUC, by training rows of the item.

    Args:
        groups: as `metrics.popularity_groups`; an AUC may be None.
        models: title by name of the models to draw, in the order of their colours.
    """
    figure, bars = _axes(7.6, 3.5)
    where = range(len(groups))
    bars.bar(where, [group["rows"] for group in groups], color=_BAR, width=0.62)
    bars.set_xticks(list(where), [group["group"] for group in groups])
    bars.yaxis.set_major_formatter(FuncFormatter(short))
    bars.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _label(bars, "training rows of the item", "test rows (bars)")
    lines = bars.twinx()
    _style(lines)
    for (model, title), colour in zip(models.items(), _colours(models).values(), strict=True):
        values = [group["auc"].get(model) for group in groups]
        points = [float("nan") if value is None else value for value in values]
        lines.plot(where, points, color=colour, marker="o", markersize=5, linewidth=2, label=title)
    _label(lines, "", "AUC (lines)")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure, "Test rows and AUC of each model by training rows of the item")


def calibration(models: dict[str, list[dict]]) -> Markup:
    """Observed against predicted click rate, one line a model and the diagonal of a perfect one.

    Args:
        models: by name, the bins of `metrics.calibration`.
    """
    figure, axes = _axes(4.6, 3.5)
    values = [bin[key] for bins in models.values() for bin in bins for key in ("predicted", "observed")]
    top = max(values, default=1) * 1.05 or 1
    axes.plot([0, top], [0, top], color=_INK, linewidth=1, linestyle=(0, (3, 3)))
    for name, colour in _colours(models).items():
        points = [bin["predicted"] for bin in models[name]], [bin["observed"] for bin in models[name]]
        axes.plot(*points, color=colour, marker="o", markersize=4, linewidth=2, label=name)
    _label(axes, "predicted click rate", "observed click rate")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure, "Observed against predicted click rate")


def curve(points: list[list[float]], x: str, y: str, series: int = 0) -> Markup:
    """One line through `points` [[x, y], ...], with markers where they are few; `series` picks its colour."""
    figure, axes = _axes(3.7, 2.3)
    marker = "o" if len(points) <= 20 else None
    axes.plot(*zip(*points, strict=True), color=_SERIES[series], linewidth=1.8, marker=marker, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    _label(axes, x, y)
    return _svg(figure, f"{y} by {x}")


def shares(rows: dict[str, list[float]], x: str) -> Markup:
    """Shares as a table of cells, the darker the larger: a row for each name, a column for each number.

    Args:
        rows: by name, as many numbers of 0 or more each.
        x: what the columns are.
    """
    columns = len(next(iter(rows.values())))
    figure, axes = _axes(1.6 + 0.8 * columns, 0.9 + 0.32 * len(rows))
    axes.grid(visible=False)
    top = max(max(values) for values in rows.values()) or 1
    for line, values in enumerate(rows.values()):
        for column, value in enumerate(values):
            axes.barh(line, 0.94, left=column + 0.53, height=0.86, color=_SERIES[1], alpha=0.75 * value / top)
            axes.text(column + 1, line, f"{value:.2f}", ha="center", va="center", fontsize=9, color=_INK)
    axes.set_xlim(0.5, columns + 0.5)
    axes.set_xticks(range(1, columns + 1))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    _label(axes, x, "")
    return _svg(figure, f"Shares of each {x}, by row")


def short(value: float, _position: int | None = None) -> str:
    """A count as a person says it: 950, 12k, 3.4M, 1.2B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.6g}"
