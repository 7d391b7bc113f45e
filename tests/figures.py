"""Tables to draw, and figures read back."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
import pandas as pd

TRACE = "fisher/trace"
LAYER = "fisher/trace_by_layer/"


def frame(*curves):
    """`(run, split, tag, steps, values)`, written in this order."""
    rows = [
        (run, split, tag, step, value, 0.0)
        for run, split, tag, steps, values in curves
        for step, value in zip(steps, values)
    ]
    columns = ["run", "split", "tag", "step", "value", "wall_time"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[:4])


def save(ax):
    file = io.BytesIO()
    ax.figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
