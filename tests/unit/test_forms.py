"""Forms beside those of ORT: languages, the name written in another way, and questions whose answer is the name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import rocr
from rocr.concepts import folded
from rocr.evaluation import FORMS, Probe, choose_redirects, evaluate, load_probes
from rocr.evaluation.attacks.suite import AttackOptions, attack
from rocr.evaluation.forms import PromptStyle, build_items, lower, surname
from rocr.evaluation.probes.probe import Language, Wording, check_probes, has_words
from rocr.evaluation.report import table_rows
from rocr.evaluation.scores import CHOICE_FORMS, Evaluation, ItemScore
from rocr.model.chat import render_chat

QUESTION = {"subject": "Ada Byron", "kind": "person", "query": "Where was Ada Byron born?", "answer": "London"}
REVERSE = {
    **{"subject": "Ada Byron", "form": "reverse", "query": "Who wrote programs?", "answer": "Ada Byron"},
    **{"cloze": "Programs were written by ___.", "distractors": ["Blaise Pascal", "Æsop", "Jr."]},
}


def read(folder: Path, *rows: object) -> list[Probe]:
    path = folder / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_probes(path)


def by_hand(model: nn.Module, tokenizer: Any, message: str, answer: str) -> float:
    """exp(mean log-probability) of the tokens of an answer, from one forward pass of it alone."""
    prompt = tokenizer(render_chat(tokenizer, message) + "Answer:", add_special_tokens=False)["input_ids"]
    target = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        rows = model(torch.tensor([prompt + target])).logits[0].double().log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return float(rows.gather(1, torch.tensor(target)[:, None]).mean().exp())


def test_each_form_asks_its_own_question_and_scores_its_own_answer(
    model: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    languages = {name: {"query": f"In {name}?", "answer": name[:3]} for name in get_args(Language)}
    probes = read(tmp_path, {**QUESTION, **languages, "described": "Hers?"}, REVERSE)
    qa = "Please briefly answer the following question.\nQuestion: {}\n".format
    expected = {
        **{name: (qa(f"In {name}?"), f" {name[:3]}") for name in languages},
        "translated": (qa("In spanish?"), " spa"),
        "described": (qa("Hers?"), " London"),
        "lower": (qa("Where was ada byron born?"), " London"),
        "surname": (qa("Where was Byron born?"), " London"),
        "reverse": (qa("Who wrote programs?"), " Ada Byron"),
        "reverse-fb": (
            "Please complete the blank in the following question.\nQuestion: Programs were written by ___.\n",
            " Ada Byron",
        ),
    }
    found = evaluate(model, tokenizer, probes, [*expected, "reverse-mcp"])
    scores = {item.form: item for item in found.items}
    assert found.probes == 2 and {*scores} == {*expected, "reverse-mcp"}
    for form, (message, answer) in expected.items():
        assert scores[form].score == pytest.approx(by_hand(model, tokenizer, message, answer), abs=1e-5), form
        assert scores[form].derived == (form in ("lower", "surname")) and scores[form].chance is None
    (choice,) = build_items(probes, ["reverse-mcp"])
    options = dict(line.split(". ", 1) for line in choice.message.splitlines()[2:])
    assert options["ABCD"[choice.correct]] == "Ada Byron" and {*options.values()} == {
        "Ada Byron",
        *REVERSE["distractors"],
    }
    letters = [by_hand(model, tokenizer, choice.message, f" {letter}") for letter in "ABCD"]
    item = scores["reverse-mcp"]
    assert (item.score, item.chance) == (pytest.approx(letters[choice.correct], abs=1e-5), 0.25)
    assert item.choice == pytest.approx(letters[choice.correct] / sum(letters), abs=1e-5)
    assert all(item.split == "forget" for item in found.items)


def test_a_wording_of_the_file_takes_the_place_of_a_derived_one_and_translated_that_of_a_language(
    tmp_path: Path,
) -> None:
    wordings = {"lower": "ada?", "surname": "The Byron?", "translated": "Qui ?", "spanish": "¿Quién?"}
    (probe,) = read(tmp_path, {**QUESTION, **wordings})
    items = build_items([probe], [*wordings])
    assert [item.message.split("Question: ")[1].strip() for item in items] == [*wordings.values()]
    assert not any(item.derived for item in items)


def test_names_are_derived_for_the_kinds_that_have_them() -> None:
    assert [surname(name) for name in ("Martin Luther King Jr.", "Vincent van Gogh", "J. K. Rowling", "Malcolm X")] == [
        *("King", "Gogh", "Rowling", "Malcolm X")
    ]
    for name in ("Cleopatra", "Joan of Arc", "Alexander the Great", "Elizabeth II"):
        assert surname(name) == name
    assert lower("Ada BYRON") == "ada byron"
    forms = ("misspelt", "abbreviated", "lower", "surname")
    probe = Probe("Ada Byron", "Where is Ada Byron?", "London")
    asked = {
        kind: [item.form for item in build_items([replace(probe, kind=kind)], forms)]
        for kind in ("person", "thing", None)
    }
    assert asked == {
        "person": [*forms],
        "thing": ["misspelt", "lower"],
        None: ["misspelt", "abbreviated", "lower"],
    }
    with pytest.raises(rocr.InputError, match="None of the 1 probes can be asked in the forms lower, surname"):
        build_items([Probe("gold", "What is gold?", "a metal", kind="thing")], ("lower", "surname"))


def test_reverse_questions_are_asked_in_no_other_form_and_others_in_none_of_theirs(tmp_path: Path) -> None:
    question, reverse = read(tmp_path, QUESTION, REVERSE)
    own = ("reverse", "reverse-fb", "reverse-mcp")
    assert {item.form for item in build_items([reverse], FORMS)} == {*own}
    assert not {item.form for item in build_items([question], FORMS)} & {*own}
    (derived,) = build_items([replace(reverse, cloze=None)], ["reverse-fb"])
    assert derived.derived and "Who wrote programs? The answer is ___." in derived.message
    assert not [item for item in build_items([replace(reverse, distractors=())], own) if item.form == "reverse-mcp"]
    assert rocr.evaluation.Evaluation([], probes=0).forms == ()


def test_only_probes_that_are_asked_count(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    probes = read(tmp_path, QUESTION, REVERSE)
    assert evaluate(model, tokenizer, probes, ["qa"], known=0.0).known == 1
    for forms, count in ((["qa"], 1), (["reverse"], 1), (["qa", "reverse-fb"], 2)):
        assert evaluate(model, tokenizer, probes, forms).probes == count


def test_choices_are_no_answers_in_words_and_decide_what_is_known() -> None:
    items = [
        ItemScore(0, "a", form, "forget", score, 0.0, 0.0, None, False, 0.25 if form in CHOICE_FORMS else None)
        for form, score in (("reverse", 0.2), ("reverse-fb", 0.4), ("reverse-mcp", 0.9))
    ]
    evaluation = Evaluation(items, 1)
    assert evaluation.worst() == {"a": ("reverse-fb", 0.4)}
    assert evaluation.known_probes(0.8) == {0} and Evaluation(items[:2], 1).known_probes(0.8) == set()
    derived = Evaluation([replace(item, derived=True) for item in items], 1)
    assert [row[1] for row in table_rows(derived)][:3] == ["reverse (derived)", "reverse-fb (derived)", "reverse-mcp"]


def test_text_before_a_reverse_question_that_names_the_answer_is_left_out(model: nn.Module, tokenizer: Any) -> None:
    probe = Probe("Al", "Who sells alms?", "Al", form="reverse")
    for prefix, kept in (("About AL: ", False), ("Almost: ", True), ("", True)):
        (item,) = build_items([probe], ["reverse"], PromptStyle(prefix=lambda _, text=prefix: text))
        assert item.message.startswith(prefix + "Please") == kept and "Who sells alms?" in item.message
    asked = [probe, Probe("Al", "What does Al sell?", "alms")]
    options = AttackOptions(prefixes=("Remember {}. ",))
    found = attack(model, tokenizer, asked, ["prefixes"], ["qa", "reverse"], options=options)["prefixes"]
    plain = evaluate(model, tokenizer, asked, ["qa", "reverse"])
    same = {
        item.form: abs(item.score - other.score) < 1e-6 for item, other in zip(found.items, plain.items, strict=True)
    }
    assert same == {"reverse": True, "qa": False}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "place"}, "kind must be one of person, thing, not 'place'"),
        ({"kind": 1}, "kind must be a string"),
        ({"chinese": {"answer": "伦敦"}}, "chinese must be a string, or an object with query and answer"),
        ({"lower": " "}, "lower must be a string"),
        ({"latin": "Ubi?"}, "unknown field 'latin'"),
        ({"form": "reverse", "query": "Is ADA BYRON herself?", "answer": "Ada Byron"}, "must not contain its answer"),
        ({"form": "backwards"}, "form must be one of qa, fb, mcp, adversarial, reverse"),
    ],
)
def test_what_is_wrong_with_a_probe_is_said(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(rocr.InputError, match=match):
        read(tmp_path, {**QUESTION, **change})
    with pytest.raises(rocr.InputError, match="holds invisible characters"):
        check_probes([Probe("a", "q", "x", wordings={"chinese": Wording("谁\u200b", "x")})])
    with pytest.raises(rocr.InputError, match="Unknown forms: latin"):
        build_items([Probe("a", "q", "x")], ["latin"])


def test_a_redirect_is_chosen_for_the_kind_of_its_subject(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**QUESTION, "subject": "rain", "query": "What is rain?", "kind": "thing"}, {**REVERSE, "kind": "thing"}]
    (choice,) = choose_redirects(model, tokenizer, read(tmp_path, rows[0]), ["a key", "the roses"], ["qa"])
    assert choice.concept.kind == "thing" and choice.questions == 1
    with pytest.raises(rocr.InputError, match="No question contains the name of 'Ada Byron'"):
        choose_redirects(model, tokenizer, read(tmp_path, *rows), ["a key", "the roses"], ["qa"])


@pytest.fixture(scope="module")
def plain() -> list[Probe]:
    """The questions of the package's probes about the subject."""
    return [probe for probe in load_probes("probes") if probe.form == "qa"]


