"""The documentation site: complete, strict, and searchable offline."""

from __future__ import annotations

import html
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import keras_fisher

_ROOT = pathlib.Path(__file__).parents[2]
_API = _ROOT / "docs" / "api"
_ENTRY = re.compile(r"^::: keras_fisher\.([\w.]+)$", re.MULTILINE)
_PROGRAM = pathlib.Path(".venv-docs", "bin", "mkdocs")
# Words that people come with, and the page that answers them.
_SEARCHED = {
    "label noise": "guide/",
    "explosion": "",
    "second derivative": "second_derivatives/",
}


def _documented() -> list[str]:
    pages = [path.read_text("utf-8") for path in _API.glob("*.md")]
    return [name for page in pages for name in _ENTRY.findall(page)]


def _public(module=keras_fisher, prefix: str = "") -> set[str]:
    """Public functions and classes by where users import them from."""
    names = set()
    listed = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
        and callable(value)
    ]
    for name in listed:
        value = getattr(module, name)
        if isinstance(value, type(os)):
            names |= _public(value, f"{prefix}{name}.")
        else:
            names.add(prefix + name)
    return names


def _value(name: str):
    value = keras_fisher
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_every_public_name_has_one_entry():
    documented = _documented()
    assert len(documented) == len(set(documented))
    values = {id(_value(name)) for name in documented}
    assert len(values) == len(documented)
    missing = {n for n in _public() if id(_value(n)) not in values}
    assert not missing, missing
    assert set(documented) <= _public(), set(documented) - _public()


def _mkdocs() -> list[str] | None:
    """How to run mkdocs: in the environment of `make docs`, or in this one."""
    if (_ROOT / _PROGRAM).exists():
        return [str(_ROOT / _PROGRAM)]
    here = subprocess.run(
        [sys.executable, "-c", "import mkdocs, material, mkdocstrings"],
        capture_output=True,
        check=False,
    )
    return None if here.returncode else [sys.executable, "-m", "mkdocs"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    program = _mkdocs()
    if program is None:
        pytest.skip("make docs installs mkdocs")
    directory = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [*program, "build", "--strict", "--quiet", f"--site-dir={directory}"],
        cwd=_ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return directory


def test_entries_are_not_empty(site):
    for path in _API.glob("*.md"):
        page = (site / "api" / path.stem / "index.html").read_text("utf-8")
        for name in _ENTRY.findall(path.read_text("utf-8")):
            assert f'href="#keras_fisher.{name}"' in page, name
            summary = _value(name).__doc__.splitlines()[0]
            shown = html.unescape(re.sub(r"<[^>]+>", "", page))
            words = re.sub(r"[`\[\]]", "", summary)
            assert words[:30] in shown, (name, summary)


@pytest.mark.parametrize("kind", ["Fisher", "Gradient", "UniformLabel"])
def test_penalties_have_the_arguments_that_they_share(site, kind):
    page = (site / "api" / "penalties" / "index.html").read_text("utf-8")
    _, _, rest = page.partition(f'id="keras_fisher.{kind}Penalty"')
    entry, _, _ = rest.partition('id="keras_fisher.')
    for argument in ("alpha", "bound", "warmup_steps", "every"):
        assert f"<code>{argument}</code>" in entry, argument
    assert "ValueError" in entry


@pytest.mark.parametrize("words", _SEARCHED)
def test_the_search_finds(site, words):
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {
        entry["location"].partition("#")[0]
        for entry in index["docs"]
        if words in (entry["title"] + entry["text"]).lower()
    }
    assert _SEARCHED[words] in found, sorted(found)


def test_the_site_needs_no_network(site):
    """No page loads a script, a style, a font or a picture from elsewhere."""
    pages = [*site.rglob("*.html")]
    assert len(pages) > 25
    for page in pages:
        text = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img)[^>]+src="(https?:[^"]+)', text)
        loaded += re.findall(
            r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(https?:)',
            text,
        )
        assert not loaded, (page, loaded)


def test_pictures_have_a_text(site):
    pictures = [
        (page.name, picture)
        for page in site.rglob("*.html")
        for picture in re.findall(r"<img[^>]*>", page.read_text("utf-8"))
    ]
    assert len(pictures) > 10
    silent = [p for p in pictures if not re.search(r'alt="[^"]+"', p[1])]
    assert not silent, silent
