"""rocr ask: the answers of the edited model and of the original, from one loaded model."""

import itertools
import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import rocr
from rocr.model.generate import answer_in_steps, ask

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = ("Who is Ada Byron?", "What does a gardener do?")


@pytest.fixture(scope="module")
def expected(files):
    """The answers of the folders' own models, in 8 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(files.model)
    return {
        side: ask(AutoModelForCausalLM.from_pretrained(folder), tokenizer, QUESTIONS, 8)
        for side, folder in (("edited", files.edited), ("original", files.model))
    }


def test_both_answer_as_they_do_alone(files, command, expected):
    done = command("ask", files.edited, *QUESTIONS, "--answer-tokens", 8, "--json")
    assert done.code == 0, done.errors
    document = json.loads(done.output)
    assert document["answers"] == [
        {"question": question, "edited": edited, "original": original}
        for question, edited, original in zip(QUESTIONS, expected["edited"], expected["original"], strict=True)
    ]
    assert expected["edited"] != expected["original"]
    assert document["folder"] == str(files.edited)


@pytest.mark.parametrize("side", ["edited", "original"])
def test_one_side_is_asked_alone(files, command, expected, side):
    done = command("ask", files.edited, *QUESTIONS, "--answer-tokens", 8, "--show", side, "--json")
    rows = [{"question": q, side: a} for q, a in zip(QUESTIONS, expected[side], strict=True)]
    assert json.loads(done.output)["answers"] == rows


def test_answers_are_a_table_and_have_so_many_tokens(files, command):
    done = command("ask", files.edited, QUESTIONS[0], "--answer-tokens", 2, "--show", "edited")
    assert done.code == 0 and "question" in done.output and "original" not in done.output
    longer = command("ask", files.edited, QUESTIONS[0], "--answer-tokens", 20, "--show", "edited")
    assert len(longer.output) > len(done.output)


def test_an_edit_alone_is_asked_with_the_model_that_it_was_made_for(files, command, expected, tmp_path):
    shutil.copy(files.edit, tmp_path)
    done = command("ask", tmp_path, *QUESTIONS, "--answer-tokens", 8, "--json")
    assert done.code == 2 and "--model on the command line" in done.errors
    done = command("ask", tmp_path, *QUESTIONS, "--answer-tokens", 8, "--json", "--model", files.model)
    assert [row["edited"] for row in json.loads(done.output)["answers"]] == expected["edited"]


def test_a_model_whose_edit_cannot_be_taken_off_is_asked_as_it_is(files, command, tmp_path):
    folder = shutil.copytree(files.edited, tmp_path / "folder")
    edit = rocr.Edit.load(files.edit)
    edit.save(folder / "edit.safetensors", undo=False, overwrite=True)
    done = command("ask", folder, QUESTIONS[0])
    assert done.code == 2
    assert "The original cannot be asked: The edit was saved without the undo data" in done.errors
    assert "--show edited" in done.errors
    assert command("ask", folder, QUESTIONS[0], "--show", "edited", "--answer-tokens", 2).code == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Missing argument 'QUESTION...'"),
        (("",), "The question is empty."),
        (("x" * 3000,), "The question has 3,000 characters; the limit is 2,000."),
        (("Who?", "--answer-tokens", "0"), "'0' is not a whole number from 1 to 65,536."),
        (("Who?", "--show", "none"), "'none' is not one of 'edited', 'original', 'both'."),
        (("Who?", "--device", "nonsense"), "nonsense"),
        (("Who?", "--template-variable", "x"), "is not NAME=VALUE"),
    ],
    ids=lambda part: str(part)[:20],
)
def test_what_cannot_be_asked_is_refused(files, refused, words, sentence):
    assert sentence in refused("ask", files.edited, *words).errors


def test_the_settings_of_the_chat_are_those_of_the_edit_unless_some_are_given(files, command, tmp_path):
    """A template writes its system message, so that the edit's own one reaches the prompt and the answers."""
    folder = shutil.copytree(files.edited, tmp_path / "folder")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{{ mood }} {{ date_string }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    edit = rocr.Edit.load(files.edit)
    object.__setattr__(edit.config, "chat", rocr.ChatSettings(system="The gardener waters the roses."))
    edit.save(folder / "edit.safetensors", overwrite=True)

    def answer(*more):
        done = command("ask", folder, QUESTIONS[0], "--answer-tokens", 12, "--show", "edited", "--json", *more)
        assert done.code == 0, done.errors
        return json.loads(done.output)["answers"][0]["edited"]

    own = answer()
    assert own == answer("--system", "The gardener waters the roses.")
    others = (
        *(("--system", "Rain falls on Rome."), ("--no-chat",), ("--date", "2031-01-02")),
        ("--template-variable", "mood=the rain falls on the roses"),
    )
    for given in others:
        assert answer(*given) != own, given
    system = ("--system", "The gardener waters the roses.")
    assert answer(*system, "--template-variable", "mood=the rain falls on the roses") != own
    assert answer(*system, "--date", "2031-01-02") != own


def test_an_answer_in_steps_grows_to_the_whole_and_ends_where_it_is_told(model, tokenizer):
    (whole,) = ask(model, tokenizer, QUESTIONS[:1], 12)
    steps = []

    def show(text):
        steps.append(text)
        return True

    assert " ".join(answer_in_steps(model, tokenizer, QUESTIONS[0], show, 12).split()) == whole
    assert 1 < len(steps) <= 12 and steps[-1].split() == whole.split()
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(steps))
    ended = []
    first = answer_in_steps(model, tokenizer, QUESTIONS[0], lambda text: bool(ended.append(text)), 12)
    assert [first] == ended == steps[:1]
