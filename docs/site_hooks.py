"""Hooks of mkdocs.yml: pages of the repository as pages of the site.

README.md and its like stand outside docs/, where people look for them. Here
they become pages, and links between files of the repository become links
between pages. A link to a file that is no page goes to `REPOSITORY_URL`, an
environment variable like https://host/owner/name; without it, its text stays.
"""

from __future__ import annotations

import os
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parents[1]
# Files of the repository, and where the site has them.
_MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/README.md",
    **{
        path.relative_to(_ROOT).as_posix(): path.relative_to(_ROOT).as_posix()
        for ending in ("md", "png")
        for path in (_ROOT / "benchmarks" / "results").glob(f"*.{ending}")
    },
}
_SOURCES = {page: source for source, page in _MOVED.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Adds the pages that stand outside docs/."""
    for source, page in _MOVED.items():
        path = str(_ROOT / source)
        files.append(File.generated(config, page, abs_src_path=path))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links at pages, by what they mean in the repository."""
    del config
    here = page.file.src_uri
    source = _SOURCES.get(here, f"docs/{here}")

    def pointed(match: re.Match) -> str:
        mark, text, link = match.groups()
        target, hash_, anchor = link.partition("#")
        if not target or "://" in target:
            return match[0]
        name = posixpath.normpath(
            posixpath.join(posixpath.dirname(source), target)
        )
        there = _MOVED.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            return _elsewhere(name, text, match[0])
        way = posixpath.relpath(there, posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({way}{hash_}{anchor})"

    return _LINK.sub(pointed, markdown)


def _elsewhere(name: str, text: str, link: str) -> str:
    """A link to a file that is no page; as it is, if there is no such file."""
    if not (_ROOT / name).exists():
        return link
    repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
    return f"[{text}]({repository}/blob/main/{name})" if repository else text
