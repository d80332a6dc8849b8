"""The page of an evaluation in headless Chromium, which benches/browser.py finds. Skipped where there is none.

`ROCR_AXE` names the file axe.min.js of the npm package axe-core; `ROCR_NEW_PICTURE=1` writes the compared picture anew.
"""

import html
import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rocr.evaluation.page import page_html
from tests.support.evaluations import ABOUT, HOSTILE, invented

ROOT = Path(__file__).parents[2]
BROWSER = runpy.run_path(str(ROOT / "benches" / "browser.py"))
chromium = BROWSER["open_page"]
PICTURE = ROOT / "tests" / "data" / "report_page.png"
SHOWN = (1000, 3000)
SMALL = (100, 300)
"""The size at which pictures are compared."""
FONT = "DejaVu Sans"
"""The font of the kept picture; with another one lines break at other places."""
TOLERANCE = 5.0
"""Mean difference of grey values, of 255. The same page has 0; one without its first table, or whose first paragraph is
of another size, 11."""

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(BROWSER["find_browser"]() is None, reason=BROWSER["MISSING"]),
]


@pytest.fixture(scope="module")
def page() -> str:
    before, after = invented()
    return page_html(HOSTILE, after, before, {}, (), ABOUT)


def asked(folder: Path, page: str, script: str, width: int = 1000) -> Any:
    """The JSON value that a script finds in a page, in a frame of a width."""
    (folder / "page.html").write_text(page)
    frame = f'<iframe id="f" src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    wait = "onload = async () => { const inner = f.contentWindow, page = f.contentDocument;"
    told = f"document.title = JSON.stringify(await (async () => {{ {script} }})()); }}"
    (folder / "frame.html").write_text(f"<!doctype html><title></title>{frame}<script>{wait}{told}</script>")
    found = chromium(folder, "--virtual-time-budget=60000", "--dump-dom", (folder / "frame.html").as_uri())
    title = re.search("<title>(.*?)</title>", found, re.DOTALL)
    assert title is not None and title[1], found[:500]
    return json.loads(html.unescape(title[1]))


def test_nothing_in_a_name_runs_and_the_console_stays_empty(page: str, tmp_path: Path) -> None:
    found = asked(tmp_path, page, "return [page.scripts.length, page.images.length, page.title, !!inner.alerted];")
    assert found == [0, 0, HOSTILE, False]


def test_a_page_that_writes_to_the_console_is_seen(page: str, tmp_path: Path) -> None:
    for fault in ("<script>undefined_name()</script>", "<script>console.warn('a warning')</script>"):
        with pytest.raises(RuntimeError, match="wrote to its console"):
            asked(tmp_path, page.replace("</body>", f"{fault}</body>"), "return true;")


def test_a_phone_scrolls_tables_and_not_the_page(page: str, tmp_path: Path) -> None:
    opened = page.replace("<details>", "<details open>")
    script = "return [page.documentElement.scrollWidth, page.querySelectorAll('details[open]').length];"
    width, shown = asked(tmp_path, opened, script, width=400)
    assert width <= 400 and shown == 9


def test_entries_open_without_a_script(page: str, tmp_path: Path) -> None:
    script = (
        "const entry = page.querySelectorAll('section details')[1], table = entry.querySelector('table');"
        "const hidden = table.checkVisibility(); entry.querySelector('summary').click();"
        "await new Promise(done => setTimeout(done, 50)); return [hidden, table.checkVisibility()];"
    )
    assert asked(tmp_path, page, script) == [False, True]


def test_dark_mode_and_paper_have_their_colours(page: str, tmp_path: Path) -> None:
    script = "return inner.getComputedStyle(page.body).backgroundColor;"
    assert asked(tmp_path, page, script) == "rgb(255, 255, 255)"
    dark = page.replace("@media (prefers-color-scheme: dark)", "@media all")
    assert asked(tmp_path, dark, script) == "rgb(22, 24, 28)"
    paper = page.replace("@media print", "@media all")
    hidden = "return page.querySelectorAll('section details table')[1].checkVisibility({contentVisibilityAuto: true});"
    assert asked(tmp_path, paper, hidden) is True, "closed entries are printed"


def test_closed_entries_are_printed(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "without.html").write_text(page.replace("@media print", "@media not all"))
    pages = []
    for name in ("page", "without"):
        paper = tmp_path / f"{name}.pdf"
        chromium(tmp_path, f"--print-to-pdf={paper}", (tmp_path / f"{name}.html").as_uri())
        pages.append(len(re.findall(rb"/Type /Page\b", paper.read_bytes())))
    assert pages[0] > pages[1] > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(page: str, tmp_path: Path, scheme: str) -> None:
    axe = os.environ.get("ROCR_AXE")
    if not axe:
        pytest.skip("needs axe-core: set ROCR_AXE to its axe.min.js")
    shown = page.replace("<details>", "<details open>")
    if scheme == "dark":
        shown = shown.replace("@media (prefers-color-scheme: dark)", "@media all")
    shutil.copy(axe, tmp_path / "axe.js")
    script = (
        "const tag = page.createElement('script'); tag.src = 'axe.js';"
        "await new Promise(done => { tag.onload = done; page.head.append(tag); });"
        "const found = await inner.axe.run(page); return found.violations.map(v => [v.impact, v.id, v.nodes[0].html]);"
    )
    faults = asked(tmp_path, shown, script)
    assert [fault for fault in faults if fault[0] in ("serious", "critical")] == []


def test_the_page_looks_as_before(page: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    if FONT not in font():
        pytest.skip(f"the picture was made with the font {FONT}")
    if os.environ.get("ROCR_NEW_PICTURE"):
        taken(image, tmp_path, page).save(PICTURE, optimize=True)
    kept = image.open(PICTURE).convert("L")
    assert difference(kept, taken(image, tmp_path, page)) < TOLERANCE
    without = re.sub("<table>.*?</table>", "", page, count=1)
    dark = page.replace("@media (prefers-color-scheme: dark)", "@media all")
    for other in (without, dark):
        assert difference(kept, taken(image, tmp_path, other)) > TOLERANCE, "the comparison sees a change"


def font() -> str:
    """What this machine takes for `system-ui`."""
    try:
        return subprocess.run(["fc-match", "system-ui"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def taken(image: Any, folder: Path, page: str) -> Any:
    """A small grey picture of a page."""
    (folder / "page.html").write_text(page)
    target = folder / "page.png"
    size = f"--window-size={SHOWN[0]},{SHOWN[1]}"
    chromium(folder, size, f"--screenshot={target}", (folder / "page.html").as_uri())
    return image.open(target).convert("L").resize(SMALL, image.Resampling.BOX)


def difference(first: Any, second: Any) -> float:
    """The mean difference of grey values."""
    assert first.size == second.size
    return sum(abs(a - b) for a, b in zip(first.tobytes(), second.tobytes(), strict=True)) / len(first.tobytes())
