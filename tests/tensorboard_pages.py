"""Real TensorBoard in a real browser, for tests and for screenshots.

Much of TensorBoard is behind shadow roots, where the text of the document does
not reach, and much is drawn late. So what is on a page is collected through
the shadow roots, and waited for.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any
import urllib.error
import urllib.parse
import urllib.request

from playwright import sync_api

from keras_fisher._tensorboard import event_files

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 90  # for whatever may be slow on a busy machine

# What one sees, a line for each piece of text.
_TEXT = """
const textOf = (root) => {
  const lines = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) {
      const line = node.textContent.replace(/\\s+/g, ' ').trim();
      if (line) lines.push(line);
    }
    if (node.nodeType !== Node.ELEMENT_NODE) return;
    if (/^(style|script|template|noscript)$/i.test(node.tagName)) return;
    if (getComputedStyle(node).display === 'none') return;
    const given = node.tagName === 'SLOT' ? node.assignedNodes() : [];
    const inner = (node.shadowRoot || node).childNodes;
    (given.length ? given : inner).forEach(walk);
  };
  walk(root);
  return lines.join('\\n');
};
"""

# Cards of the Time Series page: of each tag, the rows by their runs.
_CARDS = """() => Object.fromEntries(
  [...document.querySelectorAll('scalar-card')].map((card) => {
    const table = [...card.querySelectorAll('tb-data-table')].flatMap(
      (t) => [...t.querySelectorAll('tb-data-table-content-row')]);
    const names = [...card.querySelectorAll('tb-data-table-header-cell')].map(
      (cell) => cell.innerText.trim());
    const rows = table.map((row) => [
      ...row.querySelectorAll('tb-data-table-content-cell')].map(
        (cell) => cell.innerText.trim()));
    return [
      card.querySelector('.tag').title,
      rows.map((row) => Object.fromEntries(
        row.map((cell, k) => [names[k], cell]))),
    ];
  })
)"""

# Charts of the Scalars and the Custom Scalars page.
_CHARTS = (
    "(cards) => {"
    + _TEXT
    + """
  return cards.map((card) => {
    const inside = (node, selector) => [
      ...node.querySelectorAll(selector),
      ...[...node.querySelectorAll('*')].filter((n) => n.shadowRoot).flatMap(
        (n) => inside(n.shadowRoot, selector)),
    ];
    const root = card.shadowRoot;
    return {
      title: textOf(root.querySelector('tf-card-heading')).split('\\n')[0],
      text: textOf(card),
      series: [...root.querySelectorAll('.match-list-entry')].map(
        (entry) => entry.textContent.trim().replace(/^\\S+\\s+/, '')),
      // Each is drawn twice: as it is, and smoothed.
      curves: inside(root, 'path.line').filter(
        (path) => (path.getAttribute('d') || '').length > 10).length / 2,
    };
  });
}"""
)

# The table of the HParams page, its first row the names of the columns.
_TABLE = """(grids) => grids.flatMap((grid) =>
  [...grid.shadowRoot.querySelectorAll('tr')].filter(
    (row) => !row.hidden && row.getBoundingClientRect().height > 0
  ).map((row) => [...row.querySelectorAll('th, td')].map(
    (cell) => [...cell.querySelectorAll('slot')].flatMap(
      (slot) => slot.assignedNodes().map((node) => node.textContent.trim())
    ).join(' '))
  ).filter((row) => row.some((cell) => cell))
)"""


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome; None if there is none."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


@contextlib.contextmanager
def serving(
    log_dir: str | os.PathLike, load_fast: str = "auto"
) -> Iterator[str]:
    """Runs TensorBoard until the block ends.

    Args:
        log_dir: Directory of the runs, which are complete.
        load_fast: `"auto"` for the data server where it is available,
            `"false"` for the reader in Python.

    Yields:
        The address, once it shows the last point of each run.

    Raises:
        RuntimeError: If TensorBoard ends or does not answer.
    """
    with tempfile.TemporaryFile("w+") as output:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "tensorboard.main"),
                *("--logdir", os.fspath(log_dir)),
                *("--host", "127.0.0.1", "--port", "0"),
                *("--load_fast", load_fast),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )

        def until(answer):
            end = time.monotonic() + _SECONDS
            while not (found := answer()):
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"TensorBoard says:\n{_read(output)}")
                time.sleep(0.1)
            return found

        try:
            url = until(
                lambda: re.search(r" at (http://\S+/) ", _read(output))
            ).group(1)
            for run, point in _last_points(log_dir).items():
                until(lambda r=run, p=point: _shows(url, r, p))
            yield url
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@contextlib.contextmanager
def browsing(
    browser: str | None = None, *, width: int = 1400, height: int = 1800
) -> Iterator[sync_api.Page]:
    """Opens a page of a browser without a window until the block ends.

    Args:
        browser: Path of the browser; None for the one that is found.
        width: Of the page, in pixels.
        height: Of the page. Charts outside of it are not drawn.
    """
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser or find_browser()
        )
        try:
            page = chromium.new_page(
                viewport={"width": width, "height": height}
            )
            page.set_default_timeout(1000 * _SECONDS)
            yield page
        finally:
            chromium.close()


def visible_text(page: sync_api.Page) -> str:
    """What one can read on a page, inside of shadow roots too."""
    return page.evaluate(f"() => {{ {_TEXT} return textOf(document.body); }}")


def wait_for_text(page: sync_api.Page, *texts: str) -> str:
    """Waits until all of `texts` can be read, and returns what else can."""
    script = (
        f"(texts) => {{ {_TEXT} const all = textOf(document.body);"
        "return texts.every((text) => all.includes(text)); }"
    )
    _wait(page, script, list(texts))
    return visible_text(page)


def open_time_series(
    page: sync_api.Page,
    url: str,
    pattern: str,
    curves: Mapping[str, int],
    **settings: Any,
) -> dict[str, list[dict[str, str]]]:
    """Opens the Time Series page.

    Args:
        page: Of `browsing`.
        url: Of `serving`.
        pattern: Regular expression on tags; the cards of others are left out.
        curves: Tags to wait for, and the number of curves of each.
        **settings: More of what a link to the page can say, by TensorBoard's
            names: `smoothing`, `runFilter`.

    Returns:
        The rows below the chart of each tag, as mappings of columns (`"Run"`,
        `"Value"`, `"Step"`) to what is in them.
    """
    query = urllib.parse.urlencode(
        {"tagFilter": pattern, "smoothing": 0, **settings}
    )
    _open(page, f"{url}?{query}#timeseries")

    def cards():
        found = page.evaluate(_CARDS)
        right = all(len(found.get(t, ())) == n for t, n in curves.items())
        return found if right else None

    return _poll(page, cards)


def open_scalars(
    page: sync_api.Page, url: str, pattern: str, curves: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Opens the Scalars page; its arguments are those of `open_time_series`.

    Returns:
        Of each tag, `"text"` of the card and number of `"curves"` drawn.
    """
    _open(page, f"{url}#scalars")
    page.get_by_label("Filter tags").fill(pattern)
    return _charts(page, "tf-scalar-card", curves)


