"""Every activation and function of Keras, and its second derivative.

The tables of `docs/second_derivatives.md`. A name of Keras that is in none of
them makes `test_catalogue` fail until somebody has looked at it.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import keras
from keras import ops
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to differentiate twice, and where.

    Attributes:
        function: Of `arrays`, some floating outputs.
        arrays: Float64 arrays to differentiate by.
        modes: Where TensorFlow or Keras has no kernels, without that mode.
        step: Of the differences; larger for what computes in single precision.
        tolerance: Relative.
    """

    function: Callable
    arrays: tuple
    modes: tuple = ("eager", "graph", "xla")
    step: float = 1e-5
    tolerance: float = 1e-5


def random_array(*shape, low=None, high=None, seed=0) -> np.ndarray:
    random = np.random.default_rng([seed, *shape])
    if low is None:
        return random.normal(size=shape)
    return random.uniform(low, high, size=shape)


X = random_array(3, 4)
_POSITIVE = random_array(3, 4, low=0.5, high=2.0)
_UNIT = random_array(3, 4, low=-0.8, high=0.8)
_LARGE = random_array(3, 4, low=1.5, high=3.0)
_VECTOR = random_array(5)
_SQUARE = random_array(4, 4) + 4 * np.eye(4)
_SYMMETRIC = _SQUARE @ _SQUARE.T
IMAGES = random_array(2, 6, 6, 3, low=0.1, high=0.9)
_UNIT_ROWS = _POSITIVE / _POSITIVE.sum(axis=1, keepdims=True)
_SEGMENTS = np.array([0, 0, 1])


def _of(name: str, *arrays, modes=Case.modes, **kwargs) -> Case:
    return Case(lambda *a: getattr(ops, name)(*a, **kwargs), arrays, modes)


def _with(function: Callable, *arrays, modes=Case.modes) -> Case:
    return Case(function, arrays, modes)


def _single(function: Callable, *arrays) -> Case:
    """Of what computes in single precision, as complex numbers do in Keras."""
    return Case(function, arrays, step=3e-3, tolerance=1e-2)


def _unary(domain, names: str) -> dict:
    return {name: _of(name, domain) for name in names.split()}


NO_XLA = ("eager", "graph")

