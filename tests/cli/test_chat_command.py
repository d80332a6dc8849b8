"""rocr chat: lines of stdin, and a person at a real terminal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rocr.cli.columns import arranged
from rocr.cli.conversation import Conversation, Turn
from rocr.cli.main import program
from rocr.errors import InputError, RocrError
from tests.support.running_effects import computes_with_threads, shows_library_warnings, shows_no_progress

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Who is Ada Byron?"


@pytest.fixture
def lines(command, monkeypatch, tmp_path, files):
    """lines(text, options): `rocr chat` with a text as stdin."""

    def run(text, *more):
        place = tmp_path / "stdin"
        place.write_bytes(text if isinstance(text, bytes) else text.encode())
        with place.open(encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            return command("chat", files.edited, "--answer-tokens", 6, *more)

    return run


@pytest.fixture(scope="module")
def answer(files, command):
    """The answers of both sides to the question, in 6 tokens."""
    done = command("ask", files.edited, QUESTION, "--answer-tokens", 6, "--json")
    return json.loads(done.output)["answers"][0]


def together(text):
    return " ".join(text.split())


def test_lines_are_questions_and_commands(lines, answer, tmp_path):
    saved = tmp_path / "saved.json"
    text = f"{QUESTION}\n\n/edited\n{QUESTION}\n/original\n{QUESTION}\n/save {saved}\n/quit\n{QUESTION}\n"
    done = lines(text, "--json")
    assert done.code == 0, done.errors
    turns = json.loads(done.output)["turns"]
    assert [{name: together(value) for name, value in turn.items()} for turn in turns] == [
        answer,
        {"question": QUESTION, "edited": answer["edited"]},
        {"question": QUESTION, "original": answer["original"]},
    ]
    assert json.loads(saved.read_text(encoding="utf-8")) == turns


def test_answers_are_printed_and_saved_as_text(lines, answer, tmp_path):
    done = lines(f"{QUESTION}\n/save {tmp_path / 'saved.txt'}\n/help\n", "--quiet")
    assert done.code == 0 and f"> {QUESTION}\nedited: " in done.output and "/save FILE" in done.output
    saved = (tmp_path / "saved.txt").read_text(encoding="utf-8")
    assert together(saved) == f"> {QUESTION} edited: {answer['edited']} original: {answer['original']}"


def test_the_side_that_is_shown_first_is_chosen(lines):
    done = lines(f"{QUESTION}\n", "--show", "original", "--json")
    assert [set(turn) for turn in json.loads(done.output)["turns"]] == [{"question", "original"}]


def test_the_options_of_running_and_asking_are_those_of_ask(lines):
    for effect in (computes_with_threads, shows_no_progress, shows_library_warnings):
        effect("chat", lambda _command, *more: lines(f"{QUESTION}\n", *more))
    own = [parameter.opts for parameter in program.commands["chat"].params]
    assert own == [parameter.opts for parameter in program.commands["ask"].params if parameter.name != "questions"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\n/edit\n", "Line 2 of stdin: There is no command '/edit'. Did you mean /edited? /help lists"),
        ("/nonsense 3\n", "Line 1 of stdin: There is no command '/nonsense'. /help lists"),
        ("/both now\n", "/both takes nothing after it"),
        ("/save\n", "/save needs the name of a file"),
        ("/save nowhere.json\n", "Nothing was asked yet"),
        ("x" * 2001, "The question has 2,001 characters"),
        (b"\n\xff\xfe\n", "Stdin is not UTF-8 after line"),
    ],
    ids=lambda part: repr(part[:12]),
)
def test_a_line_that_cannot_be_answered_ends_with_its_number(lines, text, sentence):
    done = lines(text)
    assert done.code == 2 and sentence in done.errors and "Traceback" not in done.errors


def test_a_file_is_not_replaced(tmp_path):
    conversation = Conversation("both", lambda: None, [Turn("Who?", {"edited": "A", "original": "B"}, stopped=True)])
    place = tmp_path / "saved"
    assert conversation.read(f"/save {place}") == f"{place}: 1 questions with their answers."
    assert place.read_text(encoding="utf-8") == "> Who?\nedited: A\noriginal: B\n(stopped)\n"
    with pytest.raises(InputError, match="exists; choose another name"):
        conversation.read(f"/save {place}")
    with pytest.raises(RocrError):
        conversation.read(f"/save {place}/inside")


def test_the_original_is_shown_only_where_it_can_be_asked():
    def refuse():
        raise InputError("The original cannot be asked.")

    conversation = Conversation("edited", refuse)
    for line in ("/original", "/both"):
        with pytest.raises(InputError, match="cannot be asked"):
            conversation.read(line)
    assert conversation.shown == "edited"


@pytest.mark.parametrize(("width", "lines_of_names"), [(79, 2), (80, 1)])
def test_answers_are_side_by_side_from_80_columns_on(width, lines_of_names):
    import io

    import rich.console

    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(arranged({"edited": "one " * 30, "original": "two " * 30}, width))
    shown = console.file.getvalue().splitlines()
    assert max(map(len, shown)) <= width
    assert len([line for line in shown if "edited" in line or "original" in line]) == lines_of_names
    assert any("one" in line and "two" in line for line in shown) == (lines_of_names == 1)


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    import io

    import rich.console

    from rocr.cli.columns import answers_on

    console = rich.console.Console(file=io.StringIO(), width=90, force_terminal=True)
    with answers_on(console, ("edited", "original")) as drawn:
        drawn.show("edited", "a\x1b[2Jb\x07")
    assert "\\u001b[2Jb\\u0007" in console.file.getvalue() and "\x1b[2J" not in console.file.getvalue()


pty = pytest.importorskip("pty")
from tests.support.terminal import Terminal  # noqa: E402  # needs pty


@pytest.fixture
def terminal(files):
    """terminal(options, columns): `rocr chat` on a terminal, after its first prompt."""
    opened = []

    def start(*more, columns=100):
        found = Terminal(("chat", files.edited, *more), columns, PYTHONPATH=str(ROOT))
        opened.append(found)
        found.until(r"pressed again\.\n> $")
        return found

    yield start
    for each in opened:
        each.__exit__()


@pytest.mark.thorough
def test_a_person_asks_at_a_terminal(terminal, answer, tmp_path):
    wide = terminal("--answer-tokens", 6)
    assert re.search(r"1 concept redirected\.", wide.plain(0))
    start = len(wide.text)
    wide.type(f"{QUESTION}\n")
    drawn = wide.until(r"> $", start)
    assert re.search(r"edited +original", drawn)
    assert len(re.findall(r"edited", drawn)) > 6, "the answers are drawn again as they grow"
    last = drawn[drawn.rindex("edited") :]
    for words in (answer["edited"], answer["original"]):
        assert words.split()[0] in last
    for line, sentence in (
        ("/edited", "Asked from now on: edited."),
        ("/hlep", "Did you mean /help?"),
        ("/save " + str(tmp_path / "s.json"), "1 questions with their answers."),
    ):
        start = len(wide.text)
        wide.type(f"{line}\n")
        assert sentence in together(wide.until(r"\n> $", start))
    wide.type("\x04")
    assert wide.ended() == 0
    saved = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert {name: together(value) for name, value in saved[0].items()} == answer


@pytest.mark.thorough
def test_a_narrow_terminal_has_one_answer_below_the_other(terminal):
    narrow = terminal("--answer-tokens", 6, columns=60)
    start = len(narrow.text)
    narrow.type(f"{QUESTION}\n")
    drawn = narrow.until(r"> $", start)
    assert not re.search(r"edited +original", drawn)
    assert re.search(r"^edited *\n(.*\n)+original *\n", drawn[drawn.rindex("edited") :], re.MULTILINE)
    narrow.process.send_signal(signal.SIGTERM)  # is no Ctrl-C, which leaves when it is pressed again
    assert narrow.ended() == 130


@pytest.mark.thorough
def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(terminal, tmp_path):
    long = terminal("--answer-tokens", 20000, "--show", "edited")
    start = len(long.text)
    long.type(f"{QUESTION}\n")
    long.until(r"edited\s+\S+", start)
    long.type("\x03")
    long.until(r"\n> $", start)
    start = len(long.text)
    long.type(f"/save {tmp_path / 'stopped.json'}\n")
    long.until(r"1 questions", start)
    (turn,) = json.loads((tmp_path / "stopped.json").read_text(encoding="utf-8"))
    assert turn["stopped"] is True and turn["edited"]
    start = len(long.text)
    long.type(f"{QUESTION}\n")
    long.until(r"edited\s+\S+", start)
    long.type("\x03")
    long.until(r"\n> $", start)
    long.type("\x03")
    assert long.ended() == 130
    assert "Interrupted; no partial output was left." in long.plain(start) and "Traceback" not in long.plain(0)


@pytest.mark.thorough
def test_ctrl_c_at_the_prompt_leaves_when_it_is_pressed_again(terminal):
    idle = terminal()
    start = len(idle.text)
    idle.type("half a line\x03")
    idle.until(r"Ctrl-C again leaves\.\n> $", start)
    start = len(idle.text)
    idle.type("/both\n")
    idle.until(r"Asked from now on: both\.\n> $", start)  # the count begins again
    start = len(idle.text)
    idle.type("\x03")
    idle.until(r"Ctrl-C again leaves\.\n> $", start)
    idle.type("\x03")
    assert idle.ended() == 130


@pytest.mark.thorough
def test_a_signal_ends_a_chat_that_reads_lines(files):
    words = [sys.executable, "-m", "rocr", "chat", str(files.edited), "--quiet", "--answer-tokens", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=environment, text=True, **pipes) as process:
        process.stdin.write(f"{QUESTION}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"> {QUESTION}\n"  # before stdin ends
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "rocr: Interrupted; no partial output was left.\n"
