"""What a sweep leaves: a table for the console, a page with plots, and the best options as a file for the daily job."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import yaml

from ctrdist.config import to_dict
from ctrdist.report import metric, text_table
from ctrdist.space import Dimension, Values
from ctrdist.storage import masked
from ctrdist.trials import Standing, Trial, shown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BEST, PAGE = "best.yaml", "sweep.html"
ONE_RUN = ("date", "config", "from_scratch", "workers", "plan")
"""Options that are of the run, and not of the method; those of the cluster were those of a trial."""


def sweep_table(standings: list[Standing], space: list[Dimension], most: int = 10) -> str:
    """The best sets of values, one a line, with mean and standard deviation over the seeds of a finalist."""
    fields = [dimension.field for dimension in space]
    rows = []
    for place, standing in enumerate(standings[:most], start=1):
        trial = standing.trial
        note = "the options' own values" if trial.number == 0 else ""
        note = "stopped early" if trial.status == "stopped" else note
        spread = "-" if standing.spread is None else f"{standing.spread:.4f}"
        repeated = metric(standing.mean) if standing.repeats else "-"
        values = [shown(trial.values[field]) for field in fields]
        numbers = [metric(trial.auc), repeated, spread, str(len(standing.repeats) or "-"), str(len(trial.curve))]
        rows.append([str(place), str(trial.number), *values, *numbers, note])
    titles = ["place", "trial", *fields, "valid AUC", "other seeds", "spread", "seeds", "epochs", ""]
    return text_table(titles, rows, width=100 + 32 * len(fields))


def best_options(options: Any, values: Values, job: str, about: str) -> str:
    """Options as the YAML file that the daily job takes with `--config`: what is not as the job has it by itself.

    What is of one run alone is left out, and a tracking server's address that holds a password.

    Args:
        options: of the best, a dataclass.
        values: what was drawn for it; said in any case.
        job: the file that takes it.
        about: one line for its head.
    """
    content = _changes(options, type(options)(), values)
    for name in ONE_RUN:
        content.pop(name, None)
    run, server = f"python jobs/{job}.py --config THIS_FILE", content.get("tracking_uri") or ""
    if masked(server) != server:
        del content["tracking_uri"]
        run += " --tracking-uri URI  (left out here: it holds a password)"
    return f"# {about}\n#     {run}\n" + yaml.safe_dump(content, sort_keys=False)


def _changes(options: Any, usual: Any, values: Values, prefix: str = "") -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            value = _changes(value, getattr(usual, field.name), values, f"{name}.")
            if value:
                found[field.name] = value
        elif name in values or value != getattr(usual, field.name):
            found[field.name] = to_dict(value)
    return found


def sweep_page(title: str, table: str, trials: list[Trial], space: list[Dimension], warnings: list[str]) -> str:
    """A page with the table, parallel coordinates, and the AUC by each field's values; it needs no network.

    Args:
        trials: of the search and of the finalists.
    """
    from markupsafe import Markup, escape

    drawn = [trial for trial in trials if trial.auc is not None]
    figures = [parallel_coordinates(drawn, space), sensitivity(drawn, space)] if drawn else []
    plots = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        for number, figure in enumerate(figures)
    ]
    notes = Markup("").join(Markup("<p>Warning: {}</p>").format(warning) for warning in warnings)
    style = "body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1120px; color: #17202c; }"
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{style} pre {{ overflow-x: auto; font-size: 13px; }}</style></head>\n<body><h1>{escape(title)}</h1>"
        f"<pre>{escape(table)}</pre>{notes}\n{''.join(plots)}</body></html>\n"
    )


def parallel_coordinates(trials: list[Trial], space: list[Dimension]) -> "Figure":
    """A line a trial through its values, and its validation AUC, which is its colour too."""
    from plotly import graph_objects

    axes = []
    for dimension in space:
        values = [trial.values[dimension.field] for trial in trials]
        axis: dict[str, Any] = {"label": dimension.field}
        if dimension.kind == "choice":
            known = list(dict.fromkeys([*dimension.arguments, *values]))
            axis |= {"values": [known.index(value) for value in values]}
            axis |= {"tickvals": list(range(len(known))), "ticktext": [shown(value) for value in known]}
        elif dimension.kind == "loguniform" and min(values) > 0:
            ends = [math.log10(end) for end in dimension.ends]
            ticks = [ends[0] + (ends[1] - ends[0]) * part / 4 for part in range(5)]
            axis |= {"values": [math.log10(value) for value in values]}
            axis |= {"tickvals": ticks, "ticktext": [f"{10**tick:.3g}" for tick in ticks]}
        else:
            axis |= {"values": values}
        axes.append(axis)
    aucs = [trial.auc for trial in trials]
    axes.append({"label": "validation AUC", "values": aucs})
    line = {"color": aucs, "colorscale": "Viridis", "showscale": True}
    figure = graph_objects.Figure(graph_objects.Parcoords(line=line, dimensions=axes))
    return figure.update_layout(title="Trials, by value and validation AUC", height=420)


def sensitivity(trials: list[Trial], space: list[Dimension]) -> "Figure":
    """The validation AUC by each field's values, one plot a field; how a trial ended is its colour."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    columns = min(2, len(space))
    rows = -(-len(space) // columns)
    figure = make_subplots(rows, columns, subplot_titles=[dimension.field for dimension in space])
    groups = {
        "ran to the end": ("#0f8b6d", [t for t in trials if t.status == "done" and not t.repeat]),
        "stopped early": ("#a3b1c6", [t for t in trials if t.status == "stopped"]),
        "finalist, another seed": ("#c2710c", [t for t in trials if t.repeat]),
    }
    for number, dimension in enumerate(space):
        row, column = number // columns + 1, number % columns + 1
        for name, (colour, group) in groups.items():
            x = [trial.values[dimension.field] for trial in group]
            x = [shown(value) for value in x] if dimension.kind == "choice" else x
            marks = graph_objects.Scatter(
                x=x, y=[t.auc for t in group], text=[t.name for t in group], mode="markers", name=name,
                marker={"color": colour, "size": 8}, legendgroup=name, showlegend=number == 0,
            )  # fmt: skip
            figure.add_trace(marks, row, column)
        if dimension.kind == "choice":
            order = [shown(value) for value in dimension.arguments]
            figure.update_xaxes(type="category", categoryorder="array", categoryarray=order, row=row, col=column)
        elif dimension.kind == "loguniform":
            figure.update_xaxes(type="log", exponentformat="none", row=row, col=column)
    return figure.update_layout(title="Validation AUC by each field", height=120 + 320 * rows)
