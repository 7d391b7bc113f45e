"""Which likelihood the loss of an output stands for."""

import contextlib
import re

import distributions
import keras
import pytest

import keras_fisher
from keras_fisher import likelihoods
from keras_fisher.likelihoods import Bernoulli
from keras_fisher.likelihoods import Categorical
from keras_fisher.likelihoods import Gaussian
from keras_fisher.likelihoods import Laplace
from keras_fisher.likelihoods import Poisson


class _OwnBinaryCrossentropy(keras.losses.BinaryCrossentropy):
    def __init__(self):
        super().__init__(from_logits=True, name="own")


_SPARSE = keras.losses.SparseCategoricalCrossentropy
_DENSE = keras.losses.CategoricalCrossentropy
_BINARY = keras.losses.BinaryCrossentropy
_SQUARED = keras.losses.MeanSquaredError
_ABSOLUTE = keras.losses.MeanAbsoluteError
_COUNTS = keras.losses.Poisson
_IDENTIFIERS = [
    # Likelihoods.
    (Categorical(False), Categorical(False)),
    (Gaussian(2.0), Gaussian(2.0)),
    (Categorical, Categorical(True)),
    (Bernoulli, Bernoulli(True)),
    (Gaussian, Gaussian(1.0)),
    ("categorical", Categorical(True)),
    ("Bernoulli", Bernoulli(True)),
    ("GAUSSIAN", Gaussian(1.0)),
    (keras.saving.serialize_keras_object(Gaussian(3.0)), Gaussian(3.0)),
    (
        keras.saving.serialize_keras_object(Bernoulli(False)),
        Bernoulli(False),
    ),
    # Instances of losses.
    (_SPARSE(), Categorical(False)),
    (_SPARSE(from_logits=True), Categorical(True)),
    (_SPARSE(ignore_class=-1), Categorical(False, ignore_class=-1)),
    (
        keras.losses.serialize(_SPARSE(from_logits=True, ignore_class=0)),
        Categorical(True, ignore_class=0),
    ),
    (_DENSE(), Categorical(False)),
    (_DENSE(from_logits=True, label_smoothing=0.1), Categorical(True)),
    (_BINARY(), Bernoulli(False)),
    (_BINARY(from_logits=True), Bernoulli(True)),
    (_SQUARED(), Gaussian(1.0)),
    (_OwnBinaryCrossentropy(), Bernoulli(True)),
    (_ABSOLUTE(), Laplace(1.0)),
    (_COUNTS(), Poisson()),
    # Their classes.
    (_ABSOLUTE, Laplace(1.0)),
    (_COUNTS, Poisson()),
    (_SPARSE, Categorical(False)),
    (_DENSE, Categorical(False)),
    (_BINARY, Bernoulli(False)),
    (_SQUARED, Gaussian(1.0)),
    (_OwnBinaryCrossentropy, Bernoulli(True)),
    # Functions.
    (keras.losses.sparse_categorical_crossentropy, Categorical(False)),
    (keras.losses.categorical_crossentropy, Categorical(False)),
    (keras.losses.binary_crossentropy, Bernoulli(False)),
    (keras.losses.mean_squared_error, Gaussian(1.0)),
    (keras.losses.mean_absolute_error, Laplace(1.0)),
    (keras.losses.poisson, Poisson()),
    # Names.
    ("mae", Laplace(1.0)),
    ("mean_absolute_error", Laplace(1.0)),
    ("Poisson", Poisson()),
    ("poisson", Poisson()),
    ("laplace", Laplace(1.0)),
    ("SparseCategoricalCrossentropy", Categorical(False)),
    ("sparse_categorical_crossentropy", Categorical(False)),
    ("CategoricalCrossentropy", Categorical(False)),
    ("categorical_crossentropy", Categorical(False)),
    ("BinaryCrossentropy", Bernoulli(False)),
    ("binary_crossentropy", Bernoulli(False)),
    ("MeanSquaredError", Gaussian(1.0)),
    ("mean_squared_error", Gaussian(1.0)),
    ("mse", Gaussian(1.0)),
    # Configs.
    (keras.losses.serialize(_SPARSE(from_logits=True)), Categorical(True)),
    (keras.losses.serialize(_DENSE()), Categorical(False)),
    (keras.losses.serialize(_BINARY(from_logits=True)), Bernoulli(True)),
    (keras.losses.serialize(_SQUARED()), Gaussian(1.0)),
    (
        keras.losses.serialize(keras.losses.binary_crossentropy),
        Bernoulli(False),
    ),
]
# One output, compiled by position or by name.
_IDENTIFIERS += [
    ([_BINARY(from_logits=True)], Bernoulli(True)),
    (["mse"], Gaussian(1.0)),
    (("categorical",), Categorical(True)),
    ({"head": _SPARSE(from_logits=True)}, Categorical(True)),
    ({"head": "binary_crossentropy"}, Bernoulli(False)),
    ({"head": [_DENSE]}, Categorical(False)),
]


