"""Checks the Markdown pages of this repository: links, paths and sentences. Needs Python alone.

A link must lead to a file that git has, and its anchor to a heading there. A path in backticks must exist from the
repository's root. Prose has one sentence a line, at most 25 words in each, and no semicolon. Code, tables, headings and
quotations of code within a sentence are left aside.

    python3 tools/check_docs.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["anchors", "findings", "main"]

MOST_WORDS = 25
MADE = frozenset({"dist", "out", "target"})
"""Folders of what commands make."""

_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)+\.(?:cu|cuh|h|json|md|py|rs|sh|toml|txt|yml)")
_MARKER = re.compile(r"(?:[-*]|\d+\.) ")
_LABEL = re.compile(r"\*\*[^*]+[.:]\*\*")
_SENTENCE_GOES_ON = re.compile(r"[.!?][)*]* +[A-Z`*\[(]")
_ENDS = re.compile(r"[.:!?][)*]*$")


def main() -> int:
    """Print what is wrong with any page. The exit status."""
    root = Path(__file__).parents[1]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    files = {name for name in listed.stdout.splitlines() if (root / name).is_file()}
    wrong = findings(root, files)
    for finding in wrong:
        print(finding)
    pages = sum(name.endswith(".md") for name in files)
    print(f"{pages} pages, {len(wrong)} findings", file=sys.stderr)
    return 1 if wrong else 0


def findings(root: Path, files: Iterable[str]) -> list[str]:
    """``page:line: what is wrong``. ``files``: those of the repository, by their paths from its root."""
    known = set(files)
    wrong = []
    for page in sorted(name for name in known if name.endswith(".md")):
        lines = list(_outside_code((root / page).read_text(encoding="utf-8")))
        for number, line in lines:
            found = [*_links(root, page, line, known), *_paths(line, known)]
            wrong += [f"{page}:{number}: {each}" for each in found]
        wrong += [
            f"{page}:{number}: {each}"
            for number, line in lines
            if _is_prose(line)
            for each in _sentences(line)
        ]
    return wrong


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for _, line in _outside_code(text):
        if not line.startswith("#"):
            continue
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("#").strip()).lower()
        name = base = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        again = 0
        while name in found:
            again += 1
            name = f"{base}-{again}"
        found.add(name)
    return found


def _outside_code(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without fenced and indented blocks of code and without comments."""
    fenced, may_begin = False, True
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not (line.startswith("    ") and may_begin):
            # Behind an empty line or a heading, what is indented is code; else it goes on with an item of a list.
            may_begin = not line.strip() or line.startswith("#")
            if not line.startswith("<!--"):
                yield number, line


def _links(root: Path, page: str, line: str, known: set[str]) -> Iterator[str]:
    for target in _LINK.findall(_CODE.sub("`code`", line)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ((root / page).parent / name if name else root / page).resolve()
        inside = path.is_relative_to(root.resolve())
        if not inside or not _is_there(path.relative_to(root.resolve()).as_posix(), known):
            yield f"link to {target}: there is no such file"
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            yield f"link to {target}: there is no such heading"


def _paths(line: str, known: set[str]) -> Iterator[str]:
    for code in _CODE.findall(line):
        for word in code.split():
            if not _PATH.fullmatch(word) or word.split("/")[0] in MADE:
                continue
            if not _is_there(word, known):
                yield f"`{word}`: give its path from the repository's root"


def _is_there(path: str, known: set[str]) -> bool:
    """A file, a folder of files, or a pattern of them."""
    pattern = re.compile(re.escape(path.rstrip("/")).replace(r"\*", "[^/]*") + "(?:/.*)?")
    return path == "." or any(pattern.fullmatch(name) for name in known)


def _is_prose(line: str) -> bool:
    text = line.strip()
    return bool(text) and text[0] not in "#|<" and not text.startswith("![")


def _sentences(line: str) -> Iterator[str]:
    text = _MARKER.sub("", line.strip(), count=1)
    # What is quoted counts as a word, and links by their text.
    text = re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^()\s]+\)", r"\1", _CODE.sub("Code", text))
    text = _LABEL.sub("", text, count=1) if _LABEL.match(text) else text
    words = [word for word in text.split() if re.search(r"\w", word)]
    if len(words) > MOST_WORDS:
        yield f"{len(words)} words in a sentence: at most {MOST_WORDS}"
    if ";" in text:
        yield "a semicolon: make two sentences"
    if _SENTENCE_GOES_ON.search(text.strip()):
        yield "two sentences: one a line"
    if text.strip() and not _ENDS.search(text.strip()):
        yield "a sentence that does not end on its line"


if __name__ == "__main__":
    sys.exit(main())
