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
from rocr.edit.automatic_redirects import CANDIDATES, INVENTED, candidates_of, kind_of, with_redirects
from rocr.edit.controls import load_names
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind
from rocr.model.chat import render_chats
from rocr.model.generate import continue_greedily
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
def test_candidates_are_of_the_kind_and_share_no_word(kind):
    concepts = [Concept("Stephen King", "auto"), Concept("The Empire", "Judy Garland", ("Apple",))]
    found, listed = candidates_of(kind, concepts), load_names()
    assert len(found) == len(set(found)) == CANDIDATES and found[-1] == INVENTED[kind] not in listed
    words = {"stephen", "king", "the", "empire", "apple"}
    for name in found[:-1]:
        assert (listed[name] == "person") == (kind == "person")
        assert not words & set(name.lower().split()) and name != "Judy Garland"


def test_kinds_are_given_listed_or_those_of_people():
    assert [kind_of(Concept(name, "auto")) for name in ("Microsoft", "Stephen King", "nobody")] == [
        "thing", "person", "person",
    ]  # fmt: skip
    assert kind_of(Concept("Stephen King", "auto", (), "thing")) == "thing"


def test_the_choice_makes_the_own_answer_least_probable(certain, architecture, tokenizer):
    chosen = with_redirects(architecture, tokenizer, OPEN)
    assert chosen[1] == OPEN[1]
    for concept, question in ((OPEN[0], "Who is {}?"), (OPEN[2], "What is {}?")):
        (asked,) = (
            tokenize_prompt(tokenizer, text) for text in render_chats(tokenizer, [question.format(concept.name)])
        )
        own = tokenizer.decode(continue_greedily(certain, tokenizer, [asked], 16)[0], skip_special_tokens=True)
        scores = {}
        for name in candidates_of(kind_of(concept), OPEN):
            (text,) = render_chats(tokenizer, [question.format(name)])
            prompt = tokenize_prompt(tokenizer, text)
            whole = tokenize_prompt(tokenizer, text + own.replace(concept.name, name))
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                logs = certain(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            rows = [float(logs[i - 1, token]) for i, token in enumerate(whole) if i >= len(prompt)]
            scores[name] = sum(rows) / len(rows)
        assert min(scores, key=scores.get) == next(each.redirect for each in chosen if each.name == concept.name)


def test_of_a_long_list_some_are_asked_about(architecture, tokenizer, monkeypatch):
    people = [Concept(name, "auto") for name in ("Stephen King", "Ada Byron", "Robert Downey", "Grace Quux")]
    monkeypatch.setattr(automatic_redirects, "MAX_ASKED", 2)
    asked = []
    first = automatic_redirects._ask
    monkeypatch.setattr(
        automatic_redirects, "_ask", lambda *given: asked.extend(c.name for c in given[2]) or first(*given)
    )
    found = [each.redirect for each in with_redirects(architecture, tokenizer, people)]
    assert asked == ["Stephen King", "Robert Downey"]
    assert set(found) <= set(candidates_of("person", people)) and found[1] == found[3]


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
    with pytest.raises(InputError, match='"auto" needs the answers of the model'):
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
