"""The pictures of the documentation, and the script that makes them from a run."""

import runpy
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rocr.cli.main import program
from rocr.evaluation.page import write_html
from tests.support.evaluations import ABOUT, HOSTILE, invented

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 200_000


@pytest.fixture(scope="module")
def script():
    """What benches/make_pictures.py defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benches"))
        return runpy.run_path(str(ROOT / "benches" / "make_pictures.py"))


def size_of(picture):
    """Width and height of a PNG file."""
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_kept_pictures_are_those_of_the_script_and_small(script):
    assert {path.name for path in PICTURES.iterdir()} == {*script["PAGES"], *script["TERMINALS"]}
    for name, (width, height, _) in script["PAGES"].items():
        assert size_of(PICTURES / name) == (width, height)
    assert all(path.stat().st_size < MOST_BYTES for path in PICTURES.iterdir())


def test_every_picture_is_shown():
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert all(f"pictures/{path.name})" in pages for path in PICTURES.iterdir())


def test_its_commands_are_those_of_rocr(script, tmp_path, monkeypatch):
    (tmp_path / "edited").mkdir()
    monkeypatch.chdir(tmp_path)
    for words in [*script["COMMANDS"].values(), script["CHAT"]]:
        program.commands[words[0]].make_context(words[0], list(words[1:]))


def test_a_terminal_is_drawn_with_its_text_and_loads_nothing(script):
    svg = script["terminal_svg"]("\x1b[1mbold\x1b[0m <b>&amp; plain\nsecond line\n", 'rocr ask x "Who?"')
    for drawn in (svg, *(path.read_text(encoding="utf-8") for path in PICTURES.glob("*.svg"))):
        root = ET.fromstring(drawn)
        assert "url(http" not in drawn and "@font-face" not in drawn and "/tmp" not in drawn
        texts = "".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
        assert "rocr\xa0" in texts
    text = "".join(element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))
    assert "<b>&amp;\xa0plain" in text and "second\xa0line" in text and "\x1b" not in text


def test_an_excerpt_says_that_lines_are_left_out(script):
    printed = "a\n\x1b[1mFirst of all\x1b[0m\nb\nLayers\nc\nNext: d\n"
    assert script["excerpt"](printed, "First", "Layers", "Next") == "\x1b[1mFirst of all\x1b[0m\nb\n…\nNext: d"


def test_without_a_browser_it_says_what_to_install(tmp_path):
    command = [sys.executable, str(ROOT / "benches" / "make_pictures.py"), str(tmp_path / "out")]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("No Chromium was found: install it")
    assert "ROCR_CHROMIUM" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_pictures_of_a_page_have_their_size_and_show_what_is_asked(script, tmp_path):
    find = script["find_browser"]
    if find() is None:
        pytest.skip(script["MISSING"])
    before, after = invented()
    page = tmp_path / "report.html"
    write_html(HOSTILE, after, page, before, about=ABOUT)
    made = []
    for name, (width, height, entry) in script["PAGES"].items():
        script["picture"](page, tmp_path / name, width, height, entry, dark="dark" in name)
        assert size_of(tmp_path / name) == (width, height) and (tmp_path / name).stat().st_size < MOST_BYTES
        made.append((tmp_path / name).read_bytes())
    assert len(set(made)) == len(made)
