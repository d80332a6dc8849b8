"""Joiners and selectors: part of the spelling in scripts that use them, invisible elsewhere."""

# ruff: noqa: RUF001
import json
import unicodedata
from dataclasses import replace

import pytest

from rocr.cli.console import visible
from rocr.concepts import Concept, check_concepts, check_names, folded, holds_name, load_concepts, with_name
from rocr.errors import InputError
from rocr.evaluation import EvaluateOptions, evaluate
from rocr.evaluation.measures import contains
from rocr.evaluation.neighbours import keep_nearest
from rocr.evaluation.probes.probe import Probe, check_probes, split_by_subject
from rocr.evaluation.redirects import check_candidates, replace_subject
from rocr.io.spelling import has_visible_character, has_word_character, hidden_characters

SPELLED = [
    "علی\u200cرضا",  # Persian
    "می\u200cخواهم",
    "iPhone\u200cها",  # an ending behind Latin letters
    "ശ്രീ\u200dകുമാർ",  # Malayalam
    "രാജന്\u200d",  # a chillu at the end, as it was written before Unicode 5.1
    "രാജന്\u200d പിള്ള",
    "শর্\u200dমা",  # Bengali
    "ක්\u200dරිස්ටෝෆර්",  # Sinhala
    "क्\u200cष",  # Devanagari
    "சேகர்\u200c",  # Tamil: the sign that takes the vowel is shown as it is
    "സുരേഷ്\u200c ഗോപി",
    "ᠮᠣᠩᠭᠣᠯ\u180eᠠ",  # Mongolian
    "ᠰᠠᠶ\u180bᠢᠨ",
    "葛\U000e0100城",  # Japanese
    "渡邉\U000e0101",
    "辻\ufe00",
    "I \u2764\ufe0f NY",
    "TM \u2122\ufe0e",
    "7\ufe0f\u20e3",
    "\U0001f469\u200d\U0001f52c",
    "\U0001f469\U0001f3fd\u200d\U0001f52c",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
]
HIDDEN = [
    ("Ada\u200cByron", 3),
    ("Ada\u200dByron", 3),
    ("Ада\u200dБайрон", 3),
    ("علی\u200c", 3),
    ("\u200cعلی", 0),
    ("علی\u200c رضا", 3),
    ("علی\u200c\u200cرضا", 3),
    ("علی\u200d\u200dرضا", 3),
    ("علی\u200c7", 3),
    ("東\u200d京", 1),
    ("ab\ufe0f", 2),
    ("a\U000e0100b", 1),
    ("7\ufe0f", 1),
    ("葛\ufe0f城", 1),
    ("葛\U000e0100\U000e0101", 2),
    ("\U000e0100葛", 0),
    ("か\U000e0100", 1),
    ("\u2764\u200d", 1),
    ("\u2764\ufe0f\ufe0f", 2),
    ("\u2764\U000e0100", 1),
    ("ᠰᠠ ᠶ \u180b", 5),
    ("a\u180bb", 1),
    ("Ada\u200bByron", 3),
    ("علی\u2060رضا", 3),
    ("علی\u202eرضا", 3),
    ("A\u034fb", 1),
    ("A\u3164b", 1),
    ("A\ud800", 1),
]


@pytest.mark.parametrize("name", SPELLED, ids=ascii)
def test_what_belongs_to_a_spelling_is_accepted(tmp_path, name):
    assert not list(hidden_characters(name))
    check_concepts([Concept(name, "a gardener"), Concept("b", f"c {name}")])
    check_names("--control", [name])
    check_probes([Probe(name, f"Who is {name}?", name, (f"{name} 2",))])
    (tmp_path / "a.jsonl").write_text(json.dumps({"name": name, "redirect": "X"}))
    assert load_concepts(tmp_path / "a.jsonl")[0].name == name


