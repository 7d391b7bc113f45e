"""Tables and figures of the experiments."""

from __future__ import annotations

from collections.abc import Callable
import math
import os

from experiment import common
import matplotlib
import numpy as np
import pandas as pd
from scipy import stats
import seaborn
import sweep

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

from keras_fisher import plotting


def percent(values: pd.Series) -> str:
    """Mean and standard error, from shares, in percent."""
    if values.isna().all():
        return ""
    if values.count() < 2:
        return f"{100 * values.mean():.1f}"
    return f"{100 * values.mean():.1f} ± {100 * values.sem():.1f}"


def number(values: pd.Series) -> str:
    """Mean and standard error, and of how many runs if not of all."""
    count = values.count()
    if count == 0:
        return ""
    error = f" ± {values.sem():.2g}" if count > 1 else ""
    some = f" ({count} of {len(values)})" if count < len(values) else ""
    return f"{values.mean():.4g}{error}{some}"


def rank_correlation(x: pd.Series, y: pd.Series):
    """Spearman's rank correlation, or None of fewer than three pairs."""
    count = (np.isfinite(x) & np.isfinite(y)).sum()
    return plotting.rank_correlation(x, y) if count >= 3 else None


def title_with_correlation(axes, x: pd.Series, y: pd.Series) -> None:
    """Tells the rank correlation above a figure of y over x."""
    if (found := rank_correlation(x, y)) is not None:
        axes.set_title(f"Spearman's ρ = {found.correlation:.2f}")


def correlation(
    x: pd.Series, y: pd.Series, name: str = "Spearman's ρ"
) -> dict[str, str]:
    """The columns of a row that tells of a rank correlation, called `name`."""
    row = {name: "", "95 % interval": "", "exact p": "", "pairs": "too few"}
    found = rank_correlation(x, y)
    if found is None:
        return row
    row |= {name: f"{found.correlation:.2f}", "pairs": str(found.count)}
    if not math.isnan(found.low):
        row["95 % interval"] = f"[{found.low:.2f}, {found.high:.2f}]"
    elif not math.isnan(found.correlation):
        row["exact p"] = f"{_exact_p(x, y):.2g}"
    return row


def _exact_p(x: pd.Series, y: pd.Series) -> float:
    """Two-sided p of the rank correlation, of all permutations of few pairs."""
    is_pair = np.isfinite(x) & np.isfinite(y)
    x, y = stats.rankdata(x[is_pair]), stats.rankdata(y[is_pair])
    # Of given ranks, only the sum of products differs between permutations.
    return stats.permutation_test(
        [x],
        lambda ranks, axis: (ranks * y).sum(axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=math.inf,
    ).pvalue


def table(
    frame: pd.DataFrame,
    by: list[str],
    columns: dict[str, tuple[str, Callable]],
) -> pd.DataFrame:
    """A row for each group of runs, in the order of the runs.

    Args:
        frame: What `sweep.results` returns.
        by: Columns that a group has in common, and that the table begins with.
        columns: For each further column, what of the runs it is made from and
            the function that makes a text of it.
    """
    groups = frame.groupby(by, sort=False)
    rows = {
        name: groups[source].agg(text)
        for name, (source, text) in columns.items()
    }
    return pd.DataFrame(rows).reset_index()


def publish(
    name: str,
    output_dir: str,
    tables: dict[str, pd.DataFrame],
    runs: pd.DataFrame,
    figure,
) -> None:
    """Prints tables, and writes them, the runs and the figure.

    Args:
        name: Of the files: `.md` for the tables, `.csv` for the runs, `.png`.
        output_dir: Where they go.
        tables: By what is written above them; `""` for nothing.
        runs: What `sweep.results` returns.
        figure: A Matplotlib figure, which is closed.
    """
    path = os.path.join(output_dir, name)
    texts = [
        f"{title}\n\n{rows.to_markdown(index=False, disable_numparse=True)}"
        for title, rows in tables.items()
    ]
    text = "\n\n".join(texts).strip() + "\n"
    sweep.write(f"{path}.md", text)
    # What is measured each epoch is in the files of the runs.
    hidden = ["history", "path", "versions"]
    sweep.write(
        f"{path}.csv",
        runs.drop(columns=hidden, errors="ignore").to_csv(index=False),
    )
    with common.replacing(f"{path}.png") as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    print(f"\n{text}\n{path}.md, {path}.csv, {path}.png")


def logarithmic(axes, which: str) -> None:
    """Makes the axis "x" or "y" logarithmic, with plain numbers at it."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def slanted(axes, degrees: float) -> None:
    """Turns the names at the x axis, each with its end at its tick."""
    axes.set_xticks(axes.get_xticks())
    axes.set_xticklabels(
        axes.get_xticklabels(),
        rotation=degrees,
        ha="right",
        rotation_mode="anchor",
    )


def axes(count: int):
    """A figure with two or more axes side by side.

    Returns:
        The figure, and an array of its axes.
    """
    seaborn.set_theme(style="ticks", palette="colorblind")
    figure, panels = plt.subplots(
        1, count, figsize=(5.2 * count, 4.2), layout="constrained"
    )
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    return figure, panels
