"""docs/reproduction.md: no number in its tables that no script has written."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
import experiment
import experiments
import pandas as pd
import pytest
import reproduce

_PAGE = experiments.ROOT / "docs" / "reproduction.md"
_TABLES = sorted(_PAGE.with_suffix("").glob("*.md"))
_OF_SIGNALS = [p for p in _TABLES if not p.stem.startswith("images_")]
_OF_RANKING = "images_noisy_labels"
_OF_TRAINING = [p for p in _TABLES if p.stem != _OF_RANKING]


def _between(name):
    text = _PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    assert text.count(begin) == text.count(end) == 1, name
    return text.partition(begin)[2].partition(end)[0].strip()


@pytest.mark.parametrize("path", _TABLES, ids=lambda path: path.stem)
def test_tables_are_as_written_by_the_scripts(path):
    assert _between(path.stem) == path.read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("path", _OF_TRAINING, ids=lambda path: path.stem)
def test_means_are_those_of_the_runs(path):
    runs = pd.read_csv(path.with_suffix(".csv"))
    settings = ["method", "strength", "learning_rate", "batch_size", "start"]
    settings += ["label_noise"]
    means = 100 * runs.groupby(settings)["test_accuracy"].agg(["mean", "sem"])
    tables = path.read_text(encoding="utf-8").split("\n\n")
    by_method = (t for t in tables if " method " in t.partition("\n")[0])
    table = next(by_method, tables[0])
    assert len(means) == len(table.splitlines()) - 2
    for mean, error in means.to_numpy():
        assert f"| {mean:.1f} ± {error:.1f} " in table, (mean, error)
    least = 3 if "resnet" in path.stem else 5  # seeds, as for the networks
    assert runs.groupby(settings).size().min() >= least


def test_the_worst_bounded_runs_are_compared_with_the_best_of_the_paper():
    path = _PAGE.with_suffix("") / "bounded_penalty.csv"
    runs = pd.read_csv(path)
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    rows = iter(table.splitlines()[2:])
    for setting, found in runs.groupby(["label_noise", "learning_rate"]):
        accuracies = found.groupby(["method", "strength"])["test_accuracy"]
        means = accuracies.mean()
        gain = 100 * (means["bounded FP"].min() - means["FP"].max())
        assert f" {gain:+.1f} " in next(rows), setting


def test_areas_are_those_of_the_runs():
    path = _PAGE.with_suffix("") / f"{_OF_RANKING}.csv"
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    by = ["method", "epoch", "score"]
    groups = 100 * pd.read_csv(path).set_index(by)[["area", "precision"]]
    groups = groups.groupby(level=by)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()[2:]
    ]
    assert sorted(rows) == sorted(
        [
            *map(str, kind),
            *(
                f"{mean:.1f} ± {error:.1f}"
                for mean, error in zip(group.mean(), group.sem())
            ),
        ]
        for kind, group in groups
    )


def test_there_are_tables_and_every_figure_exists():
    assert {p.stem for p in _OF_SIGNALS} == set(reproduce.names())
    planned = {
        f"{part}_{name}"
        for part in ("images", "images_resnet")
        for name in reproduce.names(reproduce.PARTS[part][0])
    }
    assert {p.stem for p in _TABLES} - set(reproduce.names()) <= planned
    text = _PAGE.read_text(encoding="utf-8")
    figures = re.findall(r"\]\((\S+\.png)\)", text)
    assert {pathlib.Path(f).stem for f in figures} == {p.stem for p in _TABLES}
    for figure in figures:
        assert (_PAGE.parent / figure).exists(), figure


def test_every_command_of_the_page_is_one_of_make_reproduce():
    text = _PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = {
        tuple(line.split())
        for line in re.findall(
            r"^python examples/reproduction/(.*--jit=true.*)$", text, re.M
        )
    }
    commands_and_shared = reproduce.PARTS.values()
    known = {
        (script, *shared, *arguments)
        for commands_of_part, shared in commands_and_shared
        for script, *arguments in commands_of_part
    }
    assert commands and commands <= known, commands - known


def _flags(arguments):
    """Values by flag; of one that is given several times, all or the last."""
    found = {}
    for name, _, value in (a.partition("=") for a in arguments):
        several = [*found.get(name, []), value]
        found[name] = several if name == "--strengths" else [value]
    return found


def test_the_commands_on_images_are_those_of_make_reproduce_images():
    text = _PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(
        r"^python examples/reproduction/(.* --dataset=fashion_mnist.*)$",
        text,
        re.M,
    )
    assert len(commands) >= 2
    known, shared = reproduce.PARTS["images"]
    for script, *arguments in map(shlex.split, commands):
        given = _flags(arguments)
        planned = [
            _flags([*shared, *own]) for name, *own in known if name == script
        ]
        assert any(given.items() <= plan.items() for plan in planned), given


@pytest.mark.parametrize("part", ["images", "images_resnet"])
def test_every_command_on_images_is_one_that_its_script_takes(part):
    commands, shared = reproduce.PARTS[part]
    assert len({*reproduce.names(commands)}) == len(commands), "overwritten"
    for script, *arguments in commands:
        source = (experiments.SCRIPTS / script).read_text(encoding="utf-8")
        if "import tuning" in source:
            source += (experiments.SCRIPTS / "tuning.py").read_text("utf-8")
        flags = {a.partition("=")[0].removeprefix("--") for a in arguments}
        for flag in flags:
            is_known = flag in experiment.flags.FLAGS
            assert is_known or f'"{flag}"' in source, (script, flag)
    for flag in shared:
        name = flag.partition("=")[0].removeprefix("--")
        assert name in experiment.flags.FLAGS, name


def test_tables_of_images_do_not_replace_those_of_signals(tmp_path):
    page = tmp_path / "page.md"
    text = "".join(
        f"<!-- begin {name} -->\n<!-- end {name} -->\n"
        for name in ("label_noise", "images_label_noise")
    )
    page.write_text(text)
    results = tmp_path / "results"
    results.mkdir()
    (results / "label_noise.md").write_text("| 1 |\n")
    reproduce.update(page, results, "images")
    begin = "<!-- begin images_label_noise -->\n"
    assert page.read_text() == text.replace(begin, f"{begin}\n| 1 |\n\n")
    [copy] = (tmp_path / "page").glob("*.*")
    assert copy.name == "images_label_noise.md"


def test_runs_on_images_are_kept_next_to_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("")
    (tmp_path / "results" / "runs").mkdir(parents=True)
    for name in ("a.json", "a.lock", "a.keras", "b-curvature.json"):
        (tmp_path / "results" / "runs" / name).write_text(name)
    reproduce.update(page, tmp_path / "results")
    assert not (tmp_path / "page" / "runs").exists()
    reproduce.update(page, tmp_path / "results", "images_resnet")
    kept = {path.name for path in (tmp_path / "page" / "runs").iterdir()}
    assert kept == {"a.json", "b-curvature.json"}


def test_the_time_of_all_runs_is_added_up(tmp_path):
    (tmp_path / "runs").mkdir()
    for name, text in (
        ("a", '{"seconds": 1800}'),
        ("b", '{"seconds": 5400}'),
        ("a-curvature", '{"hessian_trace": 1}'),
    ):
        (tmp_path / "runs" / f"{name}.json").write_text(text)
    found = reproduce.total(tmp_path)
    assert found == "2 runs, 2.0 hours of training together."


def test_a_page_gets_tables_between_its_comments(tmp_path):
    def text(found, kept):
        return (
            f"A\n<!-- begin label_noise -->\n{found}<!-- end label_noise -->\n"
            f"<!-- begin final -->\n{kept}<!-- end final -->"
        )

    page = tmp_path / "page.md"
    page.write_text(text("old\n", "kept\n"))
    results = tmp_path / "results"
    results.mkdir()
    (results / "label_noise.md").write_text("| \\1 |\n")
    (results / "label_noise.png").write_text("figure")
    for _ in range(2):
        reproduce.update(page, results)
    assert page.read_text() == text("\n| \\1 |\n\n", "kept\n")
    assert (tmp_path / "page" / "label_noise.png").read_text() == "figure"


def test_a_page_that_is_not_there_is_told_of_before_anything_trains(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(reproduce, "start", None)
    flags.FLAGS(["reproduce", f"--page={tmp_path}/page.md"])
    with pytest.raises(SystemExit, match=r"page\.md is no file"):
        reproduce.main(["reproduce"])


def _reproduce(directory, code):
    """Starts `make reproduce` there, with a script of that code for each."""
    shutil.copy(experiments.SCRIPTS / "reproduce.py", directory)
    for script, *_ in reproduce.COMMANDS:
        (directory / script).write_text(code)
    return subprocess.Popen(
        [sys.executable, "reproduce.py", f"--directory={directory}/results"],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_goes_without_a_page(tmp_path):
    process = _reproduce(tmp_path, "")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.startswith("0 runs, 0.0 hours")


def _is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_its_scripts_end_with_it(tmp_path):
    code = """
import os, pathlib, time
pathlib.Path(f"{os.getpid()}.pid").touch()
time.sleep(120)
"""
    process = _reproduce(tmp_path, code)
    end = time.monotonic() + 60
    while len(found := [*tmp_path.glob("*.pid")]) < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    pids = [int(path.stem) for path in found]
    try:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM
        assert not any(map(_is_alive, pids))
    finally:
        for pid in filter(_is_alive, pids):
            os.kill(pid, signal.SIGKILL)