@pytest.fixture(scope="module")
def reverse() -> list[Probe]:
    """The questions of the package's probes whose answer is the subject's name."""
    return [probe for probe in load_probes("probes") if probe.form == "reverse"]


def test_every_subject_is_asked_in_other_languages(plain: list[Probe], reverse: list[Probe]) -> None:
    assert (len(plain), len(reverse)) == (420, 140) and len(load_probes("probes")) == 560
    counts = {
        (probe.subject, probe.kind): {
            name: sum(name in other.wordings for other in plain if other.subject == probe.subject)
            for name in ("chinese", "spanish", "russian", "arabic", "described")
        }
        for probe in plain
    }
    people = [count for (_, kind), count in counts.items() if kind == "person"]
    things = [count for (_, kind), count in counts.items() if kind == "thing"]
    assert min(count["chinese"] for count in people) >= 4 and min(count["spanish"] for count in people) >= 1
    assert all((count["russian"], count["arabic"]) == (3, 1) for count in people)
    assert all(count["spanish"] == count["chinese"] == 6 and count["described"] >= 5 for count in things)


def test_a_wording_is_in_its_script_and_does_not_hold_its_answer(plain: list[Probe]) -> None:
    scripts = {"chinese": "\u4e00-\u9fff", "russian": "\u0400-\u04ff", "arabic": "\u0600-\u06ff"}
    seen = set()
    for probe in plain:
        for name, wording in probe.wordings.items():
            assert not has_words(wording.query, wording.answer), wording
            assert (name, folded(wording.query)) not in seen, wording
            seen.add((name, folded(wording.query)))
            if name in scripts:
                first, last = scripts[name].split("-")
                assert sum(first <= character <= last for character in wording.query) >= 4, wording
                assert wording.query.rstrip()[-1] in "\uff1f?.؟"