@pytest.mark.parametrize(("name", "place"), HIDDEN, ids=[ascii(name) for name, _ in HIDDEN])
def test_elsewhere_it_is_invisible_and_refused(name, place):
    assert place in [index for index, _ in hidden_characters(name)]
    with pytest.raises(InputError, match=f"as character {place + 1}"):
        check_concepts([Concept(name, "a gardener")])
    with pytest.raises(InputError, match="--control"):
        check_names("--control", [name])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("علی\u200cرضا", "علیرضا"),
        ("രാജന്\u200d", "രാജന്"),
        ("葛\U000e0100城", "葛城"),
        ("I \u2764\ufe0f NY", "i \u2764 ny"),
        ("Jos\u00e9", "Jose\u0301"),
    ],
)
def test_two_spellings_of_one_name_are_one_name(one, other):
    assert folded(one) == folded(other)
    with pytest.raises(InputError, match="is a duplicate of"):
        check_concepts([Concept(one, "X"), Concept(other, "X")])
    check_concepts([Concept(one, "X", (other,))])
    assert contains(f"It was {one}, who else.", other)


def test_folding_is_that_of_unicode_and_done_once():
    for character in "\u00ad\u034f\u200b\u2060\ufeff\U000e0001":
        assert folded(f"A{character}b") == "ab"
    for code in range(0x20, 0x3000):
        once = folded(f"a{chr(code)}b")
        assert folded(once) == once


def test_what_is_seen_and_what_is_of_a_word():
    for text in ("", " ", "\u00a0", "\u200c", "\ufe0f", " \u200d\U000e0100"):
        assert not has_visible_character(text) and not has_word_character(text)
    for text in (",", "++", "\u2764\ufe0f"):
        assert has_visible_character(text) and not has_word_character(text)
    for text in ("a", "7", "\u0301", "ा", "葛\U000e0100", ", x"):
        assert has_visible_character(text) and has_word_character(text)


COMPOSED = unicodedata.normalize("NFC", "Frédéric Chopin")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


@pytest.mark.parametrize(("asked", "wanted"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_probe_is_found_in_either_unicode_form(asked, wanted):
    probes = [Probe(asked, "Who?", "a"), Probe("B", "Who?", "b")]
    assert [probe.split for probe in split_by_subject(probes, [wanted])] == ["forget", "retain"]
    assert holds_name(f"Who is {asked}?", wanted) and not holds_name("Who is Fr\u00e9d\u00e9?", wanted)
    assert with_name(f"Who is {asked}?", wanted, "Bach") == "Who is Bach?"


def test_evaluation_counts_one_subject_in_two_forms_once(model, tokenizer):
    probes = [
        Probe(COMPOSED, f"Where was {DECOMPOSED} born?", "Warsaw", ("Paris", "Rome")),
        Probe(DECOMPOSED, f"What did {COMPOSED} write?", "a nocturne", ("laws", "poems")),
        Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air", ("salt", "gold"), split="retain"),
    ]
    found = evaluate(model, tokenizer, probes, ["qa", "misspelt"], options=EvaluateOptions(generate=True))
    assert found.by_target() == {COMPOSED: found.by_target()[COMPOSED]}
    assert found.form_score("qa", "forget").targets == 1
    assert found.form_score("misspelt", "forget").items == 2, "the name is found in the question, and misspelt there"
    asked = [replace_subject(probe, "Bach") for probe in probes[:2]]
    assert [probe.query for probe in asked] == ["Where was Bach born?", "What did Bach write?"]
    check_candidates(probes[:1], ["Bach", "Telemann"])
    kept = keep_nearest(model, tokenizer, [*probes, replace(probes[2], subject="Bach")], [DECOMPOSED])
    assert [probe.split for probe in kept] == ["forget", "forget", "retain", "retain"]


def test_the_terminal_shows_joiners_that_belong_to_a_spelling():
    for name in SPELLED:
        assert visible(name) == name
    for name, place in HIDDEN:
        assert f"\\u{ord(name[place]):04x}" in visible(name)
    assert visible("a\tb\nc\x1b\ue000\u0378") == "a\tb\nc\\u001b\\ue000\\u0378"


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["a" * 100_000], "has 100,000 characters; the limit is 200"),
        (["Ada", "\udce9"], "half of a surrogate pair"),
        ([""], "is empty"),
        ([" Ada"], "white space"),
        ([3], "must be text, not int"),
        (["x\u200b"] * 60, "and 10 more"),
    ],
)
def test_names_that_stand_in_no_list_keep_its_rules(names, part):
    with pytest.raises(InputError, match=part):
        check_names("neighbour", names)
