"""What TensorBoard's plugins are told, as protocol buffers.

One buffer for all that belongs to a step: an op for each value would cost more
than a small network's step.
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorboard.compat.proto import summary_pb2
from tensorboard.compat.proto import tensor_shape_pb2
from tensorboard.compat.proto import types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as hparams_v1
from tensorboard.plugins.hparams import summary_v2 as hparams_v2
from tensorboard.plugins.scalar import metadata

from keras_fisher._tensorboard import tags

# Charts of the Custom Scalars page: title, and regular expressions on tags.
_LAYOUT = {
    "Fisher information": {
        "Tr(F)": [f"^{tags.TRACE}$", f"^{tags.PROBE_TRACE}$"],
        "Explosion ratio": [f"^{tags.EXPLOSION}$"],
        "Tr(F) by layer": [f"^{tags.TRACE_BY_LAYER}.*"],
    },
}
_WITH_BOUND = {
    "Penalty": {
        "Gradient of the penalty over that of the loss": [f"^{tags.RATIO}$"],
    },
}
_WITH_NOISE_FLAGS = {
    "Memorization": {
        "Clean against noisy accuracy": [f"^{tags.CLEAN}$", f"^{tags.NOISY}$"],
    },
}


def scalars(values: Mapping[str, float]) -> bytes:
    """Points of several curves; float32, as all of TensorBoard's."""
    summary = summary_pb2.Summary()
    for tag, number in values.items():
        value = summary.value.add(tag=tag, metadata=_SCALAR)
        value.tensor.dtype = types_pb2.DT_FLOAT
        value.tensor.tensor_shape.CopyFrom(tensor_shape_pb2.TensorShapeProto())
        value.tensor.float_val.append(number)
    return summary.SerializeToString()


def custom_scalars(has_noise_flags: bool, has_bound: bool) -> bytes:
    """The charts of the Custom Scalars page."""
    shown = dict(_LAYOUT)
    if has_bound:
        shown |= _WITH_BOUND
    if has_noise_flags:
        shown |= _WITH_NOISE_FLAGS
    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=category,
                chart=[
                    layout_pb2.Chart(
                        title=title,
                        multiline=layout_pb2.MultilineChartContent(tag=lines),
                    )
                    for title, lines in charts.items()
                ],
            )
            for category, charts in shown.items()
        ]
    )
    return custom_scalar.pb(layout).SerializeToString()


def session_start(hyperparameters: Mapping, name: str) -> bytes:
    """A row of the HParams page, with a name of its own."""
    return hparams_v2.hparams_pb(
        dict(hyperparameters), trial_id=name
    ).SerializeToString()


def session_end() -> bytes:
    """The row is complete."""
    return hparams_v1.session_end_pb(api_pb2.STATUS_SUCCESS).SerializeToString()


_SCALAR = metadata.create_summary_metadata(display_name="", description="")
