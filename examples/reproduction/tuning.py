"""The strength of each method, chosen on held-out training data.

Every method gets the same number of tries; the test set plays no part.
"""

from __future__ import annotations

import dataclasses

from absl import flags
import experiment
from experiment import Run
import pandas as pd
import sweep

_HOLDOUT = flags.DEFINE_float(
    "holdout",
    0.2,
    "Share of the training set that strengths are chosen on; with noisy "
    "labels if the rest has them. The chosen ones then train on all of it.",
    0.01,
    0.9,
)
_TUNING_SEEDS = flags.DEFINE_integer(
    "tuning_seeds", 1, "Runs for each strength to choose from.", 1
)
flags.adopt_module_key_flags(experiment)


def define_methods(defaults: dict[str, tuple[float, ...]]):
    """Defines the flag for methods and the strengths to choose from."""
    holder = flags.DEFINE_multi_string(
        "strengths",
        [
            f"{method}:" + ",".join(f"{value:g}" for value in values)
            for method, values in defaults.items()
        ],
        "A method and the strengths to choose from, like --strengths=FP:0.1,1; "
        f"once for each method, of {', '.join(experiment.METHODS[1:])}. "
        "Methods that are not given are left out; one strength is taken as it "
        "is.",
    )
    flags.register_validator(
        "strengths",
        _are_methods,
        "--strengths must be METHOD:NUMBER,NUMBER,... with numbers above 0 "
        f"and a method of {', '.join(experiment.METHODS[1:])}, each once.",
    )
    return holder


def methods(holder) -> dict[str, tuple[float, ...]]:
    """The strengths to choose from, by method."""
    return dict(map(_parsed, holder.value))


def _are_methods(texts: list[str]) -> bool:
    """Whether texts are different methods with strengths."""
    found = [*map(_parsed, texts)]
    return None not in found and len({*dict(found)}) == len(found)


def _parsed(text: str) -> tuple[str, tuple[float, ...]] | None:
    method, _, values = text.partition(":")
    if method not in experiment.METHODS[1:]:
        return None
    if not experiment.are_positive(values.split(",")):
        return None
    return method, tuple(map(float, values.split(",")))


def chosen(
    runs: list[Run], strengths: dict[str, tuple[float, ...]], title: str
) -> tuple[list[Run], pd.DataFrame]:
    """Runs with the methods, each of the strength that validated best.

    Args:
        runs: Runs without a method.
        strengths: To choose from, by method. Nothing is tried where there is
            one.
        title: Of the sweep.

    Returns:
        For each of the runs one of each method, in this order, with seed 0
        and on the whole training set; and a table of what was tried.
    """
    candidates = [
        dataclasses.replace(
            run,
            method=method,
            strength=strength,
            holdout=_HOLDOUT.value,
            seed=seed,
        )
        for run in runs
        for method, values in strengths.items()
        for strength in values
        for seed in range(_TUNING_SEEDS.value)
        if len(values) > 1
    ]
    by = ["learning_rate", "method", "strength"]
    tried = pd.DataFrame(columns=[*by, "test_accuracy"])
    if candidates:
        tried = sweep.results(
            candidates, experiment.output_dir(), f"{title}, choosing strengths"
        )
    tried = tried.groupby(by, sort=False)["test_accuracy"].mean()
    best = []
    for run in runs:
        for method, values in strengths.items():
            strength = (
                tried[run.learning_rate, method].idxmax()
                if len(values) > 1
                else values[0]
            )
            best.append(
                dataclasses.replace(run, method=method, strength=strength)
            )
    return best, tried.rename("validation accuracy").reset_index()


def tried_table(tried: pd.DataFrame) -> pd.DataFrame:
    """What was tried: a row for each method and learning rate."""
    texts = tried["strength"].map("{:g}: ".format) + (
        100 * tried["validation accuracy"]
    ).map("{:.1f}".format)
    return (
        tried.assign(**{"strength: validation accuracy (%)": texts})
        .groupby(["learning_rate", "method"], sort=False)[
            "strength: validation accuracy (%)"
        ]
        .agg(", ".join)
        .reset_index()
    )


def best_learning_rate(rates: list[float]) -> float:
    """The learning rate that validates best without any method."""
    if len(rates) == 1:
        return rates[0]
    runs = [
        experiment.from_flags(
            learning_rate=rate, holdout=_HOLDOUT.value, seed=seed
        )
        for rate in rates
        for seed in range(_TUNING_SEEDS.value)
    ]
    frame = sweep.results(
        runs, experiment.output_dir(), "choosing the learning rate"
    )
    return frame.groupby("learning_rate")["test_accuracy"].mean().idxmax()
