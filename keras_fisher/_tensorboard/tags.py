"""What the curves in TensorBoard are called, and the directories they are in.

Written by `callbacks`, read by `logs` and `plotting`.
"""

from __future__ import annotations

# Directories of a run; the first two are Keras's.
TRAIN, VALIDATION, HPARAMS = SPLITS = "train", "validation", "hparams"

TRACE = "fisher/trace"
PENALTY = "fisher/penalty"
RATIO = "fisher/ratio"
ALPHA = "fisher/alpha"
EXPLOSION = "fisher/explosion"
EARLY_TRACE = "fisher/early_trace"
EARLY_THRESHOLD = "fisher/early_threshold"
TRACE_BY_LAYER = "fisher/trace_by_layer/"  # and the path of the layer
PROBE_TRACE = "fisher/probe_trace"
PROBE_TRACE_BY_LAYER = "fisher/probe_trace_by_layer/"
HEAT_MAP = "fisher/heat_map"
CLEAN = "memorization/clean_accuracy"
NOISY = "memorization/noisy_accuracy"
RECOVERED = "memorization/recovered_accuracy"
GAP = "memorization/gap"
METRIC = "metric/"  # and the name in the logs

# Seen after a number of steps; all else is measured at a step, before it ends.
_AFTER = (PROBE_TRACE, HEAT_MAP, "memorization/", METRIC)


def run_and_split(directory: str) -> tuple[str, str]:
    """What run a directory is of, and which of its splits; `""` for none.

    Args:
        directory: Below the directory of the logs, with slashes.
    """
    run, _, split = directory.rpartition("/")
    if split not in SPLITS:
        return directory, ""
    return run or ".", split


def is_fisher(tag: str) -> bool:
    """Whether a curve is ours, at optimizer steps, and not one of Keras's."""
    return tag.startswith(("fisher/", *_AFTER))


def is_later(tag: str, at: int, step: int, epoch: int) -> bool:
    """Whether a point tells of what comes after `step` updates.

    Args:
        tag: Name of the curve.
        at: Where the point is.
        step: Number of updates before.
        epoch: Number of epochs before, where Keras's own curves are; 0 where
            they are counted anew, and none of them is later.
    """
    if tag.startswith("epoch_"):
        return 0 < epoch <= at
    if tag.startswith(_AFTER) or tag.endswith("_vs_iterations"):
        return at > step
    return is_fisher(tag) and at >= step
