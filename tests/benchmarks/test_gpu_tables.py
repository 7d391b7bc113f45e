"""Tables of what a card has given tell of nothing that it has not."""

from __future__ import annotations

import importlib.util
import math
import pathlib

_PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu" / "tables.py"
_SPEC = importlib.util.spec_from_file_location("gpu_tables", _PATH)
tables = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tables)


def _program(share=1.0):
    memory = {"all": 1e9}
    return {"share": share, "batch_size": 8, "memory": memory}


def _found(seconds, shares, left_out=()):
    return {
        "programs": {n: _program(shares.get(n, 1.0)) for n in seconds},
        "blocks": [seconds],
        "peers": {},
        "left out": list(left_out),
    }


_PLAIN = "MLP/tf32/keras.Model/plain/timed"
_FRESH = "MLP/tf32/FP every 10/fresh/timed"
_EVERY = "MLP/tf32/FP every 1/fresh/timed"
_SECONDS = {_PLAIN: [0.001], _EVERY: [0.003], _FRESH: [0.011]}


def test_results_that_are_no_numbers_are_the_worst():
    assert tables.worst([1e-7, math.nan, 0.0]) == math.inf
    assert tables.worst([1e-7, 0.0]) == 1e-7


def test_steps_of_keras_fill_up_a_side():
    found = _found(_SECONDS, {_FRESH: 0.1})
    assert "| FP every 10 | 2.00 | 2.00 |" in tables.times(found)
    assert "| 2.00 |" in tables.summary(found)


def test_a_side_of_which_a_part_is_left_out_is_left_out():
    reused = _FRESH.replace("fresh", "reused")
    found = _found(
        _SECONDS,
        {_FRESH: 0.1},
        [[reused, "no time to compile"]],
    )
    assert "FP every 10" not in tables.times(found)
    assert "keras.Model" in tables.times(found)
    assert "| 2.00 |" not in tables.summary(found)


def test_blocks_without_a_program_are_left_out():
    for empty in ({}, {"PyTorch plain": [0.001]}):
        found = _found(_SECONDS, {_FRESH: 0.1})
        found["blocks"].insert(0, empty)
        assert tables.times(found).count("| MLP, 8 |") == 3, empty
        assert tables.summary(found).count("| MLP |") == 1, empty


def test_kernels_of_one_precision_are_told_of_by_plan():
    profile = {"milliseconds": 1.0, "products": 0.5, "kernels": 3}
    other = _FRESH.replace("tf32", "mixed_bfloat16")
    text = tables.profile({"profiles": {_FRESH: profile, other: profile}})
    assert text.count("| MLP |") == 1
    assert "FP every 10, fresh" in text
