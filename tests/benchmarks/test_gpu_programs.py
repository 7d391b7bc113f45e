"""What is exported for GPUs says what it is, and is what TensorFlow runs."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_GPU = _ROOT / "benchmarks" / "gpu"
_UNIFORM = [0.084589660, 0.411148369, 0.845698178]
# Made by `make gpu-check`.
_JAX = _ROOT / ".venv-jax" / "bin" / "python"


def _run(python, script: str, *arguments) -> str:
    result = subprocess.run(
        [python, _GPU / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("programs")
    _run(
        sys.executable,
        "export.py",
        *("--network=MLP", "--precision=float32", "--notimed"),
        *("--side=keras.Model", "--side=FP every 10", "--side=fisher_trace"),
        f"--output_dir={directory}",
    )
    return directory


def _described(directory) -> dict[str, dict]:
    found = [
        json.loads(gzip.decompress(path.read_bytes()))
        for path in directory.glob("*.json.gz")
    ]
    return {f"{d['side']}, {d['plan']}": d for d in found}


@pytest.fixture
def arrays(monkeypatch):
    monkeypatch.syspath_prepend(_GPU)
    import arrays

    yield arrays
    sys.modules.pop("arrays")


@pytest.mark.slow
def test_steps_of_a_side_have_their_shares(exported):
    found = _described(exported)
    shares = {name: d["share"] for name, d in found.items()}
    assert shares == {
        "keras.Model, plain": 1.0,
        "FP every 10, fresh": 0.1,
        "FP every 10, reused": 0.9,
        "fisher_trace, compiled function": 1.0,
    }


@pytest.mark.slow
def test_results_feed_the_variables_that_a_step_assigns(exported):
    step = _described(exported)["FP every 10, reused"]
    arguments = step["arguments"]
    fed = {r["feeds"] for r in step["results"]} - {None}
    only_read = {
        a["name"]
        for i, a in enumerate(arguments)
        if a["role"] == "variable" and i not in fed
    }
    stored = {f"gradient_{i}" for i in range(8)}
    assert stored <= only_read, only_read
    assert any(name.endswith(" rate") for name in only_read), only_read
    trained = ("model ", "momentum", "iterations")
    assert not [n for n in only_read if any(t in n for t in trained)]


@pytest.mark.slow
def test_no_two_arguments_have_one_name(exported):
    for name, step in _described(exported).items():
        names = [a["name"] for a in step["arguments"]]
        assert len({*names}) == len(names), name


def test_programs_have_the_arguments_that_are_described(exported):
    for name, step in _described(exported).items():
        text = gzip.decompress((exported / step["program"]).read_bytes())
        main = text.decode().split("func.func @main", 1)[1].split("\n", 1)[0]
        arguments, results = main.split("->")
        assert "mhlo.copy" not in text.decode(), name
        assert arguments.count("%arg") == len(step["arguments"]), name
        assert results.count("tensor<") == len(step["results"]), name


def test_arrays_are_the_same_wherever_they_are_made(arrays):
    argument = {
        "name": "x",
        "shape": [3],
        "dtype": "float32",
        "make": {"kind": "uniform", "mean": 0.0, "std": 1.0},
    }
    again = arrays.made(argument)
    np.testing.assert_array_equal(arrays.made(argument), again)
    assert arrays.uniform("x", (3,)).tolist() == pytest.approx(
        _UNIFORM, abs=1e-7
    )


def test_sketches_tell_how_far_arrays_are_apart(arrays):
    random = np.random.default_rng(0)
    true = random.normal(size=10_000)
    near = true + 1e-3 * random.normal(size=10_000)
    distance = arrays.difference(
        arrays.sketch("x", near), arrays.sketch("x", true)
    )
    # Four products with random signs: right up to a factor.
    assert 0.03 < distance < 0.3


@pytest.mark.slow
@pytest.mark.skipif(not _JAX.exists(), reason="make gpu-check installs JAX")
def test_programs_give_the_results_of_tensorflow(exported, tmp_path):
    said = _run(
        _JAX,
        "card.py",
        *("--programs", exported, "--output", tmp_path),
        *("--parts", "check_all", "--no_torch"),
    )
    assert said.count("checked MLP") == 4, said
    _run(
        sys.executable,
        "tables.py",
        *(tmp_path / "gpu.json", "--output", tmp_path),
    )
    table = (tmp_path / "gpu.md").read_text("utf-8")
    assert "| MLP | float32 | FP every 10, fresh |" in table, table


@pytest.mark.parametrize(
    "script",
    [pytest.param("export.py", marks=pytest.mark.slow), "tables.py"],
)
def test_help_explains_the_flags(script):
    result = subprocess.run(
        [sys.executable, _GPU / script, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        check=False,
    )
    assert "(default:" in result.stdout, result.stderr