OPS_EXACT: dict[str, Case] = {
    **_unary(
        X,
        "abs absolute amax amin arcsinh arctan average celu conj conjugate "
        "copy cos cosh cumprod cumsum deg2rad diag diagonal diff elu erf exp "
        "expm1 fabs flip fliplr flipud gelu glu hard_shrink hard_sigmoid "
        "hard_silu hard_swish hard_tanh leaky_relu log_sigmoid "
        "log_softmax logsumexp max mean median min nan_to_num nancumprod "
        "nancumsum nanmax nanmean nanmin nanprod nanstd nansum "
        "nanvar negative norm normalize prod ptp rad2deg ravel real relu "
        "relu6 selu sigmoid silu sin sinc sinh soft_shrink softmax softplus "
        "softsign sort sparse_plus sparse_sigmoid sparsemax square squareplus "
        "squeeze std sum swish tan tanh tanh_shrink trace transpose trapezoid "
        "tril triu var rms_normalization diagflat",
    ),
    **_unary(
        _POSITIVE,
        "cbrt log log10 log1p log2 reciprocal rsqrt sqrt erfc",
    ),
    **_unary(_UNIT, "arccos arcsin arctanh erfinv"),
    **_unary(_LARGE, "arccosh"),
    **_unary(_SQUARE, "cholesky_inverse inv pinv"),
    "det": _of("det", _SQUARE, modes=NO_XLA),
    **{
        # Of the lower triangle alone, with a gradient as of a whole.
        name: _with(
            lambda x, name=name: getattr(ops, name)((x + ops.transpose(x)) / 2),
            _SYMMETRIC,
        )
        for name in ("cholesky", "logdet")
    },
}
_PAIRS = {
    "add": X,
    "arctan2": X,
    "divide": _POSITIVE,
    "divide_no_nan": _POSITIVE,
    "fmax": X,
    "fmin": X,
    "fmod": _POSITIVE,
    "hypot": X,
    "logaddexp": X,
    "logaddexp2": X,
    "maximum": X,
    "minimum": X,
    "mod": _POSITIVE,
    "multiply": X,
    "outer": X,
    "subtract": X,
    "true_divide": _POSITIVE,
    "vdot": X,
}
OPS_EXACT |= {
    name: _of(name, X + 0.3, second[::-1].copy())
    for name, second in _PAIRS.items()
}
OPS_EXACT |= {
    "inner": _of("inner", X, X[::-1].copy(), modes=("eager",)),
    "kron": _of("kron", X, X[::-1].copy(), modes=("eager",)),
    "adaptive_average_pool": _of(
        "adaptive_average_pool", IMAGES, output_size=2
    ),
    "adaptive_max_pool": _of(
        "adaptive_max_pool", IMAGES, output_size=2, modes=NO_XLA
    ),
    "corrcoef": _of("corrcoef", X, modes=("eager",)),
    "exp2": _of("exp2", X, modes=("eager",)),
    "i0": _of("i0", _POSITIVE, modes=NO_XLA),
    "nanmedian": _of("nanmedian", X, modes=NO_XLA),
    "append": _of("append", X, X[::-1].copy()),
    "array_split": _of("array_split", X, indices_or_sections=2),
    "associative_scan": _with(
        lambda x: ops.associative_scan(lambda a, b: a * b, x), _POSITIVE
    ),
    "average_pool": _of("average_pool", IMAGES, pool_size=2),
    "batch_normalization": _with(
        lambda x, m, v: ops.batch_normalization(x, m, v, axis=-1),
        X,
        X[0],
        _POSITIVE[0],
    ),
    "binary_crossentropy": _with(
        lambda t, p: ops.binary_crossentropy(t, p),
        _POSITIVE / 3,
        _POSITIVE[::-1] / 3,
    ),
    "broadcast_to": _of("broadcast_to", X, shape=(2, 3, 4)),
    "cast": _of("cast", X, dtype="float64"),
    "categorical_crossentropy": _with(
        lambda x: ops.categorical_crossentropy(_UNIT_ROWS, x, from_logits=True),
        X,
    ),
    "cdist": _of("cdist", X, X[::-1] + 0.2),
    "clip": _of("clip", X, x_min=-0.5, x_max=0.7),
    "concatenate": _with(lambda a, b: ops.concatenate([a, b], 1), X, X),
    "cond": _with(
        lambda x: ops.cond(ops.sum(x) > 0, lambda: x**3, lambda: x**2), X
    ),
    "conv": _of("conv", IMAGES, random_array(3, 3, 3, 2), padding="same"),
    "conv_transpose": _of(
        "conv_transpose", IMAGES, random_array(3, 3, 2, 3), strides=2
    ),
    "convert_to_tensor": _of("convert_to_tensor", X),
    "correlate": _of("correlate", _VECTOR, _VECTOR[::-1].copy(), mode="full"),
    "cross": _of("cross", X[:, :3], X[::-1, 1:].copy()),
    "custom_gradient": _with(
        lambda x: ops.custom_gradient(
            lambda y: (y**3, lambda upstream: 3 * y**2 * upstream)
        )(x),
        X,
    ),
    "depth_to_space": _of(
        "depth_to_space", random_array(1, 2, 2, 4), block_size=2
    ),
    "depthwise_conv": _of("depthwise_conv", IMAGES, random_array(3, 3, 3, 2)),
    "dot": _of("dot", X, X.T.copy()),
    "dot_product_attention": _with(
        lambda q, k, v: ops.dot_product_attention(q, k, v),
        *[random_array(2, 3, 2, 4, seed=k) for k in range(3)],
    ),
    "dsplit": _of("dsplit", random_array(2, 2, 4), indices_or_sections=2),
    "dstack": _with(lambda a, b: ops.dstack([a, b]), X, X),
    "eigh": _with(
        lambda x: ops.eigh((x + ops.transpose(x)) / 2)[0], _SYMMETRIC
    ),
    "einsum": _with(lambda a, b: ops.einsum("ij,kj->ik", a, b), X, X),
    "expand_dims": _of("expand_dims", X, axis=1),
    "extract_sequences": _of(
        "extract_sequences", X, sequence_length=2, sequence_stride=1
    ),
    "fft": _with(lambda a, b: ops.fft((a, b)), X, X[::-1].copy()),
    "fft2": _with(lambda a, b: ops.fft2((a, b)), X, X[::-1].copy()),
    "ifft2": _with(lambda a, b: ops.ifft2((a, b)), X, X[::-1].copy()),
    "fold": _of(
        "fold", random_array(1, 4, 4), output_size=4, kernel_size=2, stride=2
    ),
    "fori_loop": _with(
        lambda x: ops.fori_loop(0, 3, lambda i, y: y * ops.sin(x), x),
        X,
        modes=NO_XLA,
    ),
    "get_item": _of("get_item", X, key=(slice(0, 2), 1)),
    "hsplit": _of("hsplit", X, indices_or_sections=2),
    "hstack": _with(lambda a, b: ops.hstack([a, b]), X, X),
    "irfft": _with(
        lambda a, b: ops.irfft((a, b)),
        random_array(3, 4),
        random_array(3, 4, seed=1),
    ),
    "layer_normalization": _of("layer_normalization", X, X[0], X[1]),
    "ldexp": _with(lambda x: ops.ldexp(x, np.array([1, 2, 0, 1])), X),
    "linspace": _with(
        lambda a, b: ops.linspace(a, b, 4), X, X[::-1].copy(), modes=NO_XLA
    ),
    "logspace": _with(
        lambda a, b: ops.logspace(a, b, 4),
        _UNIT,
        _UNIT[::-1].copy(),
        modes=NO_XLA,
    ),
    "geomspace": _with(
        lambda a, b: ops.geomspace(a, b, 4), _POSITIVE, _LARGE, modes=NO_XLA
    ),
    "lstsq": _with(lambda a, b: ops.lstsq(a, b), random_array(5, 3), _VECTOR),
    "map": _with(lambda x: ops.map(lambda row: row**3, x), X),
    "matmul": _of("matmul", X, X.T.copy()),
    "max_pool": _of("max_pool", IMAGES, pool_size=2),
    "meshgrid": _with(lambda a, b: ops.meshgrid(a, b), _VECTOR, _VECTOR),
    "moments": _of("moments", X, axes=[0]),
    "moveaxis": _of("moveaxis", X, source=0, destination=1),
    "nanpercentile": _of("nanpercentile", X, q=40, modes=NO_XLA),
    "nanquantile": _of("nanquantile", X, q=0.4, modes=NO_XLA),
    "pad": _of("pad", X, pad_width=((1, 1), (0, 2))),
    "percentile": _of("percentile", X, q=40),
    "power": _of("power", _POSITIVE, _LARGE),
    "psnr": _with(lambda a, b: ops.psnr(a, b, 1.0), _POSITIVE, _LARGE),
    "qr": _of("qr", random_array(4, 3)),
    "quantile": _of("quantile", X, q=0.4),
    "rearrange": _with(lambda x: ops.rearrange(x, "a b -> b a"), X),
    "repeat": _of("repeat", X, repeats=2, axis=1),
    "reshape": _of("reshape", X, newshape=(2, 6)),
    "rfft": _of("rfft", X),
    "roll": _of("roll", X, shift=1),
    "rot90": _of("rot90", X),
    "saturate_cast": _of("saturate_cast", X, dtype="float64"),
    "scan": _with(
        lambda x: ops.scan(lambda c, row: (c * row, c * row), x[0], x),
        X,
        modes=NO_XLA,
    ),
    "scatter": _with(
        lambda v: ops.scatter(np.array([[0], [2], [0]]), v, (4, 4)), X
    ),
    "scatter_update": _with(
        lambda x, v: ops.scatter_update(x, np.array([[0], [2]]), v), X, X[:2]
    ),
    "segment_max": _with(lambda x: ops.segment_max(x, _SEGMENTS, 2), X),
    "segment_min": _with(lambda x: ops.segment_min(x, _SEGMENTS, 2), X),
    "segment_prod": _with(lambda x: ops.segment_prod(x, _SEGMENTS, 2), X),
    "segment_sum": _with(lambda x: ops.segment_sum(x, _SEGMENTS, 2), X),
    "select": _with(
        lambda x: ops.select([x > 0.5, x > -0.5], [x**3, x**2], 0.0), X
    ),
    "separable_conv": _of(
        "separable_conv",
        IMAGES,
        random_array(3, 3, 3, 1),
        random_array(1, 1, 3, 2),
    ),
    "slice": _with(lambda x: ops.slice(x, (0, 1), (2, 2)), X),
    "slogdet": _with(lambda x: ops.slogdet(x)[1], _SQUARE, modes=NO_XLA),
    "solve": _of("solve", _SQUARE, random_array(4, 2)),
    "solve_triangular": _with(
        lambda a, b: ops.solve_triangular(a, b, lower=True),
        np.tril(_SQUARE),
        random_array(4, 2),
    ),
    "space_to_depth": _of("space_to_depth", IMAGES, block_size=2),
    "sparse_categorical_crossentropy": _with(
        lambda x: ops.sparse_categorical_crossentropy(
            np.array([0, 3, 1]), x, from_logits=True
        ),
        X,
    ),
    "split": _of("split", X, indices_or_sections=2, axis=1),
    "stack": _with(lambda a, b: ops.stack([a, b]), X, X),
    "stft": _with(lambda x: ops.stft(x, 4, 2, 8), random_array(1, 16)),
    "svd": _with(lambda x: ops.svd(x, compute_uv=False), _SQUARE),
    "swapaxes": _of("swapaxes", X, axis1=0, axis2=1),
    "switch": _with(
        lambda x: ops.switch(1, [lambda y: y**2, lambda y: y**3], x), X
    ),
    "take": _with(lambda x: ops.take(x, np.array([2, 0, 2]), axis=1), X),
    "take_along_axis": _with(
        lambda x: ops.take_along_axis(x, np.array([[1], [0], [3]]), 1), X
    ),
    "tensordot": _with(lambda a, b: ops.tensordot(a, b, 2), X, X),
    "threshold": _of("threshold", X, threshold=0.1, default_value=0.3),
    "tile": _of("tile", X, repeats=(2, 1)),
    "top_k": _with(lambda x: ops.top_k(x, 2)[0], X),
    "unfold": _of("unfold", random_array(1, 2, 4, 4), kernel_size=2),
    "unstack": _of("unstack", X, num=3),
    "vander": _of("vander", _VECTOR),
    "vectorized_map": _with(
        lambda x: ops.vectorized_map(lambda row: row**3, x), X
    ),
    "vsplit": _of("vsplit", X.T.copy(), indices_or_sections=2),
    "vstack": _with(lambda a, b: ops.vstack([a, b]), X, X),
    "where": _with(lambda a, b: ops.where(a > 0.1, a * b, a + b**2), X, X),
    "while_loop": _with(
        lambda x: ops.while_loop(
            lambda i, y: i < 3, lambda i, y: (i + 1, y * ops.sin(x)), (0, x)
        )[1],
        X,
        modes=NO_XLA,
    ),
}