def open_custom_scalars(
    page: sync_api.Page, url: str, curves: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Opens the Custom Scalars page.

    Args:
        page: Of `browsing`.
        url: Of `serving`.
        curves: Titles of charts to wait for, and the number of curves of each.

    Returns:
        Of each chart, `"text"` of the card, number of `"curves"` drawn, and the
        `"series"` that it lists, such as `"loss (run/train)"`.
    """
    _open(page, f"{url}#custom_scalars")
    return _charts(page, "tf-custom-scalar-multi-line-chart-card", curves)


def open_hparams(
    page: sync_api.Page, url: str, columns: Collection[str], rows: int
) -> list[dict[str, str]]:
    """Opens the HParams page, and has it show some columns and no others.

    Args:
        page: Of `browsing`.
        url: Of `serving`.
        columns: Names of hyperparameters and metrics.
        rows: Number of rows to wait for.

    Returns:
        The rows, as mappings of columns to what is in them.
    """
    _open(page, f"{url}#hparams")
    boxes = page.locator(".hparam-checkbox, .metric-checkbox")
    wait_for_text(page, "Hyperparameters", *columns)
    for box in boxes.all():
        is_wanted = box.inner_text().strip() in columns
        if (box.get_attribute("aria-checked") == "true") != is_wanted:
            box.click()
    grid = "vaadin-grid.session-group-table"
    page.locator(grid).wait_for()

    def table():
        names, *cells = page.locator(grid).evaluate_all(_TABLE) or [[]]
        found = [dict(zip(names, row)) for row in cells]
        right = {n for n in names if n not in ("Trial ID", "Show Metrics", "")}
        return found if right == set(columns) and len(found) == rows else None

    return _poll(page, table)


def open_images(
    page: sync_api.Page, url: str, count: int
) -> list[dict[str, Any]]:
    """Opens the Images page.

    Args:
        page: Of `browsing`.
        url: Of `serving`.
        count: Number of images to wait for.

    Returns:
        Of each image, `"text"` above it, and its `"width"` and `"height"`.
    """
    _open(page, f"{url}#images")
    script = (
        f"(cards) => {{ {_TEXT} return cards.map((card) => {{"
        "const image = card.shadowRoot.querySelector('img');"
        "return {text: textOf(card), width: image ? image.naturalWidth : 0,"
        "height: image ? image.naturalHeight : 0}; }); }"
    )

    def images():
        found = page.locator("tf-image-loader").evaluate_all(script)
        loaded = [image for image in found if image["width"]]
        return found if len(loaded) == len(found) == count else None

    return _poll(page, images)


def _open(page: sync_api.Page, address: str) -> None:
    # A page whose address differs after the `#` only is not loaded anew.
    page.goto("about:blank")
    page.goto(address)


def _charts(
    page: sync_api.Page, selector: str, curves: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    def charts():
        cards = page.locator(selector).evaluate_all(_CHARTS)
        found = {card.pop("title"): card for card in cards}
        right = all(
            found.get(title, {}).get("curves") == count
            for title, count in curves.items()
        )
        return found if right else None

    return _poll(page, charts)


def _poll(page: sync_api.Page, answer):
    """Asks until there is an answer, and it stays the same."""
    end = time.monotonic() + _SECONDS
    before = None
    while True:
        found = answer()
        if found is not None and found == before:
            return found
        before = found
        if time.monotonic() > end:
            raise AssertionError(f"TensorBoard shows:\n{visible_text(page)}")
        page.wait_for_timeout(200)


def _wait(page: sync_api.Page, script: str, argument: list[str]) -> None:
    try:
        page.wait_for_function(script, arg=argument)
    except sync_api.TimeoutError as error:
        raise AssertionError(
            f"Not shown: {argument}. TensorBoard shows:\n{visible_text(page)}"
        ) from error


def _read(file) -> str:
    file.seek(0)
    return file.read()


def _last_points(log_dir) -> dict[str, event_files.Scalar]:
    """The point last written of each run."""
    root = pathlib.Path(log_dir)
    found = {}
    for directory in event_files.directories(str(root)):
        for point in event_files.scalars(directory):
            found[pathlib.Path(directory).relative_to(root).as_posix()] = point
    return found


def _shows(url: str, run: str, point: event_files.Scalar) -> bool:
    query = urllib.parse.urlencode({"run": run, "tag": point.tag})
    address = f"{url}data/plugin/scalars/scalars?{query}"
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            points = json.load(answer)
    except urllib.error.HTTPError:
        return False  # not loaded as yet
    return bool(points) and points[-1][1] == point.step
