import json

import pytest

import rocr
from rocr import InputError, Probe
from rocr.cli.redirects import near_ties
from rocr.evaluation import choose_redirects, evaluate
from rocr.evaluation.redirects import RedirectChoice

PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London", ("Rome", "Oslo"), cloze="Ada Byron was born in ___."),
    Probe("Ada Byron", "What did Ada Byron write?", "notes", ("songs", "a key")),
    Probe("Ada Byron", "Who was the first to write for an engine?", "a countess", ("rain", "roses")),
    Probe("Robert Downey Jr.", "Where was Robert Downey Jr. born?", "Oslo", ("Rome", "London")),
]
AMONG = ("Blaise Pascal", "a gardener", "Æsop")


def left_by_hand(model, tokenizer, redirect):
    """Mean over forms of what a redirect leaves of the first two questions' scores, above chance."""

    def above_chance(name):
        asked = [
            Probe("Ada Byron", f"Where was {name} born?", "London", ("Rome", "Oslo"), cloze=f"{name} was born in ___."),
            Probe("Ada Byron", f"What did {name} write?", "notes", ("songs", "a key")),
        ]
        found = evaluate(model, tokenizer, asked, ("qa", "fb", "mcp"))
        chance = {"qa": 0.0, "fb": 0.0, "mcp": 1 / 3}
        return [found.form_score(form, "forget").score - guess for form, guess in chance.items()]

    pairs = zip(above_chance(redirect), above_chance("Ada Byron"), strict=True)
    return sum(max(left, 0.0) / max(known, 0.05) for left, known in pairs) / 3


def test_the_redirect_is_the_one_whose_own_answers_are_right_the_least(model, tokenizer, weights_of):
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    ada, robert = choose_redirects(model, tokenizer, PROBES, AMONG)
    assert (ada.questions, robert.questions) == (2, 1)
    expected = {name: left_by_hand(model, tokenizer, name) for name in AMONG}
    assert ada.left == pytest.approx(expected, rel=1e-4)
    assert ada.concept == rocr.Concept("Ada Byron", min(expected, key=expected.get))
    assert robert.concept.redirect == min(robert.left, key=robert.left.get)
    assert all((weight == before[name]).all() for name, weight in weights_of(model).items())


@pytest.mark.parametrize(
    ("probes", "among", "words"),
    [
        (PROBES, AMONG[:1], "two or more different redirects, not 'Blaise Pascal'"),
        (PROBES, ("rain", "Rain"), "two or more different redirects, not 'rain', 'Rain'"),
        (PROBES, ("rain", "ada  byron"), "is itself a target|the concept itself"),
        (PROBES, ("rain", "ro\u200bses"), "ZERO WIDTH SPACE"),
        (PROBES[2:], AMONG, "No question contains the name of 'Ada Byron'"),
        ([], AMONG, "No question contains the name of any subject"),
    ],
    ids=["one", "the same", "a subject", "invisible", "no name", "no probes"],
)
def test_what_cannot_be_chosen_from_is_refused(model, tokenizer, probes, among, words):
    with pytest.raises(InputError, match=words):
        choose_redirects(model, tokenizer, probes, among)


def test_the_command_writes_a_list_for_unlearn(files, command, tmp_path):
    (tmp_path / "probes.jsonl").write_text(
        "".join(
            json.dumps({"subject": p.subject, "query": p.query, "answer": p.answer, "distractors": p.distractors})
            + "\n"
            for p in PROBES
        ),
        encoding="utf-8",
    )
    out = tmp_path / "people.jsonl"
    arguments = ("redirects", files.model, "--probes", tmp_path / "probes.jsonl", "--among", *AMONG, "--out", out)
    done = command(*arguments, "--targets", "Ada Byron", "--json")
    assert done.code == 0, done.errors
    document = json.loads(done.output)
    (concept,) = rocr.load_concepts(out)
    assert document["concepts"] == [
        {"name": "Ada Byron", "redirect": concept.redirect, "left": document["concepts"][0]["left"], "questions": 2}
    ]
    assert concept.redirect == min(AMONG, key=document["concepts"][0]["left"].get)
    plan = command("unlearn", files.model, out, "--statistics", files.statistics, "--out", tmp_path / "o", "--dry-run")
    assert plan.code == 0, plan.errors
    done = command(*arguments)
    assert done.code == 2 and "exists" in done.errors
    done = command(*arguments[:-1], tmp_path / "other", "--targets", "Nobody")
    assert done.code == 2 and not (tmp_path / "other").exists()


def test_a_near_tie_and_a_bad_choice_are_said():
    def choice(name, **left):
        return RedirectChoice(rocr.Concept(name, min(left, key=left.get)), left, 3)

    assert near_ties([choice("Ada Byron", rain=0.1, roses=0.2)]) == []
    ties = near_ties([choice("Ada Byron", rain=0.10, roses=0.14, keys=0.9), choice("Æsop", rain=0.7, roses=0.9)])
    assert len(ties) == 2 and ties[0].endswith("Ada Byron: rain 0.100, roses 0.140.") and "Æsop" not in ties[0]
    assert "Every candidate leaves more than 50%" in ties[1] and "Æsop (0.70)" in ties[1]
