"""Redirects that nobody has to choose: the candidates, the choice against one by hand, and edits with it."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

import rocr
from rocr import Concept, EditConfig, Guards, InputError
from rocr.cli.main import main
from rocr.edit import automatic_redirects
from rocr.edit.automatic_redirects import (
    BEGINNINGS,
    CANDIDATES,
    INVENTED,
    UNRELATED,
    candidates_of,
    in_common,
    kind_of,
    unrelated_names,
    with_redirects,
)
from rocr.edit.controls import load_names
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind
from rocr.model.tokenizer import tokenize_prompt
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
OPEN = [Concept("Stephen King", "auto"), Concept("Ada Byron", "the roses"), Concept("Microsoft", "auto", (), "thing")]
CONFIG = EditConfig(layers=(1, 2), templates=("Who is {}?", "It is about {}."))
FREE = Guards(divergence=math.inf, distance=math.inf, relative_norm=math.inf, kept_answers=0.0)


@pytest.fixture(scope="module")
def certain(make_model):
    """A tiny model that is sure of its next tokens; tests that edit it get a copy."""
    model = make_model("Llama", initializer_range=0.1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def architecture(certain):
    return with_kind(find_architecture(certain), 1)


@pytest.mark.parametrize("kind", ["person", "thing"])
def test_candidates_and_unrelated_names_share_no_word_with_a_concept(kind):
    first, second, *more = CANDIDATES[kind]
    concepts = [Concept(f"The {first.split()[-1]}", "auto"), Concept("Stephen King", "Judy Garland", ("Apple",))]
    assert candidates_of(kind, concepts) == [second, *more]
    everything = [Concept(f"A {name}", "auto") for name in CANDIDATES[kind]]
    assert candidates_of(kind, everything) == [INVENTED[kind]]
    found, listed = unrelated_names(kind, concepts), load_names()
    assert len(found) == len(set(found)) == UNRELATED
    words = {"stephen", "king", "the", "apple"}
    for name in found:
        assert (listed[name] == "person") == (kind == "person")
        assert not words & set(name.lower().split()) and name != "Judy Garland"


def test_kinds_are_given_listed_or_those_of_people():
    assert [kind_of(Concept(name, "auto")) for name in ("Microsoft", "Stephen King", "nobody")] == [
        "thing", "person", "person",
    ]  # fmt: skip
    assert kind_of(Concept("Stephen King", "auto", (), "thing")) == "thing"


def test_the_choice_has_least_in_common_with_the_concept(certain, architecture, tokenizer):
    """Sums of the smaller probability of each next token, by passes of one sentence in float64."""

    @torch.no_grad()
    def predictions(name, kind):
        sentences = (tokenize_prompt(tokenizer, beginning.format(name)) for beginning in BEGINNINGS[kind])
        return torch.stack([certain(torch.tensor([each])).logits[0, -1].double().softmax(-1) for each in sentences])

    chosen = with_redirects(architecture, tokenizer, OPEN)
    assert chosen[1] == OPEN[1]
    for concept in (chosen[0], chosen[2]):
        kind = kind_of(concept)
        own = predictions(concept.name, kind)
        common = {
            name: float(torch.minimum(own, predictions(name, kind)).sum(dim=1).mean())
            for name in candidates_of(kind, OPEN)
        }
        assert len(set(common.values())) > 1
        assert concept.redirect == min(common, key=common.get)


def test_predictions_have_all_in_common_with_themselves_and_nothing_with_others():
    one, other = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    assert in_common(one, one) == 1.0
    assert in_common(one, other) == 0.25


def test_of_a_long_list_some_are_compared_and_the_others_take_turns(architecture, tokenizer, monkeypatch):
    people = [Concept(name, "auto") for name in ("Stephen King", "Ada Byron", "Robert Downey", "Grace Quux")]
    monkeypatch.setattr(automatic_redirects, "MAX_ASKED", 2)
    steps = []
    found = [each.redirect for each in with_redirects(architecture, tokenizer, people, steps.append)]
    candidates = candidates_of("person", people)
    assert [step.done for step in steps] == list(range(1, len(candidates) + 3))
    assert {step.total for step in steps} == {len(candidates) + 2}
    assert set(found) <= set(candidates) and [found[1], found[3]] == candidates[:2]


def test_an_edit_has_the_chosen_redirects(certain, architecture, tokenizer, texts):
    statistics = rocr.collect_statistics(copy.deepcopy(certain), tokenizer, texts, [1, 2])
    edits, models = [], [copy.deepcopy(certain) for _ in range(2)]
    chosen = with_redirects(architecture, tokenizer, OPEN)
    for model, concepts in zip(models, (OPEN, chosen), strict=True):
        edits.append(rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG, guards=FREE, retain=[]))
    assert edits[0].concepts == edits[1].concepts == chosen and "auto" not in {each.redirect for each in chosen}
    assert same_weights(*({name: p.detach() for name, p in model.named_parameters()} for model in models))


def test_a_model_without_answers_refuses(architecture, tokenizer):
    silent = replace(architecture, kind=replace(architecture.kind, writes_text=False))
    assert with_redirects(silent, tokenizer, OPEN[1:2]) == OPEN[1:2]
    with pytest.raises(InputError, match='"auto" needs the predictions of the model'):
        with_redirects(silent, tokenizer, OPEN)


def test_the_command_takes_names_alone(certain, tokenizer, texts, tmp_path, capsys):
    certain.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "names.txt").write_text("Stephen King\nAda Byron -> the roses\n", encoding="utf-8")
    given = ("unlearn", tmp_path / "model", tmp_path / "names.txt", "--text", tmp_path / "text.txt", "--layers", "1,2")
    assert main([*map(str, given), "--out", str(tmp_path / "out")]) == 2
    assert "--redirect auto" in capsys.readouterr().err
    more = ("--redirect", "auto", "--force", "--save", "edit", "--out", tmp_path / "out", "--json")
    assert main([*map(str, given), *map(str, more)]) == 0
    report = json.loads(capsys.readouterr().out)
    redirects = {concept["name"]: concept["redirect"] for concept in report["concepts"]}
    assert redirects["Ada Byron"] == "the roses" and redirects["Stephen King"] in candidates_of(
        "person", [Concept("Stephen King", "auto"), Concept("Ada Byron", "the roses")]
    )
    assert [each.redirect for each in rocr.Edit.load(tmp_path / "out" / "edit.safetensors").concepts] == list(
        redirects.values()
    )
