"""Which layers and operations are known to have exact second derivatives.

The tests compare each of them with differences, eagerly, in a graph and under
XLA, and write `docs/second_derivatives.md` from what they find. What is not
in here may be as good; nobody has looked at it.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import Any

import keras

from keras_fisher._common import keras_layers


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LAYERS = _names(
    "Activation ActivityRegularization AdaptiveAveragePooling1D "
    "AdaptiveAveragePooling2D AdaptiveAveragePooling3D AdaptiveMaxPooling1D "
    "AdaptiveMaxPooling2D AdaptiveMaxPooling3D Add AdditiveAttention "
    "AlphaDropout Attention "
    "AutoContrast Average AveragePooling1D AveragePooling2D "
    "AveragePooling3D BatchNormalization Bidirectional CenterCrop "
    "Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D "
    "Conv3DTranspose ConvLSTM1D ConvLSTM2D ConvLSTM3D Cropping1D Cropping2D "
    "Cropping3D CutMix Dense DepthwiseConv1D DepthwiseConv2D Dot Dropout "
    "ELU EinsumDense Embedding Equalization Flatten GRU GRUCell "
    "GaussianDropout GaussianNoise GlobalAveragePooling1D "
    "GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D "
    "GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization "
    "GroupedQueryAttention Identity LSTM LSTMCell LayerNormalization "
    "LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum "
    "MelSpectrogram Minimum MixUp MultiHeadAttention Multiply Normalization "
    "PReLU Permute Pipeline RMSNormalization RNN RandomBrightness "
    "RandomColorDegeneration RandomColorJitter RandomContrast RandomCrop "
    "RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur "
    "RandomGrayscale RandomInvert RandomSharpness ReLU RepeatVector "
    "Rescaling Reshape Resizing ReversibleEmbedding STFTSpectrogram "
    "SeparableConv1D SeparableConv2D SimpleRNN SimpleRNNCell Softmax "
    "Solarization SpatialDropout1D SpatialDropout2D SpatialDropout3D "
    "SpectralNormalization StackedRNNCells Subtract TimeDistributed "
    "UnitNormalization "
    "UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D "
    "ZeroPadding3D"
)
# These compute nothing that is differentiated, or nothing at all.
_CONSTANT_LAYERS = _names(
    "CategoryEncoding Discretization HashedCrossing Hashing InputLayer "
    "IntegerLookup MaxNumBoundingBoxes StringLookup TextVectorization"
)
# What Keras calls its functions in functional models, in lower case.
_OPERATIONS = _names(
    "abs absolute add amax amin append arccos arccosh arcsin arcsinh arctan "
    "arctan2 arctanh average averagepool batchnormalization broadcastto "
    "cast cbrt celu clip concatenate conv convtranspose copy cos cosh "
    "cumprod cumsum depthtospace depthwiseconv diag diagonal divide dot "
    "einsum elu erf exp expanddims expm1 flip gelu getitem glu hardshrink "
    "hardsigmoid hardsilu hardtanh leakyrelu log log10 log1p log2 logaddexp "
    "logsigmoid logsoftmax logsumexp matmul max maximum maxpool mean min "
    "minimum multiply negative norm normalize pad power prod ravel "
    "reciprocal relu relu6 repeat reshape resize roll rsqrt segmentsum selu "
    "separableconv sigmoid silu sin sinh softmax softplus softshrink "
    "softsign sort spacetodepth sparsemax split sqrt square squeeze stack "
    "std subtract sum swapaxes take takealongaxis tan tanh tensordot tile "
    "topk transpose tril triu truedivide var where"
)


def unknown(layer: keras.layers.Layer) -> list[keras.Operation]:
    """What of a layer, and of all that is in it, is not known."""
    return [
        operation
        for operation in keras_layers.operations_in(layer)
        if not is_known(operation)
    ]


def is_known(operation: keras.Operation) -> bool:
    """Whether what an operation does itself has exact second derivatives.

    What is inside of it (the layers of a model, a wrapped layer, an activation
    that is a layer) counts by itself.
    """
    # A wrapper of ours is as known as what it runs.
    own = keras_layers.unwrapped(operation)
    if not (keras_layers.is_keras_own(own) or only_contains(own)):
        return False
    if not isinstance(operation, keras.layers.Layer):
        return type(operation).__name__.lower() in _OPERATIONS
    if getattr(operation, "quantization_mode", None) is not None:
        return False
    name = type(operation).__name__
    return (
        only_contains(operation)
        or name in _CONSTANT_LAYERS
        or (name in _LAYERS and not any(functions_of_others(operation)))
    )


def only_contains(operation: keras.Operation) -> bool:
    """Whether it does nothing but to call what is in it.

    As do functional models whose classes are other people's, as KerasHub's.
    """
    for cls in (keras.Sequential, _functional()):
        if isinstance(operation, cls):
            own = vars(operation).get("call")  # that a user has set
            return own is None and type(operation).call is cls.call
    return keras_layers.unwrapped(operation) is not operation or isinstance(
        operation, keras.layers.InputLayer
    )


@functools.cache
def _functional() -> type:
    """The class of functional models, which has no public name."""
    x = keras.Input((1,))
    return type(keras.Model(x, keras.layers.Identity()(x)))


def functions_in(layer: keras.layers.Layer) -> Iterator[Any]:
    """What a layer of Keras calls that is no layer: its activations."""
    for name, value in vars(layer).items():
        if (
            callable(value)
            and not isinstance(value, type | keras.layers.Layer)
            and not keras_layers.is_keras_own(value)
            # Keras wraps methods of a layer.
            and not hasattr(type(layer), name)
            and not name.endswith(("initializer", "regularizer", "constraint"))
        ):
            yield value


def functions_of_others(layer: keras.layers.Layer) -> Iterator[Any]:
    """Functions in a layer of Keras that are not Keras's, as activations."""
    for value in functions_in(layer):
        if not keras_layers.is_keras_function(getattr(value, "func", value)):
            yield value
