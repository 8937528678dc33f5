"""A report as one HTML file that needs no network: charts by uPlot (51 KB, MIT), which is in the file, and tables."""

import base64
import html
import json
from importlib import resources
from typing import Any

import numpy as np

from lm.experiments import tables
from lm.experiments.runs import Run, differing

MARK = '<meta name="generator" content="lm report">'
"""By which a file is known to be a report of lm's."""
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
CURVES = (
    ("loss", "Loss: training (thin), validation (thick)", "nats per token"),
    ("learning_rate", "Learning rate", ""),
    ("gradient_norm", "Gradient norm, before clipping", ""),
    ("tokens_per_second", "Throughput", "tokens per second"),
)
CONTROLS = """<p class="controls">
<label>by <select id="axis"><option>steps<option>tokens<option>seconds</select></label>
<label>means over <select id="smooth"><option>1<option>3<option>10<option>30</select> points</label>
<label><input type="checkbox" id="log-x"> log x</label> <label><input type="checkbox" id="log-y"> log y</label>
</p>"""


def page(title: str, runs: list[Run], sections: list[str], notes: list[str]) -> str:
    """Return a report.

    Args:
        title: Its title.
        runs: The runs that it is about.
        sections: What stands between the charts and the tables, as HTML.
        notes: What was not to be had.
    """
    charts = [chart for chart in (_chart(*curve, runs) for curve in CURVES) if chart["lines"]] + _health(runs)
    places = "\n".join(f'<div class="chart" id="{chart["id"]}"></div>' for chart in charts)
    data = json.dumps(charts, allow_nan=False).replace("<", "\\u003c")
    notes = [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}',
        f"<title>{html.escape(title)}</title><style>{_asset('report.css')}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1>",
        f"{CONTROLS}\n{places}" if charts else "<p>No curve is there yet.</p>",
        *sections,
        "<h2>At the end</h2>",
        _figures(runs),
        _settings(runs),
        _samples(runs),
        "".join(f'<p class="notes">{html.escape(note)}</p>' for note in notes),
        f'</main><script id="data" type="application/json">{data}</script>',
        f"<script>{_asset('uplot.min.js')}</script><script>{_asset('report.js')}</script>" if charts else "",
        "</body></html>\n",
    ]
    return "\n".join(filter(None, parts))


def pictures(title: str, pngs: dict[str, bytes]) -> str:
    """Return a section of pictures, as HTML with the pictures in it.

    Args:
        title: Its heading.
        pngs: Each by its name.
    """
    parts = []
    for name, png in pngs.items():
        said = html.escape(name.replace("-", " "))
        data = base64.b64encode(png).decode()
        parts.append(
            f'<figure><img alt="{said}" src="data:image/png;base64,{data}"><figcaption>{said}</figcaption></figure>'
        )
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def _asset(name: str) -> str:
    return (resources.files("lm.experiments") / name).read_text(encoding="utf-8")


def _chart(name: str, title: str, unit: str, runs: list[Run]) -> dict[str, Any]:
    """Return a chart's curves, of all runs; training and validation loss are in one."""
    lines = []
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        label = run.name if len(runs) > 1 else ""
        if name == "loss":
            lines += [
                _line(run, "train/loss", f"{label} training".strip(), colour + "88" * (len(runs) > 1), dense=True),
                _line(run, "val/loss", f"{label} validation".strip(), colour if len(runs) > 1 else COLOURS[1]),
            ]
        else:
            found = [column for column in run.table.columns if column.startswith(f"train/{name}")]
            for column in found:
                other = column.removeprefix(f"train/{name}").lstrip("_")
                lines.append(_line(run, column, f"{label or name} {other}".strip(), colour, dense=True))
    return {"id": name, "title": title, "unit": unit, "lines": [line for line in lines if line]}


def _line(run: Run, column: str, label: str, colour: str, *, dense: bool = False) -> dict[str, Any] | None:
    """Return a curve with all of its horizontal axes; None where a run has it not."""
    steps, values = tables.smoothed(*run.table.curve(column))
    if len(steps) == 0:
        return None
    axes = {
        "steps": steps,
        "tokens": tables.at_steps(run.table.curve("train/tokens"), steps),
        "seconds": tables.at_steps(tables.seconds(run.table), steps),
    }
    found = {name: tables.rounded(axis) for name, axis in axes.items() if axis is not None}
    return {"label": label, "colour": colour, "dense": dense, "y": tables.rounded(values), **found}


def _health(runs: list[Run]) -> list[dict[str, Any]]:
    """Return charts of what is measured of layers, of the first run that has it: many curves each."""
    titles = {
        "update_ratio": "Update sizes: log10 of the update over the weights; about -3 is healthy",
        "dead_units": "Dead units: those that pass no gradient",
        "saturation": "Share of saturated tanh units",
    }
    charts = []
    for run in [run for run in runs if run.health][:1]:
        for kind, title in titles.items():
            tags = [tag for tag in run.health if tag.startswith(f"{kind}/")]
            lines = []
            for i, tag in enumerate(tags):
                steps, values = (np.array(part, dtype=float) for part in zip(*run.health[tag], strict=True))
                line = {"label": tag.partition("/")[2], "colour": COLOURS[i % len(COLOURS)], "dense": False}
                lines.append(line | {"steps": tables.rounded(steps), "y": tables.rounded(values)})
            if lines:
                named = f"{title} ({run.name})" if len(runs) > 1 else title
                charts.append({"id": kind, "title": named, "unit": "", "lines": lines})
    return charts


def shown(value: Any) -> str:
    """Return a figure or a setting as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool | str | list | dict):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e9 else f"{value:.5g}"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a table as HTML; its first column names the row."""

    def cell(value: Any) -> str:
        kind = ' class="number"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
        return f"<td{kind}>{html.escape(shown(value))}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "\n".join(f"<tr><th>{html.escape(str(row[0]))}</th>{''.join(map(cell, row[1:]))}</tr>" for row in rows)
    return f'<table class="grid"><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>'


def _figures(runs: list[Run]) -> str:
    found = [run.figures() for run in runs]
    names = dict.fromkeys(name for one in found for name in one)
    return table(["", *(run.name for run in runs)], [[name, *(one.get(name) for one in found)] for name in names])


def _settings(runs: list[Run]) -> str:
    """Return the settings that differ, and all of them to unfold."""
    head = ["setting", *(run.name for run in runs)]
    rows = [[name, *values] for name, values in differing(runs).items()]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    every = [[name, *(run.settings.get(name) for run in runs)] for name in names]
    parts = []
    if len(runs) > 1:
        parts += ["<h2>Settings that differ</h2>", table(head, rows) if rows else "<p>None that is known.</p>"]
    if every:
        parts.append(f"<details><summary>All settings</summary>{table(head, every)}</details>")
    return "\n".join(parts)


def _samples(runs: list[Run]) -> str:
    """Return each run's last sample, side by side."""
    cells = [
        f"<div><b>{html.escape(run.name)}</b>, step {run.samples[-1][0]:,}"
        f"<pre>{html.escape(run.samples[-1][1])}</pre></div>"
        for run in runs
        if run.samples
    ]
    return f'<h2>Samples</h2><div class="samples">{"".join(cells)}</div>' if cells else ""
