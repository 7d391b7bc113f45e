"""All of docs/reproduction.md: `make reproduce`.

Runs the scripts of the experiments one after the other, in two processes that
share the runs. Stopped and started again, it goes on where it was.

python examples/reproduction/reproduce.py --directory=reproduction \
        --page=docs/reproduction.md

`make reproduce-images` runs all but `bounded_penalty.py`, and also
`noisy_labels.py`, on real images, with `--part=images` and
`--part=images_resnet`: days on a CPU.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from absl import app
from absl import flags

_DIRECTORY = flags.DEFINE_string(
    "directory", "reproduction", "Directory for tables, figures and runs."
)
_PAGE = flags.DEFINE_string(
    "page",
    None,
    "Markdown file to put the tables in, between its comments `begin NAME` and "
    "`end NAME`; tables, figures and runs are copied next to it, into a "
    "directory of its name.",
)
_PART = flags.DEFINE_enum(
    "part",
    "signals",
    ["signals", "images", "images_resnet"],
    "Which commands to run: on signals, or on images with SimpleCNN or with a "
    "small ResNet, which has batch normalization. Tables and figures of the "
    "latter two begin with the name of the part, on the page and next to it. "
    "Their runs are kept there as well, in `runs`.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 2, "Processes that share the runs, one a core at most.", 1
)

# As in docs/reproduction.md.
COMMANDS = (
    ("learning_rate_sweep.py",),
    ("label_noise.py",),
    ("penalty_comparison.py",),
    ("bounded_penalty.py",),
    ("delayed_penalty.py",),
    ("final_curvature.py",),
    (
        "learning_rate_sweep.py",
        "--name=batch_size_sweep",
        "--learning_rates=0.03",
        "--batch_sizes=32,64,128,256,512",
    ),
)

# Shorter than the other experiments.
_FIVE_SEEDS = ("--epochs=20", "--seeds=5", "--probe_size=256")
_GIVEN = ("--strengths=FP:0.3",)  # and not chosen
# Every experiment on pictures: most with fewer of them than there are.
IMAGE_COMMANDS = (
    (
        "learning_rate_sweep.py",
        "--learning_rates=0.003,0.01,0.03,0.1",
        *_FIVE_SEEDS,
    ),
    (
        "learning_rate_sweep.py",
        "--name=batch_size_sweep",
        "--learning_rates=0.03",
        "--batch_sizes=32,128,512",
        *_FIVE_SEEDS,
    ),
    ("label_noise.py", *_FIVE_SEEDS, *_GIVEN),
    (
        "label_noise.py",
        "--name=label_noise_bounded",
        *_FIVE_SEEDS,
        "--strengths=bounded FP:1",
    ),
    # A penalty on an eighth of each batch costs little.
    (
        "label_noise.py",
        "--name=label_noise_eighth",
        "--fraction=0.125",
        *_FIVE_SEEDS,
        "--strengths=bounded FP:1",
    ),
    (
        "label_noise.py",
        "--name=label_noise_60000",
        "--train_examples=60000",
        "--fraction=0.125",
        *_FIVE_SEEDS,
        "--strengths=bounded FP:1",
    ),
    # Without a second derivative, at little more than no method costs.
    (
        "label_noise.py",
        "--name=label_noise_others",
        *_FIVE_SEEDS,
        "--strengths=label smoothing:0.1,0.2,0.4,0.8",
        "--strengths=mixup:0.2,0.4,0.7,1",
    ),
    (
        "label_noise.py",
        "--name=label_noise_20",
        "--label_noise=0.2",
        *_FIVE_SEEDS,
        *_GIVEN,
    ),
    (
        "noisy_labels.py",
        "--train_examples=2000",
        "--seeds=5",
        "--moments=2,4,8",
        "--cleanlab",
    ),
    ("penalty_comparison.py",),
    ("delayed_penalty.py", "--starts=0,78,390,1170"),
    # Of the runs of the learning rates.
    (
        "final_curvature.py",
        "--learning_rates=0.003,0.01,0.03,0.1",
        *_FIVE_SEEDS,
        "--alpha=0",
        "--examples=256",
    ),
)
_IMAGES = (
    "--dataset=fashion_mnist",
    "--train_examples=10000",
    "--epochs=40",
    "--measure_every=5",
    "--seeds=3",
)

# What is run, and the flags that all commands of a part have in common.
PARTS = {
    "signals": (COMMANDS, ("--jit=true",)),
    "images": (IMAGE_COMMANDS, _IMAGES),
    "images_resnet": (IMAGE_COMMANDS, (*_IMAGES, "--model=resnet8")),
}


def start(command: tuple[str, ...], threads: int, quiet: bool):
    """Starts a script, which says nothing if it is `quiet`."""
    script, *arguments = command
    path = pathlib.Path(__file__).parent / script
    return subprocess.Popen(
        [
            sys.executable,
            str(path),
            *arguments,
        ],
        env={**os.environ, "TF_NUM_INTRAOP_THREADS": str(threads)},
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.DEVNULL if quiet else None,
    )


def run(command: tuple[str, ...], count: int) -> list[int]:
    """Runs a script in several processes, which end with this one.

    Args:
        command: The script and its flags.
        count: Number of processes; the first one prints.

    Returns:
        Their exit codes.
    """
    # By default it ends this process alone: the others would train on.
    before = signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )
    threads = max(1, (os.cpu_count() or 1) // count)
    processes = []
    try:
        for number in range(count):
            processes.append(start(command, threads, quiet=number > 0))
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.terminate()  # does nothing where it has ended
        for process in processes:
            process.wait()
        signal.signal(signal.SIGTERM, before)


def names(commands: tuple[tuple[str, ...], ...] = COMMANDS) -> list[str]:
    """What the tables and figures are called."""
    return [
        next(
            (a.removeprefix("--name=") for a in arguments if "--name=" in a),
            script.removesuffix(".py"),
        )
        for script, *arguments in commands
    ]


def update(
    page: pathlib.Path, output_dir: pathlib.Path, part: str = "signals"
) -> None:
    """Puts what has been found into a page, and next to it.

    Args:
        page: The Markdown file.
        output_dir: Where the scripts have written.
        part: One of `PARTS`.
    """
    prefix = "" if part == "signals" else f"{part}_"
    text = page.read_text(encoding="utf-8")
    directory = page.with_suffix("")
    directory.mkdir(exist_ok=True)
    for name in names(PARTS[part][0]):
        table = output_dir / f"{name}.md"
        if not table.exists():
            continue
        found = table.read_text(encoding="utf-8")
        if f"<!-- begin {prefix}{name} -->" not in text:
            print(f"{page} has no comment `begin {prefix}{name}` for {table}.")
        text = re.sub(
            rf"(<!-- begin {prefix}{name} -->\n).*?"
            rf"(<!-- end {prefix}{name} -->)",
            lambda match, found=found: f"{match[1]}\n{found}\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
        for path in output_dir.glob(f"{name}.*"):
            shutil.copy(path, directory / f"{prefix}{path.name}")
    if part != "signals":
        # Hours each: to be gone on from on another machine.
        (directory / "runs").mkdir(exist_ok=True)
        for path in (output_dir / "runs").glob("*.json"):
            shutil.copy(path, directory / "runs")
    page.write_text(text, encoding="utf-8")


def total(output_dir: pathlib.Path) -> str:
    """How many runs there are, and how long they took together."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in output_dir.glob("runs/*.json")
    ]
    seconds = [run["seconds"] for run in found if "seconds" in run]
    hours = sum(seconds) / 3600
    return f"{len(seconds)} runs, {hours:.1f} hours of training together."


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    if (page := _PAGE.value) and not (
        os.path.isfile(page) and os.access(page, os.W_OK)
    ):
        sys.exit(f"--page={page} is no file that can be written.")
    begin = time.perf_counter()
    commands, shared = PARTS[_PART.value]
    shared = (*shared, f"--output_dir={_DIRECTORY.value}")
    for script, *arguments in commands:
        first, *_ = run((script, *shared, *arguments), _PROCESSES.value)
        # The first one finishes what another that fails leaves.
        if first:
            sys.exit(f"{script} failed; what is above says why.")
    if page:
        update(pathlib.Path(page), pathlib.Path(_DIRECTORY.value), _PART.value)
    print(total(pathlib.Path(_DIRECTORY.value)))
    minutes = (time.perf_counter() - begin) / 60
    print(f"Took {minutes:.0f} minutes, without what had been done before.")


if __name__ == "__main__":
    app.run(main)