OPS_EXACT |= {
    "array": _of("array", X),
    "jvp": _with(lambda x, t: ops.jvp(lambda y: y**3, (x,), (t,))[1], X, X + 1),
    **{
        # The real and the imaginary part of complex numbers.
        name: _single(
            lambda a, b, name=name: getattr(ops, name)(
                ops.view_as_complex(ops.stack([a, b], axis=-1))
            ),
            X,
            X[::-1] + 0.2,
        )
        for name in ("imag", "view_as_real")
    },
    "view_as_complex": _single(
        lambda x: ops.view_as_complex(x), random_array(3, 2)
    ),
    "polar": _with(lambda a, b: ops.polar(a, b), _POSITIVE, X),
    "istft": _with(
        lambda x: ops.istft(ops.stft(x, 4, 2, 8), 4, 2, 8), random_array(1, 16)
    ),
}
OPS_DIFFERENCES = {
    "angle": "under XLA its second derivative in TensorFlow is wrong",
    "ctc_loss": "its second derivative in TensorFlow is NaN",
}
OPS_CONSTANT = {
    "integers and truth values": (
        "all allclose any argmax argmin argpartition argsort bincount "
        "bitwise_and bitwise_invert bitwise_left_shift bitwise_not bitwise_or "
        "bitwise_right_shift bitwise_xor count_nonzero ctc_decode digitize "
        "equal gcd greater greater_equal in_top_k is_tensor isclose isfinite "
        "isin isinf isnan isneginf isposinf isreal lcm left_shift less "
        "less_equal logical_and logical_not logical_or logical_xor "
        "matrix_rank multi_hot nanargmax nanargmin nonzero not_equal one_hot "
        "right_shift searchsorted signbit unique unravel_index histogram"
    ),
    "new arrays, shapes and conversions": (
        "arange bartlett blackman convert_to_numpy dtype empty empty_like eye "
        "full full_like hamming hanning identity kaiser ndim ones ones_like "
        "shape size tri zeros zeros_like"
    ),
    "steps, whose derivative is zero": (
        "ceil floor floor_divide heaviside nextafter round sign trunc"
    ),
    "no first derivative in TensorFlow": "eig lu_factor slice_update view",
    "stops gradients on purpose": "stop_gradient",
    "not in TensorFlow's backend": "vectorize",
}

