"""Measures Tr(F) and Tr(H) of a saved model, in total and by layer.

python examples/measure.py --model=model.keras --dataset=mnist1d

Prints a table, and draws both by layer next to the model's file. The model
may be a plain Keras model or a saved `keras_fisher.FisherModel`.
"""

from __future__ import annotations

import collections
import math
import os
import sys
from typing import NoReturn
import zipfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
import common
import keras
import matplotlib
import pandas as pd
import tensorflow as tf

import keras_fisher

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_MODEL = flags.DEFINE_string(
    "model", None, "The `.keras` file to measure.", required=True
)
_DATASET = flags.DEFINE_string(
    "dataset",
    "mnist1d",
    "Data set: mnist1d or digits, which need no download, or a TFDS name.",
)
_SPLIT = flags.DEFINE_string(
    "split", "test", "Part of the data set, for example train[:1000]."
)
_NORMALIZE = flags.DEFINE_boolean(
    "normalize",
    True,
    "Whether the model takes images of cifar10, cifar100, fashion_mnist and "
    "tiny_imagenet as train.py gives them, or with values from 0 to 1.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 128, "Examples computed at once.", 1
)
_ESTIMATOR = flags.DEFINE_enum(
    "estimator",
    "monte_carlo",
    ["monte_carlo", "exact", "empirical", "batch"],
    "How to compute Tr(F); empirical takes the labels of the data instead of "
    "drawing them from the model, which is not Tr(F).",
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "Labels to draw for each example.", 1
)
_LIKELIHOOD = flags.DEFINE_enum(
    "likelihood",
    "auto",
    ["auto", "categorical", "bernoulli", "gaussian", "laplace", "poisson"],
    "What the outputs say of labels; auto goes by the compiled loss.",
)
_FROM_LOGITS = flags.DEFINE_boolean(
    "from_logits",
    True,
    "Whether the outputs are logits, not probabilities, with --likelihood="
    "categorical or bernoulli.",
)
_HESSIAN = flags.DEFINE_boolean(
    "hessian",
    True,
    "Measure Tr(H) too, of the compiled loss, or else of -log p(y|x).",
)
_NUM_PROBES = flags.DEFINE_integer(
    "num_probes", 100, "The most random probes to take for Tr(H).", 1
)
_TOLERANCE = flags.DEFINE_float(
    "tolerance",
    0.05,
    "Stop when the standard error is below this share of Tr(H); 0 for all "
    "probes.",
    lower_bound=0.0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of labels and probes.", 0)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "PNG file for the figure; <model>_trace_by_layer.png if not given.",
)
_CSV = flags.DEFINE_string("csv", None, "File for the table, if wanted.")

_WITH_LOGITS = ("categorical", "bernoulli")
# Their result has no random error.
_WITHOUT_ERROR = ("exact", "empirical")
# Beyond this ratio of the largest to the smallest layer, a log scale.
_LARGE_RANGE = 100

flags.register_multi_flags_validator(
    ["likelihood", "from_logits"],
    lambda f: f["from_logits"] or f["likelihood"] in _WITH_LOGITS,
    "--nofrom_logits goes with --likelihood=categorical or bernoulli.",
)
flags.register_validator(
    "output",
    lambda path: path is None or path.lower().endswith(".png"),
    "--output must end in .png.",
)


def fail(message: object) -> NoReturn:
    """Ends the program with a message in place of a traceback."""
    sys.exit(f"Error: {message}")


def load_model(path: str) -> keras.Model:
    """Loads a model with its weights."""
    if not os.path.isfile(path):
        fail(f"There is no file {path}.")
    if not zipfile.is_zipfile(path):
        fail(f"{path} is not a `.keras` file.")
    try:
        model = keras.saving.load_model(path)
    except (OSError, TypeError, ValueError) as error:
        # Keras puts the whole configuration before and behind the reason.
        reason = str(error).rpartition("Exception encountered: ")[2]
        reason = reason.partition("Full object config")[0].strip()
        fail(f"Cannot load {path}. {reason}")
    if not model.built:
        # It would be measured with new, random weights.
        fail(f"{path} has no weights: the model was saved before it was built.")
    return model


