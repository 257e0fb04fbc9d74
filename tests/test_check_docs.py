"""tools/check_docs.py finds what is wrong with a page, and nothing else."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import check_docs

GOOD = """# A page: of `code`, and more

    sh code.sh; echo "two. Sentences"

Short sentences are good.
See [the other](docs/other.md#the-2nd-part), [a folder](docs) and [the web](https://example.org/x).
- **A label.** An item of a list, in which `a; b` is code.
  It goes on with `docs/other.md`, `docs/*.md` and `out/made.json`.

| a | table; of. Cells |
|---|---|

```
fenced; code. `docs/none.py`
```
"""
OTHER = "# Other\n## The 2nd part\n## Twice\n## Twice\n"


def _found(tmp_path: Path, page: str) -> list[str]:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text(OTHER)
    (tmp_path / "page.md").write_text(page)
    return check_docs.findings(tmp_path, ["page.md", "docs/other.md"])


def test_a_good_page_has_no_finding(tmp_path):
    assert _found(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("See [it](docs/none.md).", "link to docs/none.md: there is no such file"),
        ("See [it](../outside.md).", "link to ../outside.md: there is no such file"),
        ("See [it](docs/other.md#part).", "link to docs/other.md#part: there is no such heading"),
        ("See [it](#part).", "link to #part: there is no such heading"),
        ("| [it](docs/none.md) |", "link to docs/none.md: there is no such file"),
        ("It is in `other/none.py`.", "`other/none.py`: give its path from the repository's root"),
        ("Run `python docs/none.py`.", "`docs/none.py`: give its path from the repository's root"),
        ("One thing; another.", "a semicolon: make two sentences"),
        ("One thing. Another thing.", "two sentences: one a line"),
        ("One thing. `code` too.", "two sentences: one a line"),
        ("It goes on", "a sentence that does not end on its line"),
        ("It has many " + "words " * 23 + ".", "26 words in a sentence: at most 25"),
    ],
)
def test_what_is_wrong_is_found_once(tmp_path, line, finding):
    assert _found(tmp_path, f"# Page\n{line}\n") == [f"page.md:2: {finding}"]


def test_headings_have_githubs_anchors():
    assert check_docs.anchors(OTHER) == {"other", "the-2nd-part", "twice", "twice-1"}
    assert check_docs.anchors("## What [it](x.md) can do: `1 + 1/K`\n    # code") == {
        "what-it-can-do-1--1k"
    }
