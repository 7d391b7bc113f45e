"""All of Keras is classified, and what is called exact agrees with differences.

`docs/second_derivatives.md` is written from the same tables.
"""

from __future__ import annotations

import inspect
import pathlib

from cases import has_keras
from cases import since_keras
import keras
import numpy as np
import pytest
import second_derivative_cases as cases
import second_derivative_layers as layer_cases
import second_derivatives_page
import tensorflow as tf

import keras_fisher
from keras_fisher._derivatives import catalogue
from keras_fisher._derivatives import second_derivatives
from keras_fisher._measuring import hessian_trace

_ROOT = pathlib.Path(__file__).parents[2]
_VERSION = "3.15"  # of Keras, whose functions and layers the catalogue has
_MODES = [
    "eager",
    pytest.param("graph", marks=pytest.mark.slow),
    pytest.param("xla", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _double():
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def _errors(case: cases.Case, mode: str) -> list[float]:
    """Of the derivatives of a gradient, by what it is at and by its cotangent.

    With G(x, u) = ∇_x ⟨u, f(x)⟩, that of ⟨z, G⟩ by x is compared with a
    central difference; by u, in which G is linear, with G itself.
    """
    random = np.random.default_rng(1)

    def normal(tensors):
        return [tf.constant(random.normal(size=t.shape)) for t in tensors]

    def outputs_at(x):
        with second_derivatives.exact():
            outputs = tf.nest.flatten(case.function(*x))
        return [
            tf.cast(tf.math.real(y), "float64")
            for y in outputs
            if tf.is_tensor(y) and (y.dtype.is_floating or y.dtype.is_complex)
        ]

    x = [tf.constant(a, "float64") for a in case.arrays]
    z, w = normal(x), normal(x)
    outputs = outputs_at(x)
    u, other = normal(outputs), normal(outputs)

    def inner(a, b):
        return tf.add_n([tf.reduce_sum(s * t) for s, t in zip(a, b)])

    def along_z(x, u):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = inner(u, outputs_at(x))
        gradient = tape.gradient(value, x)
        assert any(g is not None for g in gradient), "no first derivative"
        return inner(
            *zip(*[(a, g) for a, g in zip(z, gradient) if g is not None])
        )

    def derivatives(x, u):
        with tf.GradientTape() as tape:
            tape.watch([x, u])
            value = along_z(x, u)
        with second_derivatives.complete():
            by_x, by_u = tape.gradient(
                value, [x, u], unconnected_gradients="zero"
            )
        return inner(by_x, w), inner(by_u, other)

    if mode != "eager":
        along_z, derivatives = (
            tf.function(f, jit_compile=mode == "xla", autograph=False)
            for f in (along_z, derivatives)
        )
    h = case.step
    ahead, behind = (
        along_z([a + s * b for a, b in zip(x, w)], u) for s in (h, -h)
    )
    expected = (ahead - behind) / (2 * h), along_z(x, other)
    return [
        abs(float(a - b)) / (1e-3 + abs(float(b)))
        for a, b in zip(derivatives(x, u), expected)
    ]


def _skip_unless_in(module, name: str) -> None:
    """Versions before that of the catalogue have not all that is in it."""
    name = name.partition(" ")[0]
    if not has_keras(_VERSION) and not hasattr(module, name):
        pytest.skip(f"Keras {keras.__version__} has no {name}")


def _assert_exact(case: cases.Case, mode: str) -> None:
    if mode not in case.modes:
        pytest.skip("no kernels")
    errors = _errors(case, mode)
    assert max(errors) <= case.tolerance, errors


@pytest.mark.few(80)
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("name", cases.OPS_EXACT)
def test_functions(name, mode):
    _skip_unless_in(keras.ops, name)
    _assert_exact(cases.OPS_EXACT[name], mode)


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("name", cases.IMAGE_EXACT)
def test_functions_of_images(name, mode):
    _skip_unless_in(keras.ops.image, name)
    _assert_exact(cases.IMAGE_EXACT[name], mode)


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("name", cases.ACTIVATIONS_EXACT)
def test_activations(name, mode):
    _assert_exact(cases.ACTIVATIONS_EXACT[name], mode)


@pytest.mark.few(60)
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("name", layer_cases.LAYERS_EXACT)
def test_layers(name, mode):
    _skip_unless_in(keras.layers, name)
    _assert_exact(layer_cases.LAYERS_EXACT[name](), mode)


# All of Keras is in the tables.


def _missing(module, *tables, others=()) -> set[str]:
    """Public names of a module that no table has."""
    known = {name.partition(" ")[0] for table in tables for name in table}
    return {
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
    } - known.union(others)


def _words(*tables: dict) -> list[str]:
    return " ".join(text for t in tables for text in t.values()).split()


def _missing_functions(module=keras.ops) -> set[str]:
    return _missing(
        module,
        cases.OPS_EXACT,
        cases.OPS_DIFFERENCES,
        others=_words(cases.OPS_CONSTANT),
    )


def _missing_layers() -> set[str]:
    """Layers, of which some have several names."""
    known = {
        getattr(keras.layers, name.partition(" ")[0], None)
        for name in (
            *layer_cases.LAYERS_EXACT,
            *layer_cases.LAYERS_DIFFERENCES,
            *_words(layer_cases.LAYERS_CONSTANT, layer_cases.LAYERS_REFUSED),
        )
    }
    return {
        name
        for name, value in vars(keras.layers).items()
        if inspect.isclass(value) and value not in known
    }


def test_every_function_is_classified():
    assert not _missing_functions()
    for module in (keras.ops.nn, keras.ops.linalg, keras.ops.numpy):
        assert not _missing_functions(module), module.__name__


def test_every_function_of_images_is_classified():
    assert not _missing(
        keras.ops.image,
        cases.IMAGE_EXACT,
        cases.IMAGE_DIFFERENCES,
        others=_words(cases.IMAGE_CONSTANT),
    )


def test_every_activation_is_classified():
    assert not _missing(
        keras.activations,
        cases.ACTIVATIONS_EXACT,
        others=cases.ACTIVATIONS_OTHER,
    )


def test_every_layer_is_classified():
    assert not _missing_layers()


def test_what_keras_adds_is_missing_until_somebody_has_looked(monkeypatch):
    class Tomorrow(keras.layers.Layer):
        pass

    monkeypatch.setattr(keras.layers, "Tomorrow", Tomorrow, raising=False)
    assert _missing_layers() == {"Tomorrow"}
    monkeypatch.setattr(keras.ops, "tomorrow", lambda x: x, raising=False)
    assert _missing_functions() == {"tomorrow"}


@pytest.mark.parametrize(
    "name, case",
    [
        ("moments", cases.OPS_EXACT["moments"]),
        ("softsign", cases.ACTIVATIONS_EXACT["softsign"]),
        ("resize", cases.IMAGE_EXACT["resize bilinear"]),
    ],
)
def test_a_replacement_that_is_taken_out_is_noticed(name, case, monkeypatch):
    rest = [r for r in second_derivatives._REPLACEMENTS if r._name != name]
    assert len(rest) == len(second_derivatives._REPLACEMENTS) - 1
    monkeypatch.setattr(second_derivatives, "_REPLACEMENTS", rest)
    with pytest.raises((AssertionError, LookupError)):
        _assert_exact(case, "eager")


# The catalogue that the library goes by.


def test_the_library_knows_the_layers_that_are_exact():
    layers = vars(keras.layers)
    names = {name.partition(" ")[0] for name in layer_cases.LAYERS_EXACT}
    exact = {layers[name].__name__ for name in names & layers.keys()}
    assert exact <= catalogue._LAYERS
    assert not layers.keys() & (catalogue._LAYERS - exact)
    assert (
        set(_words(layer_cases.LAYERS_CONSTANT)) >= catalogue._CONSTANT_LAYERS
    )


def test_the_library_knows_no_functions_but_exact_ones():
    exact = {
        name.partition(" ")[0].replace("_", "")
        for name in (*cases.OPS_EXACT, *cases.IMAGE_EXACT)
    }
    # In functional models some have the name of a layer.
    renamed = {"averagepool", "maxpool"}
    assert exact | renamed >= catalogue._OPERATIONS


def _functional():
    x = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(4, 3, activation="gelu", padding="same")(x)
    y = keras.ops.relu(y) + 2 * y[:, ::-1]
    y = keras.layers.TimeDistributed(keras.layers.Conv1D(2, 3))(y)
    return keras.Model(x, keras.layers.Flatten()(y))


@pytest.mark.parametrize(
    "make",
    [
        _functional,
        lambda: keras.applications.ResNet50V2(weights=None),
        lambda: keras.applications.MobileNetV3Small(weights=None),
        lambda: keras.applications.EfficientNetV2B0(weights=None),
        lambda: keras.Sequential(
            [
                keras.Input((3, 2)),
                keras.layers.Bidirectional(keras.layers.GRU(2)),
            ]
        ),
    ],
)
def test_networks_of_keras_are_known(make):
    keras.config.set_dtype_policy("float32")
    assert not catalogue.unknown(make())


class _OfAUser(keras.layers.Layer):
    def call(self, x):
        return x


class _Dense(keras.layers.Dense):
    """Another one, that may do anything."""


@pytest.mark.parametrize(
    "layer",
    [
        _OfAUser(),
        _Dense(2),
        keras.layers.Lambda(lambda x: x),
        keras.layers.Dense(2, activation=lambda x: x**2),
        keras.layers.Activation(tf.nn.relu),
        keras.layers.RandomRotation(0.1),
    ],
)
def test_what_others_have_written_is_not_known(layer):
    model = keras.Sequential([keras.Input((4, 4, 3)), layer])
    assert catalogue.unknown(model) == [layer]


@since_keras(_VERSION)
def test_the_page_is_up_to_date():
    page = (_ROOT / "docs" / "second_derivatives.md").read_text("utf-8")
    assert page == second_derivatives_page.written(), (
        "Write it with `python tests/second_derivatives_page.py`."
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", layer_cases.LAYERS_EXACT)
def test_curvature_of_losses_behind_each_layer(name):
    """`hessian_trace` of a loss of the layer's outputs, for its weights."""
    case = layer_cases.LAYERS_EXACT[name]()
    if case.step != cases.Case.step:
        pytest.skip("in single precision")
    model = OfArrays(case)
    x, y = np.zeros([1, 1]), np.zeros([1, 1])
    model.compile("sgd", lambda y, outputs: outputs)
    trace = keras_fisher.hessian_trace(
        model, x, y, num_probes=4, tolerance=None, seed=3
    )
    curvature = hessian_trace._Curvature(
        model, hessian_trace._loss_function(model, None)
    )
    curvature._function = curvature._compiled(curvature._difference)
    differences = curvature(
        tf.constant(x), tf.constant(y), None, tf.constant([3, 0], tf.int64), 4
    )
    # TensorFlow resizes in single precision.
    is_rough = name.startswith(("Resizing", "UpSampling2D "))
    assert float(trace) == pytest.approx(
        differences.mean(), rel=2e-2 if is_rough else 1e-4, abs=1e-4
    )


class OfArrays(keras.Model):
    """What a case differentiates by is its weights."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.arrays = [
            self.add_weight(shape=a.shape, initializer="zeros")
            for a in case.arrays
        ]
        for variable, value in zip(self.arrays, case.arrays):
            variable.assign(value)
        self.built = True

    def call(self, x):
        outputs = tf.nest.flatten(
            self.case.function(*[v.value for v in self.arrays])
        )
        total = tf.add_n(
            [
                tf.reduce_sum(tf.sin(tf.cast(y, "float64")))
                for y in outputs
                if y.dtype.is_floating
            ]
        )
        return total + 0.0 * x