def load_data() -> tuple[tf.data.Dataset, int | None]:
    """Loads the examples, all of them and in a fixed order.

    Returns:
        The data set, not batched; the number of classes, None without.
    """
    try:
        data, info = keras_fisher.datasets.load(
            _DATASET.value, _SPLIT.value, with_info=True
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        fail(
            f"Cannot load --dataset={_DATASET.value} --split={_SPLIT.value}. "
            f"{error}"
        )
    if _NORMALIZE.value:
        data = common.normalized(data, _DATASET.value)
    return data, common.number_of_classes(info)


def likelihood_of(model: keras.Model) -> keras_fisher.likelihoods.Likelihood:
    """The likelihood that the flags ask for."""
    if _LIKELIHOOD.value == "auto":
        try:
            return keras_fisher.likelihoods.of_model("auto", model)
        except ValueError:
            what = (
                "is not compiled"
                if getattr(model, "loss", None) is None
                else "is compiled with a loss that has no known likelihood"
            )
            fail(
                f"The model {what}, so what its outputs mean is not known. "
                "Pass --likelihood=categorical, bernoulli, gaussian, laplace "
                "or poisson."
            )
    likelihood = keras_fisher.likelihoods.get(_LIKELIHOOD.value)
    if _LIKELIHOOD.value in ("categorical", "bernoulli"):
        return type(likelihood)(from_logits=_FROM_LOGITS.value)
    return likelihood


def built_for(model: keras.Model, what: str) -> tuple[int | None, ...] | None:
    """`"input_shape"` or `"output_shape"` of one example, if there is one."""
    if isinstance(model, keras_fisher.FisherModel):
        model = model.model
    shape = getattr(model, what, None)
    return shape[1:] if isinstance(shape, tuple) else None


def check_inputs(model: keras.Model, data: tf.data.Dataset) -> None:
    """Refuses inputs of another shape than the model was built for.

    Keras does not always: a `Sequential` model with pooling takes images of
    any size.
    """
    x, expected = data.element_spec[0], built_for(model, "input_shape")
    if expected is None or not isinstance(x, tf.TensorSpec):
        return
    found = tuple(x.shape)
    # Keras drops and adds a last axis of 1 as needed.
    alike = [found, (*found, 1)]
    if found[-1:] == (1,):
        alike.append(found[:-1])
    expected = tf.TensorShape(expected)
    if not any(expected.is_compatible_with(shape) for shape in alike):
        fail(
            f"The model takes inputs of the shape {expected}, but those of "
            f"{_DATASET.value} have the shape {found}."
        )


def check_classes(
    model: keras.Model,
    likelihood: keras_fisher.likelihoods.Likelihood,
    classes: int | None,
) -> None:
    """Refuses labels that the model has no output for, if they are needed."""
    outputs = built_for(model, "output_shape")
    if not (_HESSIAN.value or _ESTIMATOR.value == "empirical"):
        return
    if not isinstance(likelihood, keras_fisher.likelihoods.Categorical):
        return
    if outputs and classes and outputs[-1] < classes:
        fail(
            f"The model has {outputs[-1]} outputs, but {_DATASET.value} has "
            f"{classes} classes."
        )


def measure_fisher(
    model: keras.Model,
    data: tf.data.Dataset,
    likelihood: keras_fisher.likelihoods.Likelihood,
) -> tuple[dict[str, keras_fisher.Estimate], keras_fisher.Estimate]:
    """Measures Tr(F) by layer and in total."""

    def measure(by):
        return keras_fisher.fisher_trace(
            model,
            data,
            estimator=_ESTIMATOR.value,
            num_samples=_NUM_SAMPLES.value,
            by=by,
            likelihood=likelihood,
            seed=_SEED.value,
        )

    by_layer = measure("layer")
    if _ESTIMATOR.value in _WITHOUT_ERROR:
        return by_layer, keras_fisher.Estimate(sum(by_layer.values()))
    # Layers share their draws, so their errors do not add in quadrature: that
    # of the total is measured, with the same draws.
    return by_layer, measure("total")


def measure_hessian(
    model: keras.Model,
    data: tf.data.Dataset,
    likelihood: keras_fisher.likelihoods.Likelihood,
) -> tuple[dict[str, keras_fisher.Estimate], keras_fisher.Estimate]:
    """Measures Tr(H) by layer and in total, with the same probes."""
    by_layer, total = (
        keras_fisher.hessian_trace(
            model,
            data,
            loss=None
            if is_compiled(model)
            else likelihood.negative_log_likelihood,
            by=by,
            num_probes=_NUM_PROBES.value,
            tolerance=_TOLERANCE.value or None,
            seed=_SEED.value,
        )
        for by in ("layer", "total")
    )
    return by_layer, total


def is_compiled(model: keras.Model) -> bool:
    """Whether Tr(H) is that of the compiled loss, or else of -log p(y|x)."""
    return getattr(model, "loss", None) is not None


def print_hessian(model: keras.Model, total: keras_fisher.Estimate) -> None:
    """Prints Tr(H)."""
    loss = "the compiled loss" if is_compiled(model) else "-log p(y|x)"
    print(f"\nTr(H): {total} (of {loss}; at most {_NUM_PROBES.value} probes)")


def tabulate(
    model: keras.Model,
    by_layer: dict[str, keras_fisher.Estimate],
    total: keras_fisher.Estimate,
) -> pd.DataFrame:
    """Makes the table: a row for each layer, and one for the total."""
    parameters = collections.Counter()
    for variable in model.trainable_variables:
        path, _, name = variable.path.rpartition("/")
        parameters[path or name] += math.prod(variable.shape)
    rows = [
        {
            "layer": layer,
            "parameters": count,
            "Tr(F)": float(trace),
            "standard error": trace.standard_error,
            "share, %": 100 * trace / total if total else math.nan,
        }
        for layer, count, trace in [
            *((name, parameters[name], by_layer[name]) for name in by_layer),
            ("total", parameters.total(), total),
        ]
    ]
    return pd.DataFrame(rows)


def draw(
    fisher: tuple[dict[str, keras_fisher.Estimate], keras_fisher.Estimate],
    hessian: tuple[dict[str, keras_fisher.Estimate], keras_fisher.Estimate]
    | None,
    path: str,
) -> None:
    """Draws the traces by layer, side by side, the first layer on top."""
    is_empirical = _ESTIMATOR.value == "empirical"
    panels = {"Empirical Tr(F)" if is_empirical else "Tr(F)": fisher}
    if hessian is not None:
        panels["Tr(H)"] = hessian
    figure, row = plt.subplots(
        ncols=len(panels),
        figsize=(3 + 4 * len(panels), 1.4 + 0.32 * len(fisher[0])),
        sharey=True,
        squeeze=False,
    )
    colors = ("tab:blue", "tab:orange")
    for axes, color, (quantity, found) in zip(row[0], colors, panels.items()):
        draw_bars(axes, quantity, *found, color)
    row[0][0].invert_yaxis()
    figure.suptitle(f"{_DATASET.value}, {_SPLIT.value}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_bars(
    axes: matplotlib.axes.Axes,
    quantity: str,
    by_layer: dict[str, keras_fisher.Estimate],
    total: keras_fisher.Estimate,
    color: str,
) -> None:
    """Draws one trace by layer."""
    values = [float(trace) for trace in by_layer.values()]
    errors = [trace.standard_error for trace in by_layer.values()]
    axes.barh(
        [*by_layer],
        values,
        xerr=errors if any(errors) else None,
        color=color,
        error_kw={"ecolor": "0.2", "capsize": 3},
    )
    # A Hessian may be negative somewhere, which a logarithm does not take.
    positive = [value for value in values if value > 0]
    is_wide = positive and max(positive) > _LARGE_RANGE * min(positive)
    if is_wide and min(values) >= 0:
        axes.set_xscale("log", nonpositive="clip")
        # Room for the smallest bar, which would start at its end.
        axes.set_xlim(left=min(positive) / 3)
    if math.isnan(total.standard_error):
        total = keras_fisher.Estimate(total)
    axes.set(title=f"{quantity} = {total}", xlabel=quantity)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def print_table(table: pd.DataFrame) -> None:
    """Prints the table, with the names of layers flush left."""
    width = table["layer"].str.len().max()
    formats = {
        "layer": f"{{:<{width}}}".format,
        "parameters": "{:,}".format,
        "Tr(F)": "{:.5g}".format,
        "standard error": "{:.2g}".format,
        "share, %": "{:.1f}".format,
    }
    print(table.to_string(index=False, formatters=formats))
    if _ESTIMATOR.value == "batch" and _NUM_SAMPLES.value == 1:
        print("Pass --num_samples=2 or more for the standard errors.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    common.check_finite_flags()
    default = os.path.splitext(_MODEL.value)[0] + "_trace_by_layer.png"
    output = _OUTPUT.value or default
    model = load_model(_MODEL.value)
    for path in (output, _CSV.value or output):  # rather than after the work
        common.check_writable(path)
    likelihood = likelihood_of(model)
    data, classes = load_data()
    check_inputs(model, data)
    check_classes(model, likelihood, classes)
    print(
        f"{_MODEL.value} on {data.cardinality()} examples of "
        f"{_DATASET.value}, {_SPLIT.value}; --estimator={_ESTIMATOR.value}\n"
    )
    data = data.batch(_BATCH_SIZE.value).prefetch(tf.data.AUTOTUNE)
    try:
        by_layer, total = measure_fisher(model, data, likelihood)
        table = tabulate(model, by_layer, total)
        print_table(table)
        if _CSV.value:
            table.to_csv(_CSV.value, index=False)
        hessian = None
        if _HESSIAN.value:
            hessian = measure_hessian(model, data, likelihood)
            print_hessian(model, hessian[1])
        draw((by_layer, total), hessian, output)
    except (OSError, ValueError, tf.errors.OpError) as error:
        fail(error)
    print(f"\nFigure: {output}")


if __name__ == "__main__":
    app.run(main)