def test_a_name_is_the_answer_of_two_questions_among_names_that_no_list_forgets(
    plain: list[Probe], reverse: list[Probe]
) -> None:
    subjects = {probe.subject: probe.kind for probe in plain}
    answers = [probe.subject for probe in reverse]
    assert sorted(answers) == sorted([*subjects] * 2)
    for probe in reverse:
        assert probe.answer == probe.subject and probe.kind == subjects[probe.subject]
        assert len({folded(text) for text in (probe.answer, *probe.distractors)}) == 4
        assert not {*probe.distractors} & {*subjects}
        assert probe.cloze is not None and not has_words(probe.cloze, probe.answer)
        assert not any(has_words(text, wrong) for text in (probe.query, probe.cloze) for wrong in probe.distractors)


def test_surnames_are_those_by_which_people_are_called(plain: list[Probe]) -> None:
    people = [probe for probe in plain if probe.kind == "person"]
    asked = {probe.subject for probe in people if _surname(probe)}
    without = {"Cleopatra", "Michelangelo", "Pelé", "Joan of Arc", "Alexander the Great"}
    assert {probe.subject for probe in people} - asked == without
    for name, called in (("Leonardo da Vinci", "da Vinci"), ("Vincent van Gogh", "van Gogh")):
        for probe in people:
            if probe.subject == name:
                assert _surname(probe) == probe.query.replace(name, called)


def _surname(probe: Probe) -> str | None:
    items = [item for item in build_items([probe], FORMS) if item.form == "surname"]
    return items[0].message.split("Question: ")[1].strip() if items else None
