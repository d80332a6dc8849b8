"""Names that an edit is likely to harm: how they are chosen, measured, asked about, reported and limited."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import transformers

import rocr
from rocr import Concept, EditConfig, Guards
from rocr.chat_settings import DEFAULT
from rocr.cli.console import Console
from rocr.cli.main import main
from rocr.cli.tables import show_harmed
from rocr.concepts import check_names, folded
from rocr.edit.controls import (
    FURTHER_TOKENS,
    MAX_CONTROLS,
    PER_CONCEPT,
    TAKEN,
    Control,
    choose_controls,
    load_names,
    name_at_start,
    taken_for_concepts,
)
from rocr.edit.guards import check_harm
from rocr.edit.harm import ANSWER_TOKENS, Harm, read_own_answers
from rocr.edit.measures import EditReport
from rocr.edit.retain_impact import read_retained_names
from rocr.edit.retained_keys import expected_keys
from rocr.keys.continuations import log_probabilities
from rocr.keys.name_states import read_name_states
from rocr.keys.variants import spelling_variants
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind
from rocr.model.generate import ask
from rocr.progress import silent
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
KING = [Concept("Stephen King", "Jane Austen", ("Stephen Edwin King",))]
CONFIG = EditConfig(layers=(1, 2), templates=("Who is {}?", "It is about {}."))
FREE = Guards(divergence=math.inf, distance=math.inf, relative_norm=math.inf, kept_answers=0.0)
KINDS = {"person", "company", "work", "place", "substance", "event"}


@pytest.fixture(scope="module")
def first(make_model):
    """A tiny model that is sure of its next tokens, as one with knowledge is; tests get copies."""
    model = make_model("Llama", initializer_range=0.1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def collected(first, tokenizer, texts):
    return rocr.collect_statistics(first, tokenizer, texts, [1, 2])


@pytest.fixture
def certain(first):
    return copy.deepcopy(first)


@pytest.fixture
def architecture(certain):
    return with_kind(find_architecture(certain), 1)


@pytest.fixture
def unlearn(certain, tokenizer, collected):
    def run(concepts=KING, guards=FREE, **more):
        return rocr.unlearn(certain, tokenizer, concepts, collected, CONFIG, guards=guards, **more)

    return run


def test_the_list_of_names_has_each_name_once_with_its_kind():
    kinds = load_names()
    assert len(kinds) >= 600 and len({folded(name) for name in kinds}) == len(kinds)
    check_names("name", kinds)
    counts = {kind: list(kinds.values()).count(kind) for kind in kinds.values()}
    assert counts.keys() == {"person", "company", "work", "place", "substance", "event"}
    assert counts["person"] > len(kinds) // 2 and min(counts.values()) >= 40
    firsts = [name.split()[0] for name, kind in kinds.items() if kind == "person"]
    assert all(firsts.count(word) >= 5 for word in ("Stephen", "John", "Michael", "George", "William", "Charles"))


def test_controls_share_a_word_or_are_nearest_and_are_no_names_of_the_edit(architecture, tokenizer):
    concepts = [*KING, Concept("Neil Armstrong", "Stephen Hawking"), Concept("Microsoft", "Toyota")]
    found = choose_controls(architecture, tokenizer, concepts, 1)
    kinds = load_names()
    assert {control.concept for control in found} == {concept.name for concept in concepts}
    assert len(found) <= 4 * len(concepts) and len({control.name for control in found}) == len(found)
    taken = {name for concept in concepts for name in (*concept.names, concept.redirect)}
    for control in found:
        assert control.name not in taken and control.listed == (control.name in kinds)
        assert control.kind == kinds.get(control.name, kinds.get(control.concept))
        first, *_, last = control.concept.split() * 2
        if control.reason in ("first word", "proposed"):
            assert control.name.split()[0] == first
        elif control.reason == "last word":
            assert control.name.split()[-1] == last
    reasons = {(control.concept, control.reason) for control in found}
    assert {("Stephen King", "first word"), ("Stephen King", "last word"), ("Neil Armstrong", "last word")} <= reasons
    assert {c.kind for c in found if (c.concept, c.reason) == ("Microsoft", "nearest")} == {"company"}
    assert [c.concept for c in found[:3]] == [concept.name for concept in concepts]  # the concepts take turns
    assert choose_controls(architecture, tokenizer, concepts, 1) == found


def test_listed_names_without_a_token_are_no_controls(architecture, tokenizer, monkeypatch):
    """As in a tokenizer without the letters of a name, which would stop the edit."""
    given = tokenizer("VX", add_special_tokens=False)["input_ids"]
    without = copy.deepcopy(tokenizer)
    tokenizes = type(without).__call__
    empty = {"input_ids": [], "attention_mask": [], "offset_mapping": []}

    def call(self, text, *arguments, **options):
        found = tokenizes(self, text, *arguments, **options)
        if self is without and isinstance(text, list):
            for i, each in enumerate(text):
                if each == "VX":
                    for key in found.keys() & empty.keys():
                        found[key][i] = []
        return found

    monkeypatch.setattr(type(without), "__call__", call)
    assert given and "VX" in load_names()
    read = []
    monkeypatch.setattr(
        "rocr.edit.controls.read_name_states", lambda *a, **k: read.extend(a[2]) or read_name_states(*a, **k)
    )
    choose_controls(architecture, without, [Concept("insulin", "a gardener", kind="thing")], 1, per_concept=900)
    assert read and "VX" not in read


def test_numbers_of_controls_are_bounded(architecture, tokenizer):
    concepts = [Concept(name, "a gardener") for name, kind in load_names().items() if kind == "person"][:120]
    found = choose_controls(architecture, tokenizer, concepts, 1, per_concept=2, most=50, propose=False)
    counts = [sum(control.concept == concept.name for control in found) for concept in concepts]
    assert len(found) == 50 and max(counts) <= 2
    assert "proposed" not in {control.reason for control in found}


def test_a_name_with_both_words_of_a_concept_is_taken_for_the_concept(architecture, tokenizer):
    concepts = [Concept("Martin King", "a gardener"), Concept("Lloyd Wright", "a gardener")]
    names = {control.name for control in choose_controls(architecture, tokenizer, concepts, 1, per_concept=40)}
    assert "Martin Scorsese" in names and "Larry King" in names
    assert not {"Martin Luther King Jr.", "Frank Lloyd Wright"} & names


def test_a_proposal_is_taken_for_the_concept_if_the_model_answers_with_its_name(architecture, tokenizer, certain):
    """The second concept has as alias what the model answers, at a probability above one half."""
    (answer,) = ask(certain, tokenizer, ["Who is Stephen Fry?"], 1, always=True)
    (row,) = log_probabilities(certain, [tokenizer("Who is Stephen Fry?")["input_ids"]], [()])[0]
    assert answer.strip() and row.max().exp() > TAKEN
    concepts = [*KING, Concept("Stephen Hawking", "a gardener", (answer.strip(),))]
    proposed = {0: ["Stephen Fry"], 1: ["Stephen Fry"]}
    assert taken_for_concepts(architecture, tokenizer, proposed, concepts, DEFAULT) == {(1, "Stephen Fry")}


def test_models_without_names_have_no_controls(model, tokenizer):
    assert choose_controls(with_kind(find_architecture(model), 1), tokenizer, KING, 1) == []
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    assert choose_controls(with_kind(find_architecture(encoder), 1), tokenizer, KING, 1) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Stephen Hawking was", "Stephen Hawking"),
        ("Stephen Hawking, the", "Stephen Hawking"),
        ("Stephen Jay Gould's book", "Stephen Jay Gould"),
        ("Stephen Hawk", None),  # the last word may be incomplete
        ("Stephen was", None),
        ("Stephen B. and", None),
        ("Stephen King Is The Best Writer of", None),
        ("Stephen R2D2 was", None),
    ],
)
def test_a_proposal_is_a_name_of_two_to_four_capitalised_words(text, name):
    assert name_at_start(text) == name


def test_an_unedited_model_keeps_its_own_answers_and_a_move_of_their_keys_alone_changes_them(certain, tokenizer):
    architecture = with_kind(find_architecture(certain), 2)
    own = read_own_answers(architecture, tokenizer, [("Stephen Hawking", None)], [False], DEFAULT)
    (prompt,), (answer,) = own.prompts, own.answers
    assert own.texts == ask(certain, tokenizer, ["Who is Stephen Hawking?"], ANSWER_TOKENS)
    (harm,) = own.harms(architecture)
    assert harm.kept == pytest.approx(1, abs=1e-4) and 0.1 <= harm.before <= 1
    with torch.no_grad():
        logits = certain(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None]).mean().exp()
    assert harm.before == pytest.approx(float(wanted), rel=1e-4)
    down, seen = certain.model.layers[1].mlp.down_proj, []
    with torch.no_grad():
        hook = down.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
        certain(torch.tensor([[*prompt, *answer]]))
        hook.remove()
        keys = seen[0].double()
        free = torch.linalg.svd(keys, full_matrices=True).Vh[len(keys) :]  # keys @ free.T is 0
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(len(down.weight), generator=generator)
        size = float(down.weight.norm() / left.norm())
        for right, moved in ((free[0], False), (keys[len(prompt) // 2] / keys[len(prompt) // 2].norm(), True)):
            change = size * left[:, None] * right.float()[None]
            down.weight += change
            (after,) = own.harms(architecture)
            down.weight -= change
            assert (after.kept == pytest.approx(1, abs=1e-3)) != moved


def test_a_namesake_whose_first_word_is_moved_is_found_named_and_reported(unlearn, certain):
    edit = unlearn()
    retained, harmed = edit.report.retained, edit.report.harmed
    assert not retained.given and retained.count == 1 + len(retained.controls)
    stephens = [name for name in retained.controls if name.startswith("Stephen ")]
    assert stephens and {*stephens} < {impact.name for impact in retained.moved if impact.share > 0.1}
    assert harmed and all(harm.name in retained.controls and harm.concept == "Stephen King" for harm in harmed)
    assert any(harm.name in stephens for harm in harmed)
    assert [harm.kept for harm in harmed] == sorted(harm.kept for harm in harmed) and harmed[-1].kept < 0.8
    written = json.loads(json.dumps(edit.report.to_json()))
    assert EditReport.from_json(written, 1) == edit.report
    del written["harmed"], written["neighbours"]["controls"]  # a file of an earlier version
    read = EditReport.from_json(written, 1)
    assert read.harmed == [] and read.retained == replace(retained, controls=[])
    written["harmed"] = [{"name": 1, "concept": None, "before": 1.0, "after": 1.0, "answer": ""}]
    with pytest.raises((TypeError, ValueError)):
        EditReport.from_json(written, 1)
    written["harmed"][0].update(name="Stephen Fry", before=0.0)
    with pytest.raises(ValueError, match="before is 0"):
        EditReport.from_json(written, 1)


def test_the_weights_are_those_of_an_edit_that_asks_nothing(unlearn, certain, weights_of):
    edit = unlearn()
    after = weights_of(certain)
    edit.revert(certain)
    silent = unlearn(ask=0)
    assert same_weights(weights_of(certain), after)
    assert silent.report.harmed == [] and silent.report.retained.controls


def test_given_names_are_asked_about_first(certain, tokenizer, collected):
    config, given = replace(CONFIG, retain_weight=0.0), ["Stephen Hawking", "the roses"]
    report = rocr.unlearn(certain, tokenizer, KING, collected, config, guards=FREE, retain=given).report
    assert report.retained.given and report.retained.controls == []
    assert {harm.name for harm in report.harmed} <= set(given)
    assert "Stephen Hawking" in {harm.name for harm in report.harmed}


def test_the_guard_refuses_below_its_limit_and_names_the_harmed(unlearn, certain, weights_of):
    before = weights_of(certain)
    with pytest.raises(
        rocr.GuardError, match=r"The edit harms .* below the limit of 95.0%. .*from 'Stephen King'.*'Stephen "
    ):
        unlearn(guards=replace(FREE, kept_answers=0.95))
    assert same_weights(weights_of(certain), before)
    (sentence,) = unlearn(guards=replace(FREE, kept_answers=0.95, force=True)).report.limits_passed
    assert "The edit harms" in sentence


def test_the_limit_holds_for_each_name():
    harms = [Harm("Stephen Hawking", None, 0.5, 0.1, "a"), Harm("Larry King", "Stephen King", 0.5, 0.4, "a")]
    assert check_harm(Guards(kept_answers=0.2), harms) == check_harm(Guards(), []) == []
    with pytest.raises(rocr.GuardError, match=r"harms Stephen Hawking: .* keeps 20.0% .*below it: 'Stephen Hawking'\."):
        check_harm(Guards(kept_answers=0.21), harms)
    with pytest.raises(rocr.GuardError, match="'Stephen Hawking', 'Larry King'"):
        check_harm(Guards(kept_answers=0.81), harms)


def test_the_terminal_names_the_harmed_and_says_nothing_without_them(capsys):
    show_harmed([], Console())
    assert capsys.readouterr() == ("", "")
    show_harmed([Harm("Stephen Hawking", "Stephen King", 0.612, 0.221, "a").to_json()], Console())
    shown = "".join(capsys.readouterr())
    assert "harmed: Stephen Hawking (answer's probability per token 0.61 to 0.22, by Stephen King)." in shown
    assert "--control" in shown and "--key-tokens last" in shown


def test_the_command_line_reports_harm_unless_it_asks_nothing(certain, tokenizer, texts, tmp_path, capsys):
    certain.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    concept = ("--concept", "Stephen King", "--redirect", "Jane Austen", "--layers", "1,2", "--force", "--save", "edit")
    given = ("unlearn", str(tmp_path / "model"), *concept, "--text", str(tmp_path / "text.txt"), "--retain-weight", "0")
    for more, harmed in ((), True), (("--no-answers",), False):
        out = tmp_path / str(harmed)
        assert main([*given, *more, "--out", str(out)]) == 0
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert ("harmed" in report) == harmed and report["neighbours"]["controls"]
        assert ("harmed: " in "".join(capsys.readouterr())) == harmed
        assert bool(rocr.Edit.load(out / "edit.safetensors").report.harmed) == harmed


def test_a_spelling_that_the_edit_redirects_is_no_control(unlearn, monkeypatch):
    """A tiny model proposes no such name by itself."""
    misspelt, other = spelling_variants(KING[0].names, None, CONFIG.seed)[1], "Stephen Kingsley"
    monkeypatch.setattr(rocr.edit.controls._Beginnings, "names", lambda *_: [[misspelt, other]])
    monkeypatch.setattr(rocr.edit.controls, "taken_for_concepts", lambda *_: set())
    controls = unlearn().report.retained.controls
    assert other in controls and misspelt not in controls


def test_a_proposal_on_the_list_is_a_control_although_it_is_spelt_like_a_concept(architecture, tokenizer, monkeypatch):
    config = CONFIG.for_concepts(1)
    assert config.variants == "spelling"
    misspelt = spelling_variants(KING[0].names, None, config.seed)[1]
    monkeypatch.setattr(rocr.edit.controls._Beginnings, "names", lambda *_: [[misspelt]])
    monkeypatch.setattr(rocr.edit.controls, "taken_for_concepts", lambda *_: set())
    for listed, reasons in ((True, ["proposed"]), (False, [])):
        kinds = load_names() | ({misspelt: "person"} if listed else {})
        with monkeypatch.context() as patched:
            patched.setattr(rocr.edit.controls, "load_names", lambda kinds=kinds: kinds)
            found = read_retained_names(architecture, tokenizer, KING, None, config, silent)
        assert [each.reason for each in found.controls if each.name == misspelt] == reasons


def test_each_token_that_the_model_writes_about_names_is_a_step(unlearn, monkeypatch):
    """A tiny model expects no capitalised word by itself."""
    monkeypatch.setattr(rocr.edit.controls, "_beginning_words", lambda row, _: iter(row.topk(2).indices.tolist()))
    steps = []
    unlearn(progress=steps.append)
    for part, total in (("proposed names", FURTHER_TOKENS + 2), ("answers about names", ANSWER_TOKENS)):
        own = [(step.done, step.total) for step in steps if step.stage == part]
        assert own == [(done, total) for done in range(1, total + 1)]


def test_a_control_is_what_it_says(architecture, tokenizer):
    found = choose_controls(architecture, tokenizer, KING, 1, propose=False)
    assert {control.kind for control in found} == {"person"}  # Burger King and The Lion King come after people
    assert any(control == Control(control.name, "Stephen King", "last word", "person") for control in found)


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [("Stephen King", None, {"person"}), ("Ada Byron", "person", {"person"}), ("Ada Byron", None, set(KINDS))],
)
def test_names_are_compared_with_a_concept_only_if_they_may_be_of_its_kind(
    architecture, tokenizer, monkeypatch, name, kind, found
):
    compared, read = [], rocr.edit.controls.read_name_states
    monkeypatch.setattr(
        rocr.edit.controls, "read_name_states", lambda *args, **more: compared.extend(args[2]) or read(*args, **more)
    )
    choose_controls(architecture, tokenizer, [Concept(name, "Jane Austen", kind=kind)], 1, propose=False)
    kinds = load_names()
    words = set(name.split())
    assert {kinds[each] for each in compared if each in kinds and not words & set(each.split())} == found


def test_the_update_retains_controls_and_no_redirect(unlearn, certain):
    """Whatever is asked; names that the caller gives are retained beside them, and no name at all is by itself."""
    edit = unlearn()
    assert {label.name for label in edit.retained} == set(edit.report.retained.controls) != set()
    assert {label.concepts for label in edit.retained} == {(0,)} and KING[0].redirect in {
        impact.name for impact in edit.report.retained.moved
    }
    edit.revert(certain)
    again = unlearn(ask=0)
    assert all(
        torch.equal(mine.factors.right, other.factors.right)
        for mine, other in zip(edit.updates, again.updates, strict=True)
    )
    again.revert(certain)
    given = unlearn(retain=["Grace Hopper"])
    owners = {label.name: label.concepts for label in given.retained}
    assert owners.pop("Grace Hopper") == () and owners.keys() == {label.name for label in edit.retained}
    assert given.report.retained.given and given.report.retained.count == 1 + len(owners)
    given.revert(certain)
    assert unlearn(retain=[]).retained == ()


def test_the_number_of_keys_that_an_edit_retains_is_expected_before(unlearn, tokenizer):
    """A plan knows the number of names, but not which."""
    found = expected_keys(tokenizer, KING, CONFIG, None)
    assert 0.5 * found < len(unlearn().retained) < 2 * found
    assert expected_keys(tokenizer, KING * 1000, CONFIG, None) == pytest.approx(MAX_CONTROLS / PER_CONCEPT * found, 0.1)
    more = expected_keys(tokenizer, KING, CONFIG, ["Grace Hopper"])
    assert found < more < 2 * found
    assert expected_keys(tokenizer, KING, CONFIG, []) == 0
    assert expected_keys(tokenizer, KING, replace(CONFIG, retain_weight=0.0), None) == 0


def test_controls_of_a_name_on_no_list_are_of_the_kind_that_its_concept_gives(architecture, tokenizer):
    person, thing = ([replace(KING[0], name="Stephen Kingly", kind=kind)] for kind in ("person", "thing"))
    for concepts, expected in ((person, {True}), (thing, {False})):
        found = choose_controls(architecture, tokenizer, concepts, 1, per_concept=8)
        assert {control.kind == "person" for control in found if control.reason == "nearest"} == expected
        assert {control.kind == "person" for control in found if not control.listed} <= expected
    kinds = {control.reason: control.kind for control in choose_controls(architecture, tokenizer, thing, 1)}
    assert kinds["first word"] == "person", "a listed name keeps its own kind"
