"""Rendered templates in edits and their files, and chat settings from the command line to the record."""

import copy
import datetime
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers.utils.chat_template_utils as rendering

import rocr
from rocr import ChatSettings, CollectOptions, Concept, Edit, EditConfig, InputError
from rocr.chat_settings import CLOCK_DATE
from rocr.evaluation import EvaluateOptions, Probe, choose_redirects, evaluate
from rocr.evaluation.attacks.suite import AttackOptions
from rocr.evaluation.attacks.suite import attack as attack_edit
from rocr.evaluation.lora_training import question_examples
from rocr.evaluation.measures import ChoiceQuestion
from rocr.evaluation.neighbours import name_states
from rocr.io.tensors import read_tensors, write_tensors
from rocr.statistics.self_generated import sample_sequences

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
BODY = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
CLOCK = "Today: {{ strftime_now('%d %b %Y') }}\n" + BODY
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system message!') }}{% endif %}" + BODY
SYSTEM = ChatSettings(system="Be kind.")
PASCAL = [Concept("Ada Byron", "Blaise Pascal")]
LAYERS = (1, 2)
CONFIG = EditConfig(layers=LAYERS, measure="once")


def edited(model, tokenizer, config=CONFIG, statistics=None):
    statistics = statistics or rocr.collect_statistics(model, tokenizer, ["Rain falls on the roses."] * 40, LAYERS)
    return rocr.unlearn(model, tokenizer, PASCAL, statistics, config)


def on_day(monkeypatch, day):
    clock = type("Clock", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None: cls(2026, 5, day))})
    monkeypatch.setattr(rendering, "datetime", clock)
    rendering._compile_jinja_template.cache_clear()


def test_the_same_inputs_give_the_same_bytes_on_any_day(model, make_tokenizer, tmp_path, monkeypatch):
    """Of text that the model writes, of keys and targets, and of the file with all of it."""
    tokenizer = make_tokenizer(chat=CLOCK)
    digests = set()
    for day in (3, 14):
        on_day(monkeypatch, day)
        edit = rocr.unlearn(copy.deepcopy(model), tokenizer, PASCAL, config=CONFIG)
        edit.save(tmp_path / str(day))
        digests.add(hashlib.sha256((tmp_path / str(day)).read_bytes()).hexdigest())
    rendering._compile_jinja_template.cache_clear()
    assert len(digests) == 1
    assert edit.config.chat.date == CLOCK_DATE, "the date is written down where the template reads it"
    assert CLOCK_DATE in edit.report.statistics["text"]
    other = rocr.unlearn(
        copy.deepcopy(model), tokenizer, PASCAL, config=replace(CONFIG, chat=ChatSettings(date="2031-01-02"))
    )
    assert not torch.equal(other.updates[0].factors.left, edit.updates[0].factors.left)


def test_rendered_templates_are_in_the_file_and_come_back(model, make_tokenizer, tmp_path, command):
    edit = edited(model, make_tokenizer(chat=CLOCK))
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert loaded.rendered == edit.rendered and loaded.config == edit.config
    assert len(edit.rendered) == len(edit.config.templates)
    assert edit.rendered[1].to_json() == {
        "before": "Today: 26 Jul 2024\n<|user|>Who is ",
        "after": "?<|end|><|assistant|>",
    }
    shown = command("info", tmp_path / "edit.safetensors")
    assert shown.code == 0 and "Today: 26 Jul 2024" in shown.output
    assert json.loads(command("info", tmp_path / "edit.safetensors", "--json").output)["rendered"][1] == {
        "before": "Today: 26 Jul 2024\n<|user|>Who is ",
        "after": "?<|end|><|assistant|>",
    }


def rewritten(edit, path, **changes):
    """The file of an edit with other fields in its header; None leaves one out."""
    edit.save(path)
    header, tensors = read_tensors(path, "rocr edit 1")
    header = {name: value for name, value in {**header, **changes}.items() if value is not None}
    write_tensors(path, header, tensors, overwrite=True)
    return path


