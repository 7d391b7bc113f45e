"""Exports the steps that `fit` runs, for machines that have no TensorFlow.

Each step becomes a StableHLO program, with the batch that it is timed with
and, smaller, with one whose results TensorFlow computes here to compare with.
Weights and batches are made from seeds where the programs run.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.append(str(Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
import programs
import steps
import tensorflow as tf
from workers import machine
from workers import reports

_ALL = steps.NETWORKS | steps.LARGE | steps.TRAINED
_NETWORKS = flags.DEFINE_multi_enum(
    "network",
    [],
    list(_ALL),
    "A network to export; all but those that `train.py` trains if none is "
    "given.",
)
_SIDES = flags.DEFINE_multi_enum(
    "side",
    [],
    list(steps.SIDES),
    "A side to export; all if none is given, but in bfloat16 and in large "
    "batches only the first four.",
)
_PRECISIONS = flags.DEFINE_multi_enum(
    "precision",
    list(steps.PRECISIONS),
    list(steps.PRECISIONS),
    "Dtype policies of Keras; float64 to compare values alone.",
)
_TIMED = flags.DEFINE_boolean(
    "timed", True, "Whether to export the batches that are timed, too."
)
_TRAINING = flags.DEFINE_boolean(
    "training",
    False,
    "Whether to export what `train.py` trains, and nothing else.",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    ".gpu-programs",
    "Where to write the programs, from the root of the repository. What is "
    "there of other steps stays.",
)
_MOST_USED = 4  # sides that are exported in every precision and size


def save(directory: Path, name: str, text: str, described: dict) -> None:
    file = re_named(name)
    data = gzip.compress(text.encode(), 9, mtime=0)
    (directory / f"{file}.mlir.gz").write_bytes(data)
    described = {"name": name, "program": f"{file}.mlir.gz", **described}
    described = json.dumps(described)
    (directory / f"{file}.json.gz").write_bytes(
        gzip.compress(described.encode(), 9, mtime=0)
    )


def re_named(name: str) -> str:
    """A name as that of a file."""
    return name.replace("1/8", "eighth").replace(" ", "_").replace("/", "__")


def export(
    directory: Path, network_name: str, side: str, precision: str
) -> None:
    """Exports all steps of a side."""
    network = _ALL[network_name]
    sizes = {"checked": network.checked, "timed": network.timed}
    if precision == "float64" or not _TIMED.value:
        del sizes["timed"]
    if network_name in steps.LARGE:
        del sizes["checked"]
    if network_name in steps.TRAINED:
        sizes["trained"] = sizes.pop("timed", network.timed)
    for kind, size in sizes.items():
        for plan, step in steps.steps(network, side, size, precision).items():
            arguments = steps.arguments(network, side, size)
            text, described = programs.exported(step, arguments)
            if kind == "checked":
                described["true"] = programs.true_results(
                    step.reference, step, described, arguments
                )
            described |= {
                "network": network_name,
                "precision": precision,
                "side": side,
                "plan": plan,
                "share": step.share,
                "kind": kind,
                "batch_size": size,
                "commit": reports.commit(),
                "versions": machine.versions(["tensorflow", "keras", "numpy"]),
            }
            name = f"{network_name}/{precision}/{side}/{plan}/{kind}"
            save(directory, name, text, described)
            print(f"{name}: {len(text) / 1e6:.1f} MB", flush=True)


def main(argv):
    del argv
    tf.config.set_visible_devices([], "GPU")
    directory = reports.output_directory(_OUTPUT_DIR.value)
    if _TRAINING.value:
        for network in _NETWORKS.value or steps.TRAINED:
            for side in steps.TRAINED_SIDES:
                export(directory, network, side, "float32")
        return
    for precision in _PRECISIONS.value:
        for network in _NETWORKS.value or (steps.NETWORKS | steps.LARGE):
            has_all = (
                precision != "mixed_bfloat16" and network in steps.NETWORKS
            )
            sides = steps.SIDES if has_all else steps.SIDES[:_MOST_USED]
            if precision == "float64" and network in steps.LARGE:
                continue
            for side in _SIDES.value or sides:
                begin = time.perf_counter()
                export(directory, network, side, precision)
                print(f"  {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    app.run(main)
