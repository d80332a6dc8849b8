import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rocr
from rocr.concepts import folded
from rocr.evaluation import Probe, evaluate, load_probes
from rocr.evaluation.forms import DERIVED_CLOZE, PromptStyle, abbreviated, build_items, misspelt
from rocr.evaluation.probes.probe import Wording, check_probes, split_by_subject

SHIPPED = Path(rocr.__file__).parent / "data" / "probes.jsonl"
QUESTION = {"subject": "Ada Byron", "query": "Where was Ada Byron born?", "answer": "London"}
WRONG = ["Paris", "Rome", "Oslo", "Bonn"]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_shipped_probes_are_six_questions_about_each_subject_and_none_gives_its_answer_away() -> None:
    probes = [probe for probe in load_probes(SHIPPED) if probe.form == "qa"]
    subjects = [probe.subject for probe in probes]
    assert {subjects.count(subject) for subject in subjects} == {6}
    kinds = {probe.subject: probe.kind for probe in probes}
    assert list(kinds.values()) == ["person"] * 50 + ["thing"] * 20, "the people come first, for benches"
    assert all(probe.kind == kinds[probe.subject] for probe in probes)
    for probe in probes:
        described = probe.wordings.get("described", Wording("", "")).query
        assert len(probe.distractors) == 3 and probe.cloze is not None
        assert probe.subject in probe.query and probe.subject in probe.cloze and probe.subject not in described
        for question in (probe.query, probe.cloze, described):
            assert probe.answer.casefold() not in question.casefold()


def test_the_shipped_namesakes_share_a_word_with_their_concept_and_no_fact_of_another() -> None:
    probes = load_probes("namesakes")
    pairs = list(dict.fromkeys((probe.namesake_of or "", probe.subject) for probe in probes))
    assert len(pairs) >= 40 and len({name for _, name in pairs}) == len(pairs)
    people = {probe.subject for probe in load_probes("probes") if probe.kind == "person"}
    listed = people | {concept for concept, _ in pairs}
    assert sum(concept in people for concept, _ in pairs) >= len(pairs) // 2
    same_first = 0
    for concept, name in pairs:
        words, others = concept.removesuffix(" Jr.").split(), name.split()
        same_first += words[0] == others[0]
        assert words[0] == others[0] or words[-1] == others[-1], (concept, name)
        assert name not in listed and sum(probe.subject == name for probe in probes) == 3
    assert 0.6 < same_first / len(pairs) < 0.75
    for probe in probes:
        assert probe.split == "retain" and probe.cloze is not None and len(probe.distractors) == 3
        assert probe.subject in probe.query and probe.subject in probe.cloze
        assert len({folded(text) for text in (probe.answer, *probe.distractors)}) == 4
        for question in (probe.query, probe.cloze):
            assert not re.search(rf"\b{re.escape(probe.answer)}\b", question, re.IGNORECASE), probe
            assert not any(concept in question or concept == probe.answer for concept in listed), probe


def test_probes_of_namesakes_are_retained_whatever_the_targets(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{**QUESTION, "subject": "Ada Lovelace", "namesake_of": "Ada Byron"}])
    (probe,) = load_probes(path)
    assert (probe.split, probe.namesake_of) == ("retain", "Ada Byron")
    assert split_by_subject([probe], ["ada byron"]) == [probe]
    with pytest.raises(rocr.InputError, match="No probe is about"):
        split_by_subject([probe], ["Rain"])
    for wrong, match in (
        (" ", "namesake_of is empty"),
        ("ada lovelace", "the subject itself"),
        (3, "must be a string"),
    ):
        with pytest.raises(rocr.InputError, match=match):
            load_probes(write(path, [{**QUESTION, "subject": "Ada Lovelace", "namesake_of": wrong}]))


def test_a_set_of_the_package_is_named_unless_a_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "namesakes").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rocr.InputError, match="namesakes holds no probes"):
        load_probes("namesakes")
    with pytest.raises(rocr.InputError, match=r"nobody does not exist.*probes or namesakes"):
        load_probes("nobody")


