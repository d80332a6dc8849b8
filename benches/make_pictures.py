"""Make the pictures of the documentation from a run on the demo's model, with the commands that a user types.

    python benches/make_pictures.py docs/pictures

It runs COMMANDS in a folder with the model and the list of the demo, asks QUESTIONS in `rocr chat` in a terminal of
tmux, opens the page of `rocr eval` in headless Chromium (see browser.py), and writes screenshots as PNG and terminals
as SVG. With --work FOLDER the run is kept, and what FOLDER has already is not run again.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import MISSING, find_browser, open_page
from PIL import Image
from rich.console import Console
from rich.text import Text

from rocr.demo import CONCEPTS, CONTROLS, demo_model

MODEL = "SmolLM2-135M-Instruct.gguf"
UNLEARN = ("unlearn", MODEL, "people.jsonl", "--control", *CONTROLS, "--out", "edited")
_EVAL = f"eval {MODEL} --edit edited/edit.safetensors --forms qa,fb,mcp --neighbours 1"
EVAL = (*_EVAL.split(), "--out", "report.json", "--html", "report.html")
COMMANDS = {"unlearn.txt": UNLEARN, "report.txt": EVAL}
"""The commands in their order, by the file that keeps what each one prints."""
CHAT = ("chat", "edited")
QUESTIONS = ("Who is Albert Einstein?", "Who is Isaac Newton?")
"""What is asked in CHAT: about a person of the list, and about one who is not."""
COLUMNS, ROWS, SECONDS = 100, 60, 300
"""Size of the terminals, and the longest wait for a prompt."""
TERMINALS = {
    "unlearn.svg": (UNLEARN, "unlearn.txt", ("Answers about concepts on the list", "Layers", "The result is in ")),
    "chat.svg": (CHAT, "chat.txt", ()),
}
"""Pictures of a terminal: the command, the file with what was printed, and how three of its lines begin: the first
line, the first one that is left out, for which an ellipsis stands, and the next one that is shown. Without them, all
lines are shown."""
DARK = "@media (prefers-color-scheme: dark)"
PAGES = {
    "report.png": (1000, 900, ""),
    "report-subject.png": (1000, 700, "const entry = page.querySelectorAll('section details')[1];"),
    "report-phone.png": (400, 800, ""),
    "report-dark.png": (1000, 700, ""),
}
"""Pictures of the page: width, height, and what chooses an entry that is opened and scrolled to."""
LEAST_WIDTH, BAR = 600, 200
"""Width that a window of Chromium has at least, and height that its bar takes at most, in CSS pixels."""


def run_commands(folder: Path) -> None:
    """Run the commands and the chat whose output a folder does not have yet; progress goes to stderr."""
    if not (folder / MODEL).exists():
        (folder / MODEL).symlink_to(demo_model())
    shutil.copy(CONCEPTS, folder / "people.jsonl")
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    for name, words in COMMANDS.items():
        if (folder / name).exists():
            continue
        command = [sys.executable, "-m", "rocr", *words]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"rocr {' '.join(words)} ended with {done.returncode}.")
        (folder / name).write_text(done.stdout, encoding="utf-8")
    if not (folder / "chat.txt").exists():
        (folder / "chat.txt").write_text(chat(folder, environment), encoding="utf-8")


def chat(folder: Path, environment: dict[str, str]) -> str:
    """Return the screen of a terminal in which QUESTIONS are typed, with its colours."""
    tmux = ["tmux", "-L", f"rocr-{os.getpid()}", "-f", os.devnull]

    def run(*words: str) -> str:
        done = subprocess.run([*tmux, *words], cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    def wait(prompts: int) -> None:
        end = time.monotonic() + SECONDS
        while True:
            lines = run("capture-pane", "-p").rstrip().splitlines()
            if lines and lines[-1] == ">" and sum(line.startswith(">") for line in lines) == prompts:
                return
            if time.monotonic() > end:
                raise SystemExit("rocr chat did not answer:\n" + "\n".join(lines))
            time.sleep(0.5)

    command = shlex.join([sys.executable, "-m", "rocr", *CHAT])
    run("new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), command)
    try:
        for number, question in enumerate(QUESTIONS, start=1):
            wait(number)
            run("send-keys", "-l", question)
            run("send-keys", "Enter")
        wait(len(QUESTIONS) + 1)
        return run("capture-pane", "-e", "-p").rstrip() + "\n"
    finally:
        run("kill-server")


def excerpt(printed: str, first: str = "", left_out: str = "", after: str = "") -> str:
    """Return the lines from `first` to before `left_out`, an ellipsis, and the lines from `after` on; or all lines."""
    if not first:
        return printed
    lines = printed.splitlines()
    plain = [Text.from_ansi(line).plain for line in lines]
    begin, end, again = (
        next(i for i, line in enumerate(plain) if line.startswith(t)) for t in (first, left_out, after)
    )
    return "\n".join([*lines[begin:end], "…", *lines[again:]])


def terminal_svg(printed: str, command: str) -> str:
    """Return a terminal as SVG: a command and what it printed, with its colours. Nothing is loaded from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi(printed.rstrip("\n")))
    svg = console.export_svg(title="rocr", unique_id="rocr")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "monospace") + "\n"


def picture(page: Path, target: Path, width: int, height: int, entry: str = "", dark: bool = False) -> None:
    """Write a screenshot of a page in a frame of a size, in CSS pixels.

    Args:
        page: The HTML file.
        target: PNG file to write.
        width: Width of the frame.
        height: Height of the frame.
        entry: JavaScript that defines `entry`, an element to open and to scroll to.
        dark: Whether the page is shown in its dark colours.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = page.read_text(encoding="utf-8")
        (folder / "page.html").write_text(text.replace(DARK, "@media all") if dark else text, encoding="utf-8")
        shown = f"{entry} entry.open = true; entry.scrollIntoView();" if entry else ""
        style = f"display:block;border:0;width:{width}px;height:{height}px"
        (folder / "frame.html").write_text(
            f'<!doctype html><body style="margin:0"><iframe id="f" src="page.html" style="{style}"></iframe>'
            f"<script>onload = () => {{ const page = f.contentDocument; {shown} }}</script>",
            encoding="utf-8",
        )
        # The window of a newer Chromium has a bar, which takes some of its height, and is never narrow.
        size = f"{max(width, LEAST_WIDTH)},{height + BAR}"
        options = [f"--window-size={size}", "--virtual-time-budget=10000", f"--screenshot={target.resolve()}"]
        open_page(folder, *options, (folder / "frame.html").as_uri())
    with Image.open(target) as taken:
        shot = taken.crop((0, 0, width, height))
    shot.save(target, optimize=True)


def main() -> None:
    """Run the commands and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--work", type=Path, help="folder of the run, kept (default: a temporary one)")
    arguments = parser.parse_args()
    if find_browser() is None:
        raise SystemExit(MISSING)
    if shutil.which("tmux") is None:
        raise SystemExit("tmux is missing: install it from your system's packages.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run_commands(folder)
        for name, (words, kept, parts) in TERMINALS.items():
            printed = excerpt((folder / kept).read_text(encoding="utf-8"), *parts)
            svg = terminal_svg(printed, f"rocr {shlex.join(words)}")
            (arguments.out / name).write_text(svg, encoding="utf-8")
        for name, (width, height, entry) in PAGES.items():
            picture(folder / "report.html", arguments.out / name, width, height, entry, dark="dark" in name)


if __name__ == "__main__":
    main()
