"""Every layer of Keras, and its second derivative.

The first table of `docs/second_derivatives.md`; see `second_derivative_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import keras
import numpy as np
import second_derivative_cases as cases

from keras_fisher._common import keras_layers


def layer_case(
    make: Callable, *arrays, modes=cases.Case.modes, **kwargs
) -> cases.Case:
    """A layer in training mode, with its random draws and statistics fixed."""
    keras.utils.set_random_seed(0)
    layer = make()
    inputs = list(arrays) if len(arrays) > 1 else arrays[0]
    layer(inputs, **kwargs)
    variables = layer.trainable_variables
    state = [(v, v.numpy()) for v in layer.non_trainable_variables]
    random = np.random.default_rng(5)
    values = [v.numpy() + 0.3 * random.normal(size=v.shape) for v in variables]
    floats = [np.issubdtype(a.dtype, np.floating) for a in arrays]

    def function(*tensors):
        given = iter(tensors)
        x = [next(given) if f else a for a, f in zip(arrays, floats)]
        scope = keras_layers.FixedScope(zip(variables, given), state)
        with scope:
            return layer(x if len(x) > 1 else x[0], training=True, **kwargs)

    inputs = [a for a, f in zip(arrays, floats) if f]
    return cases.Case(function, (*inputs, *values), modes)


_L = keras.layers
_SEQUENCE = cases.random_array(2, 5, 3)
_VOLUME = cases.random_array(1, 4, 4, 4, 2)
_FRAMES = cases.random_array(2, 3, 5, 5, 2)
_TOKENS = np.array([[1, 3, 1], [0, 2, 2]])
_BY_RANK = {
    1: cases.random_array(2, 8, 2),
    2: cases.random_array(2, 6, 6, 2),
    3: _VOLUME,
}


def _ranks(name: str, *args, ranks=(1, 2, 3), modes=cases.Case.modes, **kwargs):
    return {
        f"{name}{rank}D": lambda rank=rank: layer_case(
            lambda: getattr(_L, f"{name}{rank}D")(*args, **kwargs),
            _BY_RANK[rank],
            modes=modes,
        )
        for rank in ranks
    }


def _plain(array, names: str, **kwargs):
    return {
        name: lambda name=name: layer_case(
            lambda: getattr(_L, name)(**kwargs), array
        )
        for name in names.split()
    }


def _merging(names: str):
    return {
        name: lambda name=name: layer_case(
            getattr(_L, name), cases.X, cases.X[::-1] + 0.2
        )
        for name in names.split()
    }


def _to_itself(attention):
    x = keras.Input(_SEQUENCE.shape[1:])
    return keras.Model(x, attention(x, x))


def _single_layer(make, array, modes=cases.Case.modes):
    """In single precision: there are no kernels for more."""

    def case():
        return dataclasses.replace(
            layer_case(make, array.astype("float32"), modes=modes),
            step=3e-3,
            tolerance=1e-2,
        )

    return case


def _pool_3d(name: str, modes=cases.Case.modes):
    return _single_layer(
        lambda: getattr(_L, name)(2, dtype="float32"), _VOLUME, modes
    )


def _layer(make, *arrays, **kwargs):
    return lambda: layer_case(make, *arrays, **kwargs)


# Makers of cases, since layers are costly to make.
LAYERS_EXACT: dict[str, Callable[[], cases.Case]] = {
    **_ranks("AdaptiveAveragePooling", 2, ranks=(1, 2)),
    **_ranks("AdaptiveMaxPooling", 2, ranks=(1, 2), modes=cases.NO_XLA),
    "AdaptiveMaxPooling3D": _pool_3d("AdaptiveMaxPooling3D", cases.NO_XLA),
    **_ranks("AveragePooling", 2, ranks=(1, 2)),
    **{
        name: _pool_3d(name)
        for name in (
            "AdaptiveAveragePooling3D",
            "AveragePooling3D",
            "MaxPooling3D",
        )
    },
    **_ranks("Conv", 3, 2, ranks=(1, 2)),
    "Conv3D": _layer(lambda: _L.Conv3D(2, 2), _VOLUME),
    **{
        f"Conv{rank}DTranspose": _layer(
            lambda rank=rank: getattr(_L, f"Conv{rank}DTranspose")(2, 2),
            _BY_RANK[rank],
        )
        for rank in (1, 2, 3)
    },
    **{
        f"ConvLSTM{rank}D": _layer(
            lambda rank=rank: getattr(_L, f"ConvLSTM{rank}D")(2, 2),
            cases.random_array(1, 3, *[4] * rank, 2),
        )
        for rank in (1, 2, 3)
    },
    **_ranks("Cropping", 1),
    **_ranks("DepthwiseConv", 2, ranks=(1, 2)),
    **_ranks("GlobalAveragePooling"),
    **_ranks("GlobalMaxPooling"),
    **_ranks("MaxPooling", 2, ranks=(1, 2)),
    **_ranks("SeparableConv", 2, 2, ranks=(1, 2)),
    **_ranks("SpatialDropout", 0.4, seed=1),
    **_ranks("UpSampling", 2),
    **_ranks("ZeroPadding", 1),
    **_plain(
        cases.X,
        "ELU Flatten Identity LayerNormalization LeakyReLU PReLU "
        "RMSNormalization ReLU Softmax UnitNormalization "
        "BatchNormalization Masking ActivityRegularization",
    ),
    **_plain(cases.X, "Dropout AlphaDropout GaussianDropout", rate=0.4, seed=1),
    **_merging("Add Average Concatenate Maximum Minimum Multiply Subtract"),
    "Activation": _layer(lambda: _L.Activation("tanh"), cases.X),
    "AdditiveAttention": _layer(
        _L.AdditiveAttention, _SEQUENCE, _SEQUENCE[::-1].copy()
    ),
    "Attention": _layer(_L.Attention, _SEQUENCE, _SEQUENCE[::-1].copy()),
    "Bidirectional": _layer(
        lambda: _L.Bidirectional(_L.SimpleRNN(2, unroll=True)), _SEQUENCE
    ),
    "CenterCrop": _layer(lambda: _L.CenterCrop(3, 3), cases.IMAGES),
    "Dense": _layer(lambda: _L.Dense(3, "tanh"), cases.X),
    "Dot": _layer(lambda: _L.Dot(1), cases.X, cases.X[::-1] + 0.2),
    "EinsumDense": _layer(lambda: _L.EinsumDense("ab,bc->ac", 3), cases.X),
    "Embedding": _layer(lambda: _L.Embedding(4, 3), _TOKENS),
    "GRU": _layer(lambda: _L.GRU(2, unroll=True), _SEQUENCE),
    "GRUCell": _layer(lambda: _L.RNN(_L.GRUCell(2), unroll=True), _SEQUENCE),
    "GaussianNoise": _layer(lambda: _L.GaussianNoise(0.3, seed=1), cases.X),
    "GroupNormalization": _layer(lambda: _L.GroupNormalization(2), cases.X),
    "GroupQueryAttention": _layer(
        lambda: _to_itself(_L.GroupQueryAttention(2, 2, 1)), _SEQUENCE
    ),
    "LSTM": _layer(lambda: _L.LSTM(2, unroll=True), _SEQUENCE),
    "LSTMCell": _layer(lambda: _L.RNN(_L.LSTMCell(2), unroll=True), _SEQUENCE),
    "MultiHeadAttention": _layer(
        lambda: _to_itself(_L.MultiHeadAttention(2, 2)), _SEQUENCE
    ),
    "Normalization": _layer(
        lambda: _L.Normalization(mean=0.3, variance=2.0), cases.X
    ),
    "Permute": _layer(lambda: _L.Permute((2, 1)), _SEQUENCE),
    "Pipeline": _layer(
        lambda: _L.Pipeline([_L.Rescaling(2.0), _L.Rescaling(0.3)]), cases.X
    ),
    "RNN": _layer(lambda: _L.RNN(_L.SimpleRNNCell(2), unroll=True), _SEQUENCE),
    "RepeatVector": _layer(lambda: _L.RepeatVector(2), cases.X),
    "Rescaling": _layer(lambda: _L.Rescaling(0.3, 1.0), cases.X),
    "Reshape": _layer(lambda: _L.Reshape((2, 2)), cases.X),
    **{
        f"Resizing {method}": _layer(
            lambda method=method: _L.Resizing(4, 9, interpolation=method),
            cases.IMAGES,
            modes=cases.Case.modes if method == "bilinear" else cases.NO_XLA,
        )
        for method in ("bilinear", "nearest", "bicubic", "lanczos3")
    },
    **{
        f"UpSampling2D {method}": _layer(
            lambda method=method: _L.UpSampling2D(2, interpolation=method),
            cases.IMAGES,
            modes=cases.Case.modes if method == "bilinear" else cases.NO_XLA,
        )
        for method in ("bilinear", "bicubic")
    },
    "ReversibleEmbedding": _layer(
        lambda: _L.ReversibleEmbedding(4, 3), _TOKENS
    ),
    "SimpleRNN": _layer(lambda: _L.SimpleRNN(2, unroll=True), _SEQUENCE),
    "SimpleRNNCell": _layer(
        lambda: _L.RNN(_L.SimpleRNNCell(2), unroll=True), _SEQUENCE
    ),
    "StackedRNNCells": _layer(
        lambda: _L.RNN(
            _L.StackedRNNCells([_L.GRUCell(2), _L.LSTMCell(2)]), unroll=True
        ),
        _SEQUENCE,
    ),
    "SpectralNormalization": _layer(
        lambda: _L.SpectralNormalization(_L.Dense(3, "tanh")), cases.X
    ),
    "TimeDistributed": _layer(
        lambda: _L.TimeDistributed(_L.Dense(2, "tanh")), _SEQUENCE
    ),
    "STFTSpectrogram": _layer(
        lambda: _L.STFTSpectrogram("magnitude", 4, 2, 8),
        cases.random_array(1, 16, 1),
    ),
    "MelSpectrogram": _single_layer(
        lambda: _L.MelSpectrogram(
            fft_length=8,
            sequence_stride=4,
            sequence_length=8,
            sampling_rate=100,
            num_mel_bins=4,
            dtype="float32",
        ),
        3 * cases.random_array(1, 32),
    ),
    **{
        name: _layer(
            lambda name=name, kwargs=kwargs: getattr(_L, name)(**kwargs),
            cases.IMAGES,
            modes=modes,
        )
        for name, kwargs, modes in [
            ("AutoContrast", {}, cases.Case.modes),
            ("CutMix", {"seed": 1}, cases.NO_XLA),
            ("Equalization", {}, cases.Case.modes),
            ("MixUp", {"seed": 1}, cases.NO_XLA),
            ("RandomBrightness", {"factor": 0.2, "seed": 1}, cases.Case.modes),
            (
                "RandomColorDegeneration",
                {"factor": 0.5, "seed": 1},
                cases.Case.modes,
            ),
            ("RandomColorJitter", {"seed": 1}, cases.Case.modes),
            ("RandomContrast", {"factor": 0.2, "seed": 1}, cases.Case.modes),
            (
                "RandomCrop",
                {"height": 4, "width": 4, "seed": 1},
                cases.Case.modes,
            ),
            ("RandomElasticTransform", {"seed": 1}, cases.NO_XLA),
            ("RandomErasing", {"seed": 1}, cases.Case.modes),
            ("RandomFlip", {"seed": 1}, cases.Case.modes),
            ("RandomGaussianBlur", {"seed": 1}, cases.Case.modes),
            ("RandomGrayscale", {"seed": 1}, cases.Case.modes),
            ("RandomInvert", {"seed": 1}, cases.Case.modes),
            ("RandomSharpness", {"factor": 0.2, "seed": 1}, cases.Case.modes),
            ("Solarization", {"seed": 1}, cases.Case.modes),
        ]
    },
}
LAYERS_DIFFERENCES = {
    **dict.fromkeys(
        (
            "AugMix",
            "RandAugment",
            "RandomPerspective",
            "RandomRotation",
            "RandomShear",
            "RandomTranslation",
            "RandomZoom",
        ),
        cases.INVERSE + "; no matter where no variable comes before",
    ),
}
LAYERS_CONSTANT = {
    "text, integers and bounding boxes in": (
        "CategoryEncoding Discretization HashedCrossing Hashing IntegerLookup "
        "MaxNumBoundingBoxes StringLookup TextVectorization"
    ),
    "no first derivative in TensorFlow": (
        "ContrastLimitedAdaptiveHistogramEqualization RandomHue "
        "RandomPosterization RandomSaturation"
    ),
    "compute nothing": "InputLayer InputSpec Layer Wrapper",
}
LAYERS_REFUSED = {
    "other people's code, looked at by itself": (
        "FlaxLayer JaxLayer Lambda TFSMLayer TorchModuleWrapper"
    ),
}