def test_a_set_without_a_forget_set_keeps_what_is_known(make_model: Any, tokenizer: Any) -> None:
    probes = [replace(Probe("Ada Byron", "Where was Ada Byron born?", "London"), split="retain")]
    found = evaluate(make_model("Llama"), tokenizer, probes, ["qa"], known=0.0)
    assert (found.known, found.form_score("qa", "forget")) == (1, None)
    with pytest.raises(rocr.InputError, match="none of the 1 probes to retain"):
        evaluate(make_model("Llama"), tokenizer, probes, ["qa"], known=1.0)


def test_every_error_of_a_file_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    lines = [
        json.dumps(QUESTION),
        "{",
        json.dumps({**QUESTION, "query": "Q1", "answer": " "}),
        json.dumps({**QUESTION, "query": "Q2", "distractors": ["Rome", "london "]}),
        json.dumps({**QUESTION, "query": "where was  Ada Byron BORN?"}),
        json.dumps({"subject": "Ada Byron", "query": "Q3"}),
        json.dumps({**QUESTION, "query": "Q4", "form": "essay"}),
        json.dumps({**QUESTION, "query": "Q5", "form": "fb"}),
        json.dumps({**QUESTION, "query": "Q6", "distractors": "Rome"}),
        json.dumps({**QUESTION, "query": "Q7", "mood": "sad"}),
        json.dumps([1]),
        json.dumps({**QUESTION, "query": 3}),
    ]
    path = tmp_path / "probes.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(rocr.InputError) as error:
        load_probes(path)
    message = str(error.value).split("\n")
    numbers = sorted(int(line.split(":")[1]) for line in message)
    assert numbers == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert any(":4: the answer 'London' is among the distractors" in line for line in message)
    assert any(f":5: is a duplicate of {path}:1" in line for line in message)
    assert any(":6: has no answer" in line for line in message)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(rocr.InputError, match="holds no probes"):
        load_probes(tmp_path / "p.jsonl")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path / "missing", tmp_path):
        with pytest.raises(rocr.InputError, match=r"does not exist|holds no|cannot be read"):
            load_probes(path)
    (tmp_path / "p.jsonl").write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(rocr.InputError, match=r"p.jsonl:2: is not UTF-8"):
        load_probes(tmp_path / "p.jsonl")