@pytest.mark.parametrize(
    "wrong",
    [
        [{"before": "a", "after": "b"}],
        [{"before": "a"}] * 6,
        [{"before": 3, "after": "b"}] * 6,
        [{"before": "a", "after": "b", "c": ""}] * 6,
        ["a"] * 6,
        {"before": "a"},
        "abcdef",
    ],
    ids=repr,
)
def test_a_file_with_other_rendered_templates_is_refused(model, tokenizer, statistics, tmp_path, wrong):
    path = rewritten(edited(model, tokenizer, statistics=statistics), tmp_path / "edit", rendered=wrong)
    with pytest.raises(InputError, match=str(path)):
        Edit.load(path)


def test_a_file_without_them_loads_and_concepts_can_be_added(model, tokenizer, statistics, tmp_path):
    edit = edited(model, tokenizer, statistics=statistics)
    old = Edit.load(rewritten(edit, tmp_path / "edit", rendered=None))
    assert old.rendered == ()
    more = [Concept("Robert Downey Jr.", "a gardener")]
    added = old.add(more, model, tokenizer, statistics)
    assert added.rendered == edit.rendered


def test_concepts_are_added_as_the_first_were_read_or_not_at_all(model, make_tokenizer, weights_of):
    tokenizer = make_tokenizer(chat=CLOCK)
    statistics = rocr.collect_statistics(model, tokenizer, ["Rain falls on the roses."] * 40, LAYERS)
    edit = edited(model, tokenizer, statistics=statistics)
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    more = [Concept("Robert Downey Jr.", "a gardener")]
    stored = (replace(edit.rendered[0], before="Today: 03 May 2026\n<|user|>"), *edit.rendered[1:])
    with pytest.raises(InputError, match=r"Today: 03 May 2026.* but the tokenizer now gives .*Today: 26 Jul 2024"):
        replace(edit, rendered=stored).add(more, model, tokenizer, statistics)
    with pytest.raises(InputError, match=r"Today: 26 Jul 2024.* but the tokenizer now gives .*'<\|user\|>'"):
        replace(edit, config=replace(edit.config, chat=ChatSettings())).add(
            more, model, make_tokenizer(chat=BODY), statistics
        )
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
    assert edit.add(more, model, tokenizer, statistics).rendered == edit.rendered
    other = replace(edited(copy.deepcopy(model), tokenizer, statistics=None), rendered=stored)
    other.concepts = more
    with pytest.raises(InputError, match="other edit's tokenizer"):
        edit.merge(other)


PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London", ("Paris", "Rome")),
    Probe("Ada Byron", "What did Ada Byron write?", "programs", ("poems", "laws")),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air", ("gold", "salt"), split="retain"),
]
CHOICES = [ChoiceQuestion("What falls?", ("rain", "brass"), 0)]
USES = {
    "statistics": lambda m, t, chat: rocr.collect_statistics(
        m, t, None, [1], CollectOptions(tokens=40, chat=chat)
    ).second_moment(1).sum(),
    "text": lambda m, t, chat: sample_sequences(m, t, 40, 0, chat=chat),
    "an edit": lambda m, t, chat: edited(copy.deepcopy(m), t, replace(CONFIG, chat=chat)).updates[0].factors.left.sum(),
    "questions": lambda m, t, chat: [i.score for i in evaluate(m, t, PROBES, options=EvaluateOptions(chat=chat)).items],
    "free answers": lambda m, t, chat: evaluate(
        m, t, PROBES, ["qa"], options=EvaluateOptions(chat=chat, generate=True)
    ).measures["n-gram entropy"],
    "choices": lambda m, t, chat: evaluate(m, t, PROBES, options=EvaluateOptions(chat=chat, utility=CHOICES)).measures,
    "attacks": lambda m, t, chat: {
        name: [item.score for item in found.items]
        for name, found in attack_edit(
            m, t, PROBES, ["8-bit", "prefixes", "examples"], ["qa"],
            options=AttackOptions(evaluate=EvaluateOptions(chat=chat)),
        ).items()
    },
    "relearning": lambda m, t, chat: [
        item.score
        for found in attack_edit(
            m, t, PROBES, ["relearn"], ["qa"],
            options=AttackOptions(taught=1, epochs=(1,), evaluate=EvaluateOptions(chat=chat)),
        ).values()
        for item in found.items
    ],
    "training": lambda m, t, chat: question_examples(t, PROBES, chat=chat)[0].prompt,
    "redirects": lambda m, t, chat: choose_redirects(m, t, PROBES, ["the roses", "a key"], chat=chat)[0].left,
    "aliases": lambda m, t, chat: rocr.propose_aliases(m, t, PASCAL, ["Greek"], chat=chat).proposals,
    "neighbours": lambda m, t, chat: name_states(m, t, ["Ada Byron"], chat).sum(),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_settings_reach_every_place_that_renders_a_chat(model, make_tokenizer, use):
    if use == "relearning":
        pytest.importorskip("peft")
    tokenizer = make_tokenizer(chat=NEEDS_SYSTEM)
    with pytest.raises(InputError, match=r"A system message!.*--system TEXT"):
        USES[use](model, tokenizer, ChatSettings())
    kind, other, none = (
        USES[use](model, tokenizer, chat) for chat in (SYSTEM, ChatSettings("Be terse."), ChatSettings(enabled=False))
    )
    if use not in ("free answers", "choices"):
        assert len({str(kind), str(other), str(none)}) == 3, "another system message is another text"


def test_an_evaluation_says_what_templates_were_given(model, make_tokenizer, tmp_path):
    options = EvaluateOptions(chat=SYSTEM, journal=tmp_path / "journal")
    found = evaluate(model, make_tokenizer(), PROBES, ["qa"], options=options)
    assert found.settings["chat"] == {"system": "Be kind."}
    with pytest.raises(InputError, match="is of another evaluation"):
        evaluate(model, make_tokenizer(), PROBES, ["qa"], options=replace(options, chat=ChatSettings("Be terse.")))
    assert "chat" not in evaluate(model, make_tokenizer(), PROBES, ["qa"]).settings
    assert evaluate(model, make_tokenizer(chat=CLOCK), PROBES, ["qa"]).settings["chat"] == {"date": CLOCK_DATE}


@pytest.fixture
def raising_folder(files, tmp_path):
    """The tiny model with a chat template that needs a system message and a variable."""
    folder = tmp_path / "raising"
    folder.mkdir()
    for path in files.model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    chat = "{% if not kind %}{{ raise_exception('kind is missing') }}{% endif %}" + NEEDS_SYSTEM
    (folder / "chat_template.jinja").write_text(chat)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


GIVEN = ("--system", "Be kind.", "--template-variable", "kind=true")


def test_the_command_line_gives_the_ways_round(raising_folder, files, concept, command, refused, tmp_path):
    arguments = ("unlearn", raising_folder, *concept, "--text", files.text, "--save", "edit")
    assert "A system message!" in refused(*arguments, *GIVEN[2:], "--out", tmp_path / "out").errors
    assert "kind is missing" in refused(*arguments, *GIVEN[:2], "--out", tmp_path / "out").errors
    done = command(*arguments, *GIVEN, "--template", "Who is {}?", "--template", "{} is", "--out", tmp_path / "out")
    assert done.code == 0, done.errors
    edit = Edit.load(tmp_path / "out" / "edit.safetensors")
    assert edit.config.chat == ChatSettings("Be kind.", {"kind": True})
    assert [t.text for t in edit.config.templates] == ["Who is {}?", "{} is"] and edit.config.templates[0].chat
    assert edit.rendered[0].before == "<|user|>Be kind.<|end|><|user|>Who is "
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["config"]["chat"] == {"system": "Be kind.", "variables": {"kind": True}}
    plain = command(*arguments, "--no-chat", "--template", "<|user|>{}<|end|>", "--out", tmp_path / "plain")
    assert plain.code == 0, plain.errors
    edit = Edit.load(tmp_path / "plain" / "edit.safetensors")
    assert edit.rendered[0].to_json() == {"before": "<|user|>", "after": "<|end|>"}


def test_every_command_that_renders_a_chat_takes_the_settings(raising_folder, files, command, tmp_path):
    probes = tmp_path / "probes.jsonl"
    fields = [
        {"subject": p.subject, "query": p.query, "answer": p.answer, "distractors": p.distractors} for p in PROBES
    ]
    probes.write_text("\n".join(map(json.dumps, fields)))
    ask = ("--probes", probes, "--targets", "Ada Byron")
    names = tmp_path / "names.txt"
    names.write_text("Ada Byron")
    commands = {
        "stats": ("--layers", "1,2", "--tokens", "60"),
        "eval": (*ask, "--forms", "qa", "--attacks", "prefixes"),
        "redirects": (*ask, "--among", "the roses", "a key"),
        "aliases": (names, "--languages", "Greek"),
        "compare": (*ask, "--redirect", "the roses", "--methods", "original", "--forms", "qa", "--tokens", "60"),
    }
    for name, arguments in commands.items():
        out = tmp_path / f"{name}.jsonl"
        bad = command(name, raising_folder, *arguments, "--out", out)
        assert bad.code == 2 and "kind is missing" in bad.errors, (name, bad.errors)
        done = command(name, raising_folder, *arguments, *GIVEN, "--out", out)
        assert done.code == 0, (name, done.errors)


LONG = "a" * 100_000
BAD = [
    ("--control", "\udce9"),
    ("--control", LONG),
    ("--control", "Ada", LONG),
    ("--ask", "Who is {}?\udce9"),
    ("--ask", f"Who is {{}}? {LONG}"),
    ("--ask", ""),
    ("--system", "\udce9"),
    ("--system", LONG),
    ("--template", "{}\udce9"),
    ("--template", f"{{}} {LONG}"),
    ("--template", "no place"),
    ("--template", ""),
    ("--template-variable", "kind"),
    ("--template-variable", "kind=\udce9"),
    ("--template-variable", f"kind={LONG}"),
    ("--template-variable", "messages=[]"),
    ("--template-variable", "a=" + "[" * 100_000),
    ("--date", "today"),
    ("--no-chat", "--system", "Be kind."),
]


@pytest.mark.parametrize("given", BAD, ids=lambda given: " ".join(given)[:30].encode("ascii", "replace").decode())
def test_what_the_command_line_cannot_mean_is_refused_before_the_model_is_loaded(files, attack, given, monkeypatch):
    monkeypatch.setattr("rocr.model.load.load_model", None)
    concept = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,2")
    attack("texts on the command line", "unlearn", files.model, *concept, "--statistics", files.statistics, *given)


@pytest.mark.parametrize(
    ("command_name", "given"),
    [
        ("eval", ("--targets", LONG)),
        ("redirects", ("--among", "the roses", LONG)),
        ("redirects", ("--targets", "\udce9", "--among", "the roses", "a key")),
        ("compare", ("--targets", "Stephen King", "--redirect", LONG)),
        ("compare", ("--targets", LONG, "--redirect", "the roses")),
    ],
)
def test_names_given_to_other_commands_keep_the_rules_of_a_list(files, attack, command_name, given, monkeypatch):
    monkeypatch.setattr("rocr.model.load.load_model", None)
    attack("names on the command line", command_name, files.model, *given)


def test_neighbours_keep_the_rules_of_a_list(model, tokenizer, statistics):
    for names in (["\udce9"], ["Ada\u200b"], [3], "Ada", [LONG]):
        with pytest.raises(InputError, match="retained name"):
            rocr.unlearn(model, tokenizer, PASCAL, statistics, CONFIG, retain=names)


def test_a_name_asked_about_is_on_the_list_in_whichever_form(files, concept, command, tmp_path: Path):
    arguments = [part for part in concept if part != "--no-answers"]
    done = command(
        "unlearn", files.model, *arguments, "--statistics", files.statistics, "--save", "edit",
        "--control", "ada  byron", "the rain", "--answer-tokens", "2", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.errors
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {answer["name"]: answer["on_list"] for answer in report["answers"]} == {
        "Ada Byron": True,
        "ada  byron": True,
        "the rain": False,
    }
