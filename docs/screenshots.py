"""Screenshots of TensorBoard on the runs of `make demo`.

Needs playwright and an installed Chromium or Chrome:

    pip install playwright
    python docs/screenshots.py --logdir=demo/logs
"""

from __future__ import annotations

from collections.abc import Callable
import io
import os
import pathlib
import sys
import urllib.parse

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app
from absl import flags
from PIL import Image
from playwright import sync_api

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import tensorboard_pages as pages

from keras_fisher._tensorboard import event_files

_LOG_DIR = flags.DEFINE_string(
    "logdir",  # not log_dir, which absl has for itself
    "demo/logs",
    "Directory with the runs of `make demo`; of several demos, the latest.",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", "docs", "Directory for the screenshots."
)

_TALL = 1800  # all charts are in view then, so that all are loaded


def latest_demo(log_dir: str) -> str:
    """The directory right above the runs, whose names one sees then."""
    found = event_files.directories(log_dir)
    if not found:
        raise app.UsageError(f"No runs in {log_dir}. Run `make demo` first.")
    return str(pathlib.Path(found[-1]).parents[1])


def curves_of(log_dir: str) -> dict[str, list[str]]:
    """The runs that have a curve, by its tag."""
    found = {}
    for directory in event_files.directories(log_dir):
        run = pathlib.Path(directory).relative_to(log_dir).as_posix()
        for tag in {point.tag for point in event_files.scalars(directory)}:
            found.setdefault(tag, []).append(run)
    return found


def scalars(page: sync_api.Page, url: str, log_dir: str) -> None:
    """Tr(F) on a logarithmic axis, its explosion, and the memorization."""
    tags = (
        "fisher/trace",
        "fisher/explosion",
        "memorization/clean_accuracy",
        "memorization/noisy_accuracy",
    )
    runs = curves_of(log_dir)
    pages.open_time_series(
        page,
        url,
        r"^fisher/(trace|explosion)$|^memorization/(clean|noisy)",
        {
            tag: sum(run.endswith("/train") for run in runs[tag])
            for tag in tags
            if tag in runs
        },
        runFilter="/train",
        smoothing=0.8,
    )
    page.get_by_label("Ignore outliers in chart scaling").click()
    # Room for four cards.
    page.get_by_label("Enable step selection and data table").click()
    page.get_by_role("button", name="Settings").click()
    for card in page.locator("scalar-card").all():
        if card.locator(".tag").get_attribute("title") == "fisher/trace":
            card.get_by_label("More line chart options").click()
            page.get_by_text("Toggle Y-axis log scale").click()
            page.locator(".mat-mdc-menu-panel").wait_for(state="detached")


def custom_scalars(page: sync_api.Page, url: str, log_dir: str) -> None:
    """The charts that FisherTensorBoard lays out."""
    runs = curves_of(log_dir)
    pages.open_custom_scalars(
        page,
        url,
        {
            "Tr(F)": len(runs["fisher/trace"]),
            "Explosion ratio": len(runs["fisher/explosion"]),
        },
    )
    page.get_by_label("Write a regex to filter runs").fill("/train")
    page.get_by_text("Ignore outliers in chart scaling").first.click()
    smoothing = page.locator("tf-smoothing-input input")
    smoothing.fill("0.8")
    smoothing.press("Enter")
    page.get_by_title("Toggle y-axis log scale").first.click()
    page.locator("[icon=fullscreen]").first.click()


def hparams(page: sync_api.Page, url: str, log_dir: str) -> None:
    """The table of all runs."""
    runs = curves_of(log_dir)
    pages.open_hparams(
        page,
        url,
        (
            "learning_rate",
            "label_noise",
            "alpha",
            "metric/early_trace",
            "metric/val_accuracy",
        ),
        len(runs["metric/peak_trace"]),
    )
    page.get_by_text("Hyperparameters").first.scroll_into_view_if_needed()


def images(page: sync_api.Page, url: str, log_dir: str) -> None:
    """Tr(F) by layer and step."""
    pages.open_images(page, url, len(curves_of(log_dir)["fisher/trace"]))
    page.get_by_label("Write a regex to filter runs").fill("/train")
    page.get_by_text("Show actual image size").first.click()


def fisher(page: sync_api.Page, url: str, log_dir: str) -> None:
    """The verdict over all runs, in the library's own tab."""
    page.goto(f"{url}#fisher")
    frame = page.frame_locator("iframe").first
    frame.locator("main[aria-busy=false] tbody tr").first.wait_for()


def fisher_trace(page: sync_api.Page, url: str, log_dir: str) -> None:
    """Tr(F) of all runs, in the library's own tab."""
    state = urllib.parse.urlencode({"fisher": '{"view": "Trace"}'})
    page.goto(f"{url}?{state}#fisher")
    frame = page.frame_locator("iframe").first
    frame.locator(".js-plotly-plot .scatterlayer").first.wait_for()


def save(page: sync_api.Page, path: str) -> None:
    """Writes what the page shows as a small file."""
    # Drawn anew after a click; no animation, no cursor in a box.
    page.mouse.move(0, 0)
    page.evaluate("() => document.activeElement.blur()")
    page.wait_for_load_state("networkidle")
    before = None
    while before != (image := page.screenshot(animations="disabled")):
        before = image
        page.wait_for_timeout(1000)
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    # A palette makes the file small; refined, so that grays stay gray.
    picture.quantize(
        method=Image.Quantize.MAXCOVERAGE,
        kmeans=2,
        dither=Image.Dither.NONE,
    ).save(path, optimize=True)
    print(f"{path}: {os.path.getsize(path) / 1000:.0f} kB")


# What is shown, and the size that fits it.
_PAGES: dict[str, tuple[Callable, int, int]] = {
    "fisher": (fisher, 1500, 430),
    "fisher_trace": (fisher_trace, 1350, 860),
    "scalars": (scalars, 1200, 850),
    "custom_scalars": (custom_scalars, 1200, 900),
    "hparams": (hparams, 1350, 430),
    "images": (images, 1100, 845),
}


def main(argv: list[str]) -> None:
    """Writes one file for each page."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. See --help.")
    if pages.find_browser() is None:
        raise app.UsageError("No Chromium or Chrome is installed.")
    log_dir = latest_demo(_LOG_DIR.value)
    with (
        pages.serving(log_dir) as url,
        pages.browsing() as page,
    ):
        for name, (show, width, height) in _PAGES.items():
            page.set_viewport_size({"width": width, "height": _TALL})
            show(page, url, log_dir)
            page.set_viewport_size({"width": width, "height": height})
            path = os.path.join(_OUTPUT_DIR.value, f"tensorboard_{name}.png")
            save(page, path)


if __name__ == "__main__":
    app.run(main)
