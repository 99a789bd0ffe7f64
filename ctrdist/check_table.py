"""What `ctrdist.check` found, as a table for people."""

import io
import math
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ctrdist.check import COLD_BELOW, Check, share_of

SHOWN_DAYS = 14
"""More days than this are shown as bars side by side, not on a line each."""
BARS, MAX_BARS = " ▁▂▃▄▅▆▇█", 70


def show(found: Check, width: int = 100) -> str:
    """A check as plain text for a terminal; the last line says how many rows are bad."""
    parts: list[RenderableType] = [_facts(found), _days(found)]
    fields = _table("field", "side", "values", "min_count", "rarer values", "rows of these")
    for name, f in found.fields.items():
        counts = (f"{f[key]:,}" for key in ("values", "min_count", "rare_values"))
        fields.add_row(name, f["side"], *counts, _percent(f["rare_share"]))
    columns = ("min", "p01", "p25", "p50", "p75", "p99", "max")
    numbers = _table("number", "side", *columns, "null", "NaN", "infinite")
    for name, f in found.numbers.items():
        counts = (f"{f[key]:,}" for key in ("nulls", "nan", "infinite"))
        numbers.add_row(name, f["side"], *(f"{f[key]:.4g}" for key in columns), *counts)
    parts += [table for table in (fields, numbers) if table.rows]
    for title, findings in (("WRONG", found.faults), ("worth a look", found.notes)):
        lines = [title]
        for name, finding in findings.items():
            lines += [f"  {name}: {finding.count:,}", *(f"      {_example(one)}" for one in finding.examples)]
        parts += [Text("\n".join(lines))] if findings else []
    bad = f"{found.bad:,} of {found.rows:,} rows are bad ({found.bad / found.rows:.2%}): a job puts them in quarantine"
    parts.append(Text(bad if found.bad else f"nothing is wrong in {found.rows:,} rows"))
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, markup=False, emoji=False)
    console.print(found.data, soft_wrap=True)
    for part in parts:
        console.print()
        console.print(part, soft_wrap=isinstance(part, Text))  # whole paths, to be copied
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _facts(found: Check) -> Table:
    facts, days = Table.grid(padding=(0, 2)), list(found.days)
    facts.add_row("rows", f"{found.rows:,} on {len(days):,} days, {days[0]} to {days[-1]}; {found.bad:,} of them bad")
    facts.add_row("click rate", _percent(found.click_rate))
    if found.splits:
        facts.add_row("splits", ", ".join(f"{name} {rows:,}" for name, rows in found.splits.items()))
    facts.add_row("users, items", f"{found.users:,} users; {found.items:,} items, {found.items_with_rows:,} with rows")
    if c := found.cold:
        rows, items, all_ = (_percent(share_of(c[f"cold_{key}"], c[key])) for key in ("rows", "items", "all_items"))
        shares = f"{rows} of {c['rows']:,} rows, {items} of {c['items']:,} items with rows, {all_} of all items"
        facts.add_row(f"cold, {c['part']}", f"{shares} (those with under {COLD_BELOW} rows {c['reference']})")
    if h := found.histories:
        lengths = f"{h['mean_length'] or 0:.1f} items long in the mean, {h['max_length']:,} at most"
        strangers = f"{_percent(share_of(h['strangers'], h['behaviours']))} of their items are not in items/"
        facts.add_row("histories", f"{_percent(h['share'])} of rows have one, {lengths}; {strangers}")
    if t := found.texts:
        unit = f"{t['unit']} (by {t['tokenizer']})" if t["tokenizer"] else t["unit"]
        lengths = ", ".join(f"{key} {t[key]:,.0f}" for key in ("min", "p50", "p90", "p95", "p99", "max"))
        measured = f"{unit} in {t['measured']:,} texts: {lengths}; " if t["measured"] else ""
        facts.add_row("texts", f"{measured}{t['items_without']:,} items have none")
    for side, columns in found.nulls.items():
        some = ", ".join(f"{name} {count:,}" for name, count in columns.items() if count)
        facts.add_row(f"nulls in {side}/", some or "none")
    return facts


def _days(found: Check) -> Table:
    frame = pd.DataFrame(list(found.days.values()), pd.DatetimeIndex(found.days), dtype=float)
    rows, rates = frame["rows"], frame["click_rate"]
    if len(frame) <= SHOWN_DAYS:
        table = _table("day", "rows", "bad", "click rate", "")
        for day, counts in found.days.items():
            bar = "█" * math.ceil(30 * counts["rows"] / rows.max())
            table.add_row(day, f"{counts['rows']:,}", f"{counts['bad']:,}", _percent(counts["click_rate"]), bar)
        return table
    span = (frame.index[-1] - frame.index[0]).days + 1
    days = math.ceil(span / MAX_BARS)
    bars = frame.resample(f"{days}D").mean()  # of the days with rows; the last bar may stand for fewer
    spread = ", ".join(f"{name} {getattr(rows, name)():,.0f}" for name in ("min", "median", "max"))
    spread_of_rates = ", ".join(f"{name} {_percent(getattr(rates, name)())}" for name in ("min", "median", "max"))
    table = Table.grid(padding=(0, 2))
    table.add_row("rows a day", f"first {rows.iloc[0]:,.0f}, last {rows.iloc[-1]:,.0f}, {spread}")
    table.add_row("a bar a day" if days == 1 else f"a bar: {days} days", _bars(bars["rows"]))
    table.add_row("click rate", f"first {_percent(rates.iloc[0])}, last {_percent(rates.iloc[-1])}, {spread_of_rates}")
    table.add_row("", _bars(bars["clicks"] / (bars["rows"] - bars["bad"])))
    return table


def _bars(values: pd.Series) -> str:
    """A bar for each value, the largest one full; NaN and 0 are blank."""
    eighths = np.ceil(8 * values / values.max()).fillna(0).astype(int)
    return "".join(BARS[height] for height in eighths)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if not number or column in ("side", "") else "right", no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{share:.1%}"


def _example(example: dict[str, Any]) -> str:
    return example["day"] if "day" in example else f"{example['file']} row {example['row']:,}: {example['value']}"