def test_folders_of_rwku_and_ort_give_form_split_and_target(tmp_path: Path) -> None:
    folder = tmp_path / "2_Ada_Byron"
    folder.mkdir()
    (tmp_path / "10_Rain").mkdir()
    row = {"level": "2", "type": "simple question", "subject": "Ada Byron"}
    files: dict[str, list[dict[str, Any]]] = {
        "2_Ada_Byron/forget_level1.json": [{**row, "query": "Ada was born in ___.", "answer": "London"}],
        "2_Ada_Byron/forget_level2.json": [{**row, "query": "Where?", "answer": "London"}],
        "2_Ada_Byron/forget_level3.json": [{**row, "query": "Pretend. Where?", "answer": "London"}],
        "2_Ada_Byron/forget_level4.json": [{**row, "query": "Where?\nA. Rome\nB. London", "answer": "B"}],
        "2_Ada_Byron/neighbor_level2.json": [{**row, "query": "Who is Byron?", "answer": "a poet"}],
        "2_Ada_Byron/intro.json": [{"text": "not a question"}],
        "10_Rain/forget_level2.json": [{**row, "query": "What falls?", "answer": "water"}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
    probes = load_probes(tmp_path)
    found = [(probe.subject, probe.form, probe.split) for probe in probes]
    forms = ["fb", "qa", "adversarial", "mcp"]
    assert found == [("Ada Byron", f, "forget") for f in forms] + [
        ("Ada Byron", "qa", "retain"),
        ("Rain", "qa", "forget"),
    ]
    letters = build_items(probes, ["mcp"])[0]
    assert (letters.answers, letters.correct, letters.chance) == ((" A", " B"), 1, 0.5)
    (folder / "forget_level2.json").write_text('[\n {"query":\n"Where?"},\n3]', encoding="utf-8")
    with pytest.raises(rocr.InputError, match=r"level2.json:2: has no answer\n.*level2.json:4: must be an object"):
        load_probes(tmp_path)


def test_probes_built_in_python_keep_the_same_rules() -> None:
    probe = Probe("a", "q", "x")
    check_probes([probe])
    with pytest.raises(rocr.InputError, match=r"probes\[1\]: is a duplicate of probes\[0\]"):
        check_probes([probe, probe])
    with pytest.raises(rocr.InputError, match="empty"):
        check_probes([])


def test_targets_split_the_probes_by_subject() -> None:
    probes = [Probe("Ada Byron", "q", "x"), Probe("Rain", "q", "x")]
    assert [probe.split for probe in split_by_subject(probes, ["ada  byron"])] == ["forget", "retain"]
    with pytest.raises(rocr.InputError, match="No probe is about"):
        split_by_subject(probes, ["Snow"])


def test_prompts_are_those_of_ort() -> None:
    probe = Probe("Ada Byron", "Where was Ada Byron born?", "New York", tuple(WRONG))
    items = {item.form: item for item in build_items([probe], ("qa", "fb", "mcp", "subtoken"))}
    question = "Question: Where was Ada Byron born?"
    assert items["qa"].message == f"Please briefly answer the following question.\n{question}\n"
    assert (items["qa"].suffix, items["qa"].answers, items["qa"].derived) == ("Answer:", (" New York",), False)
    blank = DERIVED_CLOZE.format(probe.query)
    assert items["fb"].message == f"Please complete the blank in the following question.\nQuestion: {blank}\n"
    assert items["fb"].derived and items["fb"].answers == (" New York",)
    assert items["subtoken"].answers == ("N\ne\nw\nY\no\nr\nk\n",) and items["subtoken"].suffix == "Answer:\n"
    assert items["subtoken"].message.endswith(f"# Task\n{items['qa'].message}")
    plain = build_items([probe], ["subtoken"], PromptStyle(subtoken_example=False))[0]
    assert plain.message == f"Write the answer character by character, each on a new line.\n{items['qa'].message}"
    assert build_items([probe], ["qa"], PromptStyle(direct=True))[0].message.startswith("Please provide direct")
    own = build_items([replace(probe, cloze="Ada was born in ___.")], ["fb"])[0]
    assert "Question: Ada was born in ___.\n" in own.message and not own.derived


def test_options_are_shuffled_by_the_seed_and_shifted_by_orders() -> None:
    probe = Probe("Ada Byron", "Where?", "London", tuple(WRONG))
    items = build_items([probe], ["mcp"], orders=4)
    lines = [item.message.split("\n")[2:6] for item in items]
    assert sorted(item.correct for item in items) == [0, 1, 2, 3]
    assert all(line[item.correct] == f"{'ABCD'[item.correct]}. London" for line, item in zip(lines, items, strict=True))
    assert all(item.chance == 0.25 and item.answers == (" A", " B", " C", " D") for item in items)
    places = {build_items([probe], ["mcp"], seed=seed)[0].correct for seed in range(20)}
    assert places == {0, 1, 2, 3}
    assert build_items([probe], ["mcp"], seed=3) == build_items([probe], ["mcp"], seed=3)
    assert build_items([Probe("a", "q", "x", ("y",))], ["mcp"])[0].chance == 0.5


def test_other_wordings_are_given_or_derived() -> None:
    probe = Probe("Ada Byron", "Where was Ada Byron born?", "London", wordings={"described": Wording("Hers?", "UK")})
    items = build_items([probe], ("described", "misspelt", "abbreviated", "translated"))
    assert [(item.form, item.derived) for item in items] == [
        ("described", False),
        ("misspelt", True),
        ("abbreviated", True),
    ]
    assert items[0].answers == (" UK",) and "Where was A. Byron born?" in items[2].message
    assert sorted(misspelt("Byron")) == sorted("Byron") and misspelt("Byron") != "Byron"
    assert (abbreviated("Ada Byron"), abbreviated("Byron"), misspelt("Al")) == ("A. Byron", "Byron", "Al")


def test_forms_that_do_not_exist_or_no_probe_has_are_refused() -> None:
    probe = Probe("a", "q ___", "x", form="fb")
    for forms, match in ((["essay"], "Unknown forms: essay"), ([], "none given"), (["mcp"], "None of the 1 probes")):
        with pytest.raises(rocr.InputError, match=match):
            build_items([probe], forms)
