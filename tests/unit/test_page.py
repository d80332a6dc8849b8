"""The page of an evaluation: what it says, and that it is inert. `tests/robustness/test_browser.py` opens it."""

import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest

import rocr
from rocr.evaluation.glossary import FORM_TEXTS, MEASURE_TEXTS
from rocr.evaluation.page import page_html, write_html
from rocr.evaluation.plots import curve_plot
from rocr.evaluation.verdict import judge
from rocr.io.svg import escaped
from tests.support.evaluations import ABOUT, BEFORE, HOSTILE, RETAIN, invented

VOID = {"meta", "img", "br", "link", "input", "hr"}
DRAWN = {"svg", "rect", "line", "circle", "polyline", "text", "title"}
WRITTEN = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "div", "p", "ul", "li"),
    *("h1", "h2", "h3", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "dl", "dt", "dd"),
    *("span", "b", "strong", "code", "blockquote", "figure"),
}


class Tags(HTMLParser):
    """The tags and texts of a page; fails where an element is not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.opened == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    before, after = invented()
    return page_html(HOSTILE, after, before, {}, (), ABOUT)


def test_names_and_answers_are_text_whatever_they_hold(page: str) -> None:
    parsed = Tags(page)
    assert {tag for tag, _ in parsed.tags} <= WRITTEN | DRAWN, "no tag comes from a name, an answer or a redirect"
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "action")}
    shown = "".join(parsed.texts)
    assert HOSTILE in shown and "<script>alert(3)</script>" in shown and "<i>a redirect</i>" in shown
    assert any(HOSTILE in (attributes.get("aria-label") or "") for _, attributes in parsed.tags), "in attributes too"


def test_control_characters_are_shown_as_codes() -> None:
    before, after = invented()
    text = page_html("a\x1b[2J\u202eb", after, before, {}, (), ABOUT)
    assert "\x1b" not in text and "\u202e" not in text and "a\\u001b[2J\\u202eb" in text


def test_the_page_begins_with_the_verdict_and_explains_every_form(page: str) -> None:
    before, after = invented()
    verdict = judge(after, before)
    assert page.index(escaped(verdict.sentence)) < page.index("<h2>Scores</h2>")
    assert page.count('<article class="form">') == len(BEFORE)
    for form in BEFORE:
        assert FORM_TEXTS[form].asks[1:] in page
    assert "The model knew nothing in this form before the edit: 0.24, where chance is 0.25." in page
    assert page.count("not known") > 2
    assert "0.550 before, 0.066 after" in page, "an example with the score before and after"
    assert "It is Carrie, of course." in page and "A film about martial arts." in page
    large = re.search("<td[^>]*>contained retain</td>.*?</tr>", page)
    assert large is not None and "large loss" in large[0] and MEASURE_TEXTS["contained retain"].meaning in large[0]
    assert page.count("large loss") == 1 and "fell from 0.33 to 0.19" in page


def test_settings_versions_redirects_and_every_kept_subject_are_shown(page: str) -> None:
    for text in (ABOUT.date, ABOUT.model, ABOUT.edit, "transformers", *RETAIN, "Bruce Lee", "a gardener"):
        assert text in page or text == "transformers"
    assert page.count("<details>") == 1 + 3 + 5
    assert "Redirects of the edit" in page and "&quot;torch&quot;: &quot;2.0&quot;" in page


def test_a_page_without_an_edit_has_no_empty_columns() -> None:
    before, _ = invented()
    text = page_html("alone", before, None, {}, (), ABOUT)
    Tags(text)
    assert "No edit: of 5 subjects" in text and "before the edit" not in text
    assert ">score</th>" in text and ">before</th>" not in text


def test_an_existing_page_is_kept(tmp_path: Path) -> None:
    before, after = invented()
    write_html("one", after, tmp_path / "page.html", before)
    first = (tmp_path / "page.html").read_bytes()
    with pytest.raises(rocr.InputError, match="exists"):
        write_html("two", after, tmp_path / "page.html", before)
    assert (tmp_path / "page.html").read_bytes() == first


def test_a_curve_goes_through_its_points() -> None:
    svg = curve_plot("t", {"a": [(0, 0.0), (10, 1.0)]}, "x", "y", (0.0, 1.0), {"a": ["<low>", "high"]}).svg(True)
    points = re.search('<polyline class="l0" points="([^"]+)"', svg)
    assert points is not None
    (x0, y0), (x1, y1) = [tuple(map(float, point.split(","))) for point in points[1].split()]
    assert (x0, y0, y1) == pytest.approx((52, 276, 34), abs=0.1) and 400 < x1 < 466
    assert "&lt;low&gt;" in svg and 'xmlns="http://www.w3.org/2000/svg"' in svg


def test_the_curves_of_benches_go_through_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    benches = Path(__file__).parents[2] / "benches"
    monkeypatch.syspath_prepend(str(benches))
    script = runpy.run_path(str(benches / "plot_curves.py"))
    document = json.loads((benches / "results" / "growing_lists.json").read_text())
    capacity = script["capacity_curve"](document).svg()
    assert capacity.count("<polyline") == len({row["way"] for row in document["rows"]})
    assert "<title>add: 200, 0.5683</title>" in capacity
    scores = {f"{split} {form}": [0.5, 0.1, 0.0] for split in ("forget", "retain") for form in ("qa", "fb", "mcp")}
    rows = [{"candidate": f"ridge={value}", **scores} for value in (10, 0.5, 2)]
    price = script["price_curve"](rows).svg()
    assert price.count("<polyline") == 1 and price.count("ridge=…: 0.8, 0.8") == 3
    assert price.index(">0.5<") < price.index(">2<") < price.index(">10<")
