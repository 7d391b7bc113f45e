"""The Python of pages and docstrings runs, block after block."""

from __future__ import annotations

import inspect
import pathlib
import re
import textwrap

from cases import slow
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_fisher

_ROOT = pathlib.Path(__file__).parents[2]
_BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# Data sets that only a machine with a network, or a download, has.
_DOWNLOADED = re.compile(r'load\(\s*"(cifar10|tiny_imagenet)"')
_READS_LOGS = re.compile(r"logs\.r(ead|uns)\(")
# Pages of many epochs or compilations.
_LONG = {"README.md", "docs/distribution.md", "docs/watching.md"}


def _blocks(text: str) -> list[str]:
    """Blocks of Python; what cannot be loaded here is compiled alone."""
    found = []
    for _, block in _BLOCK.findall(text):
        block = textwrap.dedent(block)
        compile(block, "<block>", "exec")
        if not _DOWNLOADED.search(block):
            found.append(block)
    return found


def _pages() -> dict[str, list[str]]:
    texts = {
        path.relative_to(_ROOT).as_posix(): path.read_text("utf-8")
        for folder in ("", "docs")
        for path in sorted((_ROOT / folder).glob("*.md"))
    }
    return {name: _blocks(text) for name, text in texts.items()}


def _docstrings() -> dict[str, list[str]]:
    """Of what the pages of the API show, by their names there."""
    found = {}
    for path in sorted((_ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE):
            value = keras_fisher
            for part in name.split(".")[1:]:
                value = getattr(value, part)
            found[name] = _blocks(inspect.getdoc(value))
    return found


_PAGES = {name: blocks for name, blocks in _pages().items() if blocks}
_DOCSTRINGS = {name: blocks for name, blocks in _docstrings().items() if blocks}


def _build_network(classes: int = 10) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(classes),
        ]
    )


def _what_readers_have() -> dict:
    """A compiled model, and data for it, under the names of the pages."""
    random = np.random.default_rng(0)
    x = random.normal(size=(256, 28, 28)).astype("float32")
    y = np.argmax(x[:, 0, :10], axis=-1)
    model = keras_fisher.FisherModel(_build_network(), 0.1, seed=0)
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return {
        "keras": keras,
        "keras_fisher": keras_fisher,
        "np": np,
        "tf": tf,
        "build_network": _build_network,
        "dataset": tf.data.Dataset.from_tensor_slices((x, y)).batch(64),
        "model": model,
        "network": model.model,
        "steps_per_epoch": 4,
        "x": x,
        "y": y,
        "x_test": x,
        "y_test": y,
    }


def _write_earlier_runs() -> None:
    """What readers who compare runs have in `logs` already."""
    for rate in (0.03, 0.1, 0.3):
        names = _what_readers_have()
        names["model"].optimizer.learning_rate = rate
        early = keras_fisher.callbacks.EarlyPhase("accuracy", threshold=0.5)
        board = keras_fisher.callbacks.FisherTensorBoard(
            f"logs/earlier/lr={rate}", early_phase=early
        )
        noisy = keras_fisher.datasets.add_label_noise(
            names["dataset"], rate=0.2, num_classes=10, seed=0
        )
        names["model"].fit(
            noisy,
            validation_data=names["dataset"].take(1),
            epochs=20,
            callbacks=[board],
            verbose=0,
        )


def _run(blocks: list[str], directory: pathlib.Path) -> None:
    if any(map(_READS_LOGS.search, blocks)):
        _write_earlier_runs()
    names = _what_readers_have()
    for block in blocks:
        here = block.replace("/shared", str(directory / "shared"))
        exec(compile(here, f"<{block.strip().splitlines()[0]}>", "exec"), names)


@pytest.mark.parametrize(
    "page", [*sorted(_PAGES.keys() - _LONG), *slow(sorted(_LONG))]
)
def test_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    _run(_PAGES[page], tmp_path)


def _reads_logs(name: str) -> bool:
    return any(map(_READS_LOGS.search, _DOCSTRINGS[name]))


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in _DOCSTRINGS if not _reads_logs(name)),
        *slow(filter(_reads_logs, _DOCSTRINGS)),
    ],
)
def test_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    _run(_DOCSTRINGS[name], tmp_path)
