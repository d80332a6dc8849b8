"""Links of the documentation: every relative link and every anchor leads somewhere. No network is used."""

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
INLINE = re.compile(
    r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s>]*(?:\([^()\s]*\)[^()\s>]*)*)>?(?:\s+\"[^\"]*\")?\s*\)"
)
REFERENCE = re.compile(r"^\s{0,3}\[[^\]^]+\]:\s*<?(\S+?)>?\s*$", flags=re.MULTILINE)
ELSEWHERE = re.compile(r"^(https?|mailto):")


def prose(path):
    """A page without its fenced blocks and code spans, in which nothing is a link."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "code", text)


def links(text):
    return [*INLINE.findall(text), *REFERENCE.findall(text)]


def anchors(path):
    """The anchors of a page's headings, as Python-Markdown and GitHub make them of plain ones."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, flags=re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def broken(path, text):
    """The links of a text, as if it stood in the file `path`, that lead nowhere."""
    flaws = []
    for link in links(text):
        if ELSEWHERE.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or ROOT not in (target, *target.parents):
            flaws.append(f"{link}: no such file")
        elif (ROOT / "docs") in path.parents and (ROOT / "docs") not in target.parents:
            flaws.append(f"{link}: outside of docs/, which the built pages cannot reach")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            flaws.append(f"{link}: no such heading")
    return flaws


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert not broken(path, prose(path))


def test_the_pages_link_to_each_other():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"} <= {path.name for path in PAGES}
    assert len([link for path in PAGES for link in links(prose(path)) if not ELSEWHERE.match(link)]) > 20


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("[a](docs/nowhere.md)", "no such file"),
        ("[a](docs/promises.md#nothing)", "no such heading"),
        ("[a `b` [c]](nowhere.md)", "no such file"),
        ("![a](nowhere.png)", "no such file"),
        ("[a]: nowhere.md", "no such file"),
        ("[a](../outside)", "no such file"),
        ("[a](#nowhere)", "no such heading"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text, flaw):
    assert broken(ROOT / "README.md", text) and flaw in broken(ROOT / "README.md", text)[0]


def test_a_link_from_docs_to_the_root_is_found():
    assert "outside of docs/" in broken(ROOT / "docs" / "index.md", "[a](../README.md)")[0]


def test_every_page_has_its_place_in_the_navigation():
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