@pytest.mark.parametrize(
    ("identifier", "expected"),
    _IDENTIFIERS,
    ids=[f"{n}-{expected}" for n, (_, expected) in enumerate(_IDENTIFIERS)],
)
def test_get_finds_the_likelihood(identifier, expected):
    found = likelihoods.get(identifier)
    what = f"{found} for {identifier!r}, expected {expected}"
    assert type(found) is type(expected), what
    assert found.get_config() == expected.get_config(), what


def test_get_returns_instances_as_they_are():
    for likelihood in (
        Categorical(False),
        Gaussian(0.1),
        distributions.LogPoisson(),
    ):
        assert likelihoods.get(likelihood) is likelihood
        assert likelihoods.get([likelihood]) is likelihood


def _own_loss(y_true, y_pred):
    return keras.ops.mean(y_pred)


@pytest.mark.parametrize(
    ("identifier", "received"),
    [
        ("hinge", "hinge"),
        ("no_such_loss", "'no_such_loss'"),
        ("", "''"),
        (keras.losses.Hinge(), "hinge"),
        (keras.losses.Hinge, "hinge"),
        (keras.losses.hinge, "hinge"),
        (keras.losses.serialize(keras.losses.Hinge()), "hinge"),
        (_own_loss, "_own_loss"),
        (object(), "object object at"),
        (None, "None"),
        (3, "3"),
        ([], "[]"),
        ({}, "{}"),
        ({"head": "hinge"}, "hinge"),
        (keras.metrics.MeanSquaredError(), "MeanSquaredError"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_get_names_what_it_does_not_know(identifier, received):
    with pytest.raises(ValueError, match="No likelihood is known") as error:
        likelihoods.get(identifier)
    message = str(error.value)
    got = re.search(r"Received: (.*)\. Known are", message, re.DOTALL)
    assert got, message
    assert received in got[1], f"{received!r} is not in {got[1]!r}"
    for known in ["Crossentropy", "MeanSquaredError", "likelihood="]:
        assert known in message, f"{known!r} is not in {message!r}"


@pytest.mark.parametrize("axis", [1, 2, 0])
@pytest.mark.parametrize(
    "loss",
    [_SPARSE, _DENSE, _BINARY],
    ids=lambda loss: loss.__name__,
)
def test_get_refuses_another_axis(loss, axis):
    with pytest.raises(ValueError, match=f"Received: axis={axis}"):
        likelihoods.get(loss(axis=axis))


@pytest.mark.parametrize(
    "identifier",
    [
        {"class_name": "NoSuchLikelihood", "config": {}},
        {"class_name": "NoSuchLikelihood"},
    ],
    ids=["without_class", "without_config"],
)
def test_get_names_a_config_it_cannot_read(identifier):
    with pytest.raises(ValueError, match="NoSuchLikelihood"):
        likelihoods.get(identifier)


_LOSSES = [
    loss
    for loss in vars(keras.losses).values()
    if isinstance(loss, type)
    and issubclass(loss, keras.losses.Loss)
    and loss is not keras.losses.Loss
]
_FUNCTIONS = [
    function
    for name, function in vars(keras.losses).items()
    if callable(function)
    and not isinstance(function, type)
    and name not in ("get", "serialize", "deserialize")
]


@pytest.mark.parametrize(
    "loss", _LOSSES + _FUNCTIONS, ids=lambda loss: loss.__name__
)
def test_each_loss_of_keras_has_a_likelihood_or_advice(loss):
    """In code that can be pasted; a loss that is new in Keras fails here."""
    name = loss.__name__
    identifiers = [loss]
    with contextlib.suppress(ValueError):
        keras.losses.get(name)
        identifiers.append(name)
    if loss in _LOSSES:
        identifiers += [loss(), keras.losses.serialize(loss())]
    told = set()
    for identifier in identifiers:
        try:
            told.add(repr(likelihoods.get(identifier)))
        except ValueError as error:
            told.add(str(error).rpartition("Likelihood`. ")[2])
    assert len(told) == 1, told
    (said,) = told
    if "There is none to pass" in said:
        return
    assert "Pass one of these" not in said, said
    code = re.search("`likelihood=(.*?)`", said)
    if code:
        found = eval(code[1], {"keras_fisher": keras_fisher})
        assert isinstance(found, likelihoods.Likelihood), said
        assert "loss itself can stay" in said


@pytest.mark.parametrize("from_logits", [True, False])
def test_advice_takes_over_from_logits(from_logits):
    for loss, cls in (
        (keras.losses.BinaryFocalCrossentropy, "Bernoulli"),
        (keras.losses.CategoricalFocalCrossentropy, "Categorical"),
    ):
        with pytest.raises(ValueError, match="most people want") as error:
            likelihoods.get(loss(from_logits=from_logits))
        assert f"{cls}(from_logits={from_logits})`" in str(error.value)


def test_directions_have_no_likelihood():
    for loss in (keras.losses.CosineSimilarity(), keras.losses.circle):
        with pytest.raises(ValueError, match="There is none to pass"):
            likelihoods.get(loss)
