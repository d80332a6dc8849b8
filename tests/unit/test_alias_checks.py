"""Verification of aliases: shares and nearness by hand, in float64, and what is decided by them."""

import pytest
import torch

import rocr
from rocr import Concept, InputError
from rocr.edit.alias_checks import MAKER_QUESTIONS, check_proposals, maker_of, shares_of
from rocr.edit.aliases import LANGUAGES, check_languages, propose_aliases
from rocr.edit.automatic_redirects import unrelated_names
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind
from rocr.model.chat import render_chats
from rocr.model.generate import continue_greedily
from rocr.model.tokenizer import tokenize_prompt

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = 2


@pytest.fixture(scope="module")
def certain(make_model):
    """A tiny model that is sure of its next tokens."""
    model = make_model("Llama", initializer_range=0.1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def architecture(certain):
    return with_kind(find_architecture(certain), LAYER)


def test_shares_lie_between_unrelated_names_and_the_name():
    assert shares_of(-1.0, [-1.0, -2.0, -3.0, -0.5, -4.0], [-2.0, -4.0]) == [1.0, 0.5, 0.0, 1.25, -0.5]
    assert shares_of(-1.0, [-1.0], [-1.05, -1.1]) == [None], "the model says the same of other names"
    assert shares_of(-2.0, [-1.0, -3.0], [-1.0]) == [None, None]
    assert shares_of(-1.0, [-1.0], [-1.1 - 1e-9]) == [1.0]


@pytest.mark.parametrize("kind", ["person", "thing"])
def test_checks_are_those_by_hand(certain, architecture, tokenizer, kind):
    concept = Concept("Ada Byron", "auto", kind=kind)
    proposals = ["Augusta Ada Byron", "Ада", "Blaise Pascal"]
    unrelated = unrelated_names(kind, [concept])
    question = "Who is {}?" if kind == "person" else "What is {}?"
    names = [concept.name, *proposals, *unrelated]
    prompts = {name: render_chats(tokenizer, [question.format(name)])[0] for name in names}
    asked = tokenize_prompt(tokenizer, prompts[concept.name])
    answer = tokenizer.decode(continue_greedily(certain, tokenizer, [asked], 16)[0].tokens, skip_special_tokens=True)
    assert "Ada Byron" not in answer, "the answer of a random model is scored as a whole"
    exact = certain.double()
    try:
        means, states = [], []
        for name in names:
            begun = tokenize_prompt(tokenizer, prompts[name])
            whole = tokenize_prompt(tokenizer, prompts[name] + answer)
            assert whole[: len(begun)] == begun
            text = f"This text is about {name}."
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            last = max(i for i, (first, _) in enumerate(encoded["offset_mapping"]) if first < len(text) - 1)
            with torch.no_grad():
                logs = exact(torch.tensor([whole])).logits[0].log_softmax(-1)
                hidden = exact(torch.tensor([encoded["input_ids"]]), output_hidden_states=True).hidden_states
            rows = [float(logs[i - 1, token]) for i, token in enumerate(whole) if i >= len(begun)]
            means.append(sum(rows) / len(rows))
            states.append(hidden[LAYER + 1][0, last])
    finally:
        certain.float()
    lowest = sum(means[4:]) / len(means[4:])
    shares = [(mean - lowest) / (means[0] - lowest) for mean in means[1:4]]
    centred = torch.stack(states) - torch.stack(states).mean(dim=0)
    cosines = torch.nn.functional.cosine_similarity(centred[:1], centred, dim=1)
    near = [bool(cosines[i] > cosines[4:].max()) for i in (1, 2, 3)]
    found = check_proposals(architecture, tokenizer, concept, proposals, [concept], LAYER)
    assert [check.share for check in found] == pytest.approx(shares, rel=1e-3, abs=1e-3)
    assert [check.near for check in found] == near


def test_an_answer_with_the_name_is_scored_after_the_name(certain, architecture, tokenizer, monkeypatch):
    """The tokens of a long proposal, which the question holds, do not count."""
    said = "Well, Ada Byron wrote notes. Ada Byron did."
    monkeypatch.setattr("rocr.edit.alias_checks.first_words", lambda *_: [said])
    monkeypatch.setattr("rocr.edit.alias_checks.LEAST_KNOWN", -100)  # a random model knows no names
    concept, unrelated = Concept("Ada Byron", "auto"), unrelated_names("person", [Concept("Ada Byron", "auto")])
    means = []
    for name in ("Ada Byron", "the roses", *unrelated):
        (prompt,) = render_chats(tokenizer, [f"Who is {name}?"])
        begun = tokenize_prompt(tokenizer, f"{prompt}Well, {name}")
        whole = tokenize_prompt(tokenizer, f"{prompt}Well, {name} wrote notes. {name} did.")
        assert whole[: len(begun)] == begun
        with torch.no_grad():
            logs = certain(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        rows = [float(logs[i - 1, token]) for i, token in enumerate(whole) if i >= len(begun)]
        means.append(sum(rows) / len(rows))
    (found,) = check_proposals(architecture, tokenizer, concept, ["the roses"], [concept], LAYER)
    lowest = sum(means[2:]) / len(means[2:])
    assert found.share == pytest.approx((means[1] - lowest) / (means[0] - lowest), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("Ada  BYRON's.", "no", "no"), "Who wrote Notes?"),
        (("no", "It was Ada Byron!", "Ada Byron"), "Who founded Notes?"),
        (("no", "no", "the countess"), "Who made Notes?"),
        (("Ada Byrons", "Ada", "Byron, Ada"), None),
        (("", "", ""), None),
    ],
)
def test_a_related_thing_is_one_of_which_the_model_names_the_maker(monkeypatch, answers, expected):
    asked = []

    def answer(architecture, tokenizer, questions, chat):
        asked.extend(questions)
        return [*answers, "Ada Byron", "no", "no"]

    monkeypatch.setattr("rocr.edit.alias_checks.first_words", answer)
    found = maker_of(None, None, ["Notes", "Rain"], ["Ada Byron", "The Countess"], None)
    assert found == [expected, "Who wrote Rain?"]
    assert asked == [question.format(thing) for thing in ("Notes", "Rain") for question in MAKER_QUESTIONS]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"languages": ["Klingon"]}, "Unknown language 'Klingon'; the languages are Amharic, Arabic"),
        ({"languages": ["Greek", "Greek"]}, "A language is given twice: Greek, Greek"),
        ({"languages": "Greek"}, "languages must be a list of languages, not a single text: 'Greek'"),
        ({"least": 1.5}, "least must be a number from 0 to 1, not 1.5"),
        ({"least": "1"}, "least must be a number from 0 to 1, not '1'"),
        ({"redirect": "a\u200b"}, "ZERO WIDTH SPACE"),
        ({"redirect": "ADA"}, "The redirect 'ADA' is itself a name on the list: give another one"),
        ({"concepts": []}, "The list of concepts is empty"),
        ({"concepts": ["Ada"]}, "one of a list of rocr.Concept"),
    ],
)
def test_what_cannot_be_asked_is_refused(certain, tokenizer, given, words):
    with pytest.raises(InputError, match=words):
        propose_aliases(certain, tokenizer, **{"concepts": [Concept("Ada", "auto")], **given})
    check_languages(LANGUAGES)


def test_a_text_encoder_proposes_nothing(certain, tokenizer):
    with pytest.raises(InputError, match="Proposing aliases needs a language model"):
        rocr.propose_aliases(certain.model, tokenizer, [Concept("Ada", "auto")])