IMAGE_EXACT = {
    "crop_images": _with(
        lambda x: ops.image.crop_images(x, 1, 1, None, None, 3, 3), IMAGES
    ),
    "elastic_transform": _with(
        # What it draws is another under XLA.
        lambda x: ops.image.elastic_transform(x, 2.0, 1.0, seed=3),
        IMAGES,
        modes=NO_XLA,
    ),
    "extract_patches": _with(
        lambda x: ops.image.extract_patches(x, (2, 2)), IMAGES
    ),
    "extract_patches_3d": _with(
        lambda x: ops.image.extract_patches_3d(x, (2, 2, 2)),
        random_array(1, 4, 4, 4, 2),
    ),
    "gaussian_blur": _with(
        lambda x: ops.image.gaussian_blur(x, (3, 3), (1.0, 1.0)), IMAGES
    ),
    "map_coordinates": _with(
        lambda x, c: ops.image.map_coordinates(x, c, order=1),
        random_array(5, 5),
        random_array(2, 4, low=0.2, high=3.8),
    ),
    "pad_images": _with(lambda x: ops.image.pad_images(x, 1, 1, 1, 1), IMAGES),
    **{
        f"resize {method}": _with(
            lambda x, method=method: ops.image.resize(
                x, (4, 9), interpolation=method
            ),
            IMAGES,
            modes=modes,
        )
        for method, modes in {
            "nearest": NO_XLA,
            "bilinear": Case.modes,
            "bicubic": NO_XLA,
            "lanczos3": NO_XLA,
            "lanczos5": NO_XLA,
        }.items()
    },
    "resize antialias": _with(
        lambda x: ops.image.resize(x, (4, 4), antialias=True),
        IMAGES,
        modes=NO_XLA,
    ),
    "rgb_to_grayscale": _with(lambda x: ops.image.rgb_to_grayscale(x), IMAGES),
    "rgb_to_hsv": _with(lambda x: ops.image.rgb_to_hsv(x), IMAGES),
    "scale_and_translate": _with(
        lambda x: ops.image.scale_and_translate(
            x,
            (2, 4, 4, 3),
            scale=np.array([0.7, 0.8]),
            translation=np.array([0.1, 0.2]),
            spatial_dims=(1, 2),
            method="linear",
        ),
        IMAGES,
    ),
    "sobel_edges": _with(lambda x: ops.image.sobel_edges(x), IMAGES),
    "ssim": _with(
        lambda a, b: ops.image.ssim(a, b, 1.0, filter_size=3),
        IMAGES,
        IMAGES[::-1].copy(),
    ),
}
INVERSE = (
    "TensorFlow takes the inverse transform for the adjoint, so that there is "
    "no derivative of the gradient to be had from it"
)
IMAGE_DIFFERENCES = {
    "affine_transform": INVERSE,
    "perspective_transform": INVERSE,
}
IMAGE_CONSTANT = {"no first derivative in TensorFlow": "hsv_to_rgb"}

ACTIVATIONS_EXACT = {
    name: _with(getattr(keras.activations, name), X)
    for name in [
        "celu",
        "elu",
        "exponential",
        "gelu",
        "glu",
        "hard_shrink",
        "hard_sigmoid",
        "hard_silu",
        "hard_swish",
        "hard_tanh",
        "leaky_relu",
        "linear",
        "log_sigmoid",
        "log_softmax",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "soft_shrink",
        "softmax",
        "softplus",
        "softsign",
        "sparse_plus",
        "sparse_sigmoid",
        "sparsemax",
        "squareplus",
        "swish",
        "tanh",
        "tanh_shrink",
    ]
}
ACTIVATIONS_EXACT["threshold"] = _with(
    lambda x: keras.activations.threshold(x, 0.1, 0.3), X
)
ACTIVATIONS_OTHER = ("deserialize", "get", "serialize")
