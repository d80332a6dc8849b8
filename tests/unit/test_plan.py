from dataclasses import replace

import pytest
from tokenizers import normalizers

import rocr
from rocr import Concept, EditConfig, InputError
from rocr.config import Template
from rocr.keys.plan import plan_keys
from tests.support.models import same_weights

TEMPLATES = ("Who is {}?", "It is about {}.", Template("Tell me about {}.", chat=True))
CONCEPTS = [
    Concept("Ada Byron", "Blaise Pascal", ("the countess", "Ada")),
    Concept("Robert Downey Jr.", "a gardener"),
]
NAMES = 4  # with the aliases


def config(**changes):
    return EditConfig(templates=TEMPLATES, variants="none", **changes)


def read_tokens(tokenizer, reading, group):
    """The text of each token that enters a group's mean."""
    entries = zip(reading.prompt_of, reading.position_of, reading.group_of, strict=True)
    return [tokenizer.decode([reading.prompts[p].tokens[position]]) for p, position, g in entries if g == group]


def texts(tokenizer, reading, group):
    pairs = zip(reading.prompt_of, reading.group_of, strict=True)
    return [tokenizer.decode(reading.prompts[prompt].tokens) for prompt, g in pairs if g == group]


@pytest.mark.parametrize(("keys_per_concept", "groups"), [("mean", NAMES), ("all", NAMES * len(TEMPLATES))])
def test_one_key_for_each_name_or_for_each_of_its_templates(tokenizer, keys_per_concept, groups):
    plan = plan_keys(tokenizer, CONCEPTS, config(key_tokens="last", keys_per_concept=keys_per_concept))
    assert plan.keys.groups == plan.targets.groups == len(plan.concept_of) == groups
    assert plan.current is None, "matched contexts: the current states are those where the keys are"
    assert plan.concept_of.count(0) == 3 * plan.concept_of.count(1), "the name and two aliases are of one concept"
    assert len(plan.keys.group_of) == len(plan.targets.group_of) == NAMES * len(TEMPLATES)
    for group in range(groups):
        assert len(texts(tokenizer, plan.keys, group)) == (len(TEMPLATES) if keys_per_concept == "mean" else 1)


def test_a_thing_is_asked_what_it_is_and_nothing_else_changes(tokenizer):
    settings = config(key_tokens="all", keys_per_concept="all", template_weight=0.5)
    person, thing = CONCEPTS[0], replace(CONCEPTS[1], kind="thing")
    plan = plan_keys(tokenizer, [person, thing], settings)
    for group, concept in enumerate(plan.concept_of):
        (key_text,), (target_text,) = texts(tokenizer, plan.keys, group), texts(tokenizer, plan.targets, group)
        beginning = key_text.removeprefix("<|user|>").split()[0]
        assert beginning in (("What", "It", "Tell") if concept else ("Who", "It", "Tell"))
        assert beginning in target_text, "the redirect is read in the template of its concept"
    before = {tokenizer.decode(prompt.tokens[: position + 1]) for prompt, position in read_templates(plan)}
    assert {"Who is", "What is", "It is about"} <= before
    alone = plan_keys(tokenizer, [thing], settings)
    assert alone.keys.prompts == [prompt for prompt in plan.keys.prompts if "Downey" in tokenizer.decode(prompt.tokens)]
    assert alone.rendered == plan.rendered == plan_keys(tokenizer, CONCEPTS, settings).rendered

    for kind in ("person", None):
        same = plan_keys(tokenizer, [replace(concept, kind=kind) for concept in CONCEPTS], settings)
        assert same == plan_keys(tokenizer, CONCEPTS, settings)
    assert plan != plan_keys(tokenizer, CONCEPTS, settings)


def read_templates(plan):
    """The prompts and positions at which the keys of the templates' own tokens are read."""
    reading = plan.template_keys
    return [(reading.prompts[i], at) for i, at in zip(reading.prompt_of, reading.position_of, strict=True)]


def test_keys_are_the_last_tokens_of_names(tokenizer):
    plan = plan_keys(tokenizer, CONCEPTS, config(key_tokens="last"))
    assert [read_tokens(tokenizer, plan.keys, group) for group in range(NAMES)] == [
        [" Byron"] * 3,
        ["ess"] * 3,
        [" Ada"] * 3,
        [".?", "..", ".."],
    ]
    assert [read_tokens(tokenizer, plan.targets, group) for group in range(NAMES)] == [
        [" Pascal"] * 3,
        [" Pascal"] * 3,
        [" Pascal"] * 3,
        ["er"] * 3,
    ]


def test_every_key_has_its_target_in_the_same_templates(tokenizer):
    plan = plan_keys(tokenizer, CONCEPTS, config(key_tokens="all", keys_per_concept="all"))
    for group, concept in enumerate(plan.concept_of):
        (key_text,), (target_text,) = texts(tokenizer, plan.keys, group), texts(tokenizer, plan.targets, group)
        name = next(name for name in CONCEPTS[concept].names if name in key_text)
        assert key_text.replace(name, CONCEPTS[concept].redirect) == target_text


def test_all_tokens_are_averaged_by_their_place_from_the_end(tokenizer):
    concept = Concept("Downey Jr.", "a gardener")
    plan = plan_keys(
        tokenizer, [concept], EditConfig(templates=("Who is {}?", "{}?"), key_tokens="all", variants="none")
    )
    assert [read_tokens(tokenizer, plan.keys, group) for group in range(plan.keys.groups)] == [
        [".?", ".?"],
        [" Jr", " Jr"],
        # At the start of a text the name is split otherwise, and its first token "Down" is no key.
        [" Downey", "ey"],
    ]
    assert texts(tokenizer, plan.keys, 0) == ["Who is Downey Jr.?", "Downey Jr.?"]


def test_how_far_the_tokens_of_a_name_are_moved(tokenizer):
    concepts = [Concept("Robert Downey Jr.", "a gardener"), Concept("Harry, Duke", "a gardener")]
    plans = {
        schedule: plan_keys(
            tokenizer, concepts, EditConfig(templates=("Who is {}?",), token_schedule=schedule, variants="none")
        )
        for schedule in ("ramp", "full")
    }
    words = [read_tokens(tokenizer, plans["ramp"].keys, group)[0] for group in range(plans["ramp"].keys.groups)]
    sizes = [plans["ramp"].concept_of.count(concept) for concept in (0, 1)]
    assert "," not in "".join(words)
    expected = [((size - i) / size) ** 0.5 for size in sizes for i in range(size)]
    assert plans["ramp"].distance_shares == pytest.approx(expected)
    assert plans["full"].distance_shares == [1.0] * sum(sizes)
    last = EditConfig(templates=("Who is {}?",), key_tokens="last")
    assert plan_keys(tokenizer, concepts, last).distance_shares == [1.0, 1.0]


def test_each_template_token_before_a_name_is_read_once(make_tokenizer):
    tokenizer = make_tokenizer(start=True)
    templates = ("Who is {}?", "Who was {}?", "{}?")
    config = EditConfig(templates=templates, template_weight=0.1)
    reading = plan_keys(tokenizer, CONCEPTS, config).template_keys
    before = [
        tokenizer.decode(reading.prompts[prompt].tokens[1 : position + 1])
        for prompt, position in zip(reading.prompt_of, reading.position_of, strict=True)
    ]
    assert len(before) == len(set(before)) == reading.groups
    assert {"Who", "Who is", "Who was"} <= {text.strip() for text in before}
    assert not any(name.split()[0] in text for concept in CONCEPTS for name in concept.names for text in before)
    for without in (EditConfig(templates=("{}?",), template_weight=0.1), EditConfig(templates=templates)):
        plan = plan_keys(tokenizer, CONCEPTS, without)
        assert plan.template_keys is None, "the first token is an attention sink, which is never read"


def test_counts_of_all_tokens(tokenizer):
    last, mean, every = (
        plan_keys(tokenizer, CONCEPTS[1:], config(key_tokens=key_tokens, keys_per_concept=keys)).keys
        for key_tokens, keys in (("last", "mean"), ("all", "mean"), ("all", "all"))
    )
    assert last.groups == 1
    assert mean.groups == max(len(set(prompt.name)) for prompt in mean.prompts)
    assert every.groups == sum(len(prompt.name) for prompt in every.prompts) == len(mean.group_of)
    assert sorted(set(mean.group_of)) == list(range(mean.groups))


def test_a_prompt_that_is_read_in_several_places_runs_once(tokenizer):
    plan = plan_keys(tokenizer, CONCEPTS, config(key_tokens="all", keys_per_concept="all"))
    assert len(plan.keys.prompts) == len(set(plan.keys.prompts)) == NAMES * len(TEMPLATES)
    assert len(plan.targets.prompts) == 2 * len(TEMPLATES), "three names share one redirect"


def test_official_contexts(tokenizer):
    plan = plan_keys(tokenizer, CONCEPTS, EditConfig.official())
    assert plan.keys.groups == NAMES
    assert plan.current is not None
    for group, name in enumerate(name for concept in CONCEPTS for name in concept.names):
        redirect = CONCEPTS[plan.concept_of[group]].redirect
        chats = texts(tokenizer, plan.keys, group)
        assert len(chats) == 6
        assert all(f"{name}.<|end|><|assistant|>Answer:" in chat for chat in chats)
        assert set(texts(tokenizer, plan.current, group)) == {f"{name}."}
        assert set(texts(tokenizer, plan.targets, group)) == {f"<|user|>{redirect}.<|end|><|assistant|>Answer:"}
        key, state = (set(read_tokens(tokenizer, reading, group)) for reading in (plan.keys, plan.current))
        assert {text.strip() for text in key} == {text.strip() for text in state}


def test_official_state_of_a_name_that_is_the_first_token(tokenizer):
    plan = plan_keys(tokenizer, [Concept("x", "Blaise Pascal")], EditConfig.official())
    assert read_tokens(tokenizer, plan.current, 0) == ["x"] * 6


def test_a_target_is_never_read_at_the_start_of_a_text(tokenizer, make_tokenizer):
    both = EditConfig(templates=("{}?", "Who is {}?"), key_tokens="last")
    concepts = [Concept("Robert Downey Jr.", "x"), Concept("Ada Byron", "Blaise Pascal")]
    plan = plan_keys(tokenizer, concepts, both)
    assert min(plan.targets.position_of) > 0
    sink, other = plan.concept_of.index(0), plan.concept_of.index(1)
    assert texts(tokenizer, plan.targets, sink) == ["Who is x?"], "the other template is left out for this target"
    assert texts(tokenizer, plan.keys, sink) == ["Who is Robert Downey Jr.?"]
    assert len(texts(tokenizer, plan.targets, other)) == 2, "and for no other"
    alone = EditConfig(templates=("{}?",), key_tokens="last")
    with pytest.raises(InputError, match="'x': the redirect is a single token at the very start of every template"):
        plan_keys(tokenizer, concepts, alone)
    assert plan_keys(make_tokenizer(start=True), concepts, alone).keys.groups == 2, "a BOS is the sink instead"


def test_a_name_and_a_redirect_without_a_template_in_common_are_refused(tokenizer):
    config = EditConfig(templates=("{}?", "{} is"), variants="none")
    with pytest.raises(InputError, match="'x': the redirect is a single token"):
        plan_keys(tokenizer, [Concept("Ada Byron", "x")], config)


def test_the_official_target_is_read_in_the_first_template_where_it_is_no_sink(tokenizer):
    config = EditConfig(**{**vars(EditConfig.official()), "templates": ("{}.", "About {}.", "Who is {}?")})
    plan = plan_keys(tokenizer, [Concept("Ada Byron", "x")], config)
    assert set(texts(tokenizer, plan.targets, 0)) == {"About x."}
    assert len(texts(tokenizer, plan.keys, 0)) == 3


def test_names_without_any_key_are_named(tokenizer, make_tokenizer):
    config = EditConfig(templates=("{}?", "{} is"), variants="none")
    concepts = [Concept("x", "y"), Concept("Ada Byron", "y"), Concept("z", "y")]
    with pytest.raises(InputError, match=r"'x', 'z': .* single token at the very start of every template"):
        plan_keys(tokenizer, concepts, config)
    assert plan_keys(make_tokenizer(start=True), concepts, config).keys.groups >= 3, "a BOS is the sink instead"
    assert plan_keys(tokenizer, concepts, EditConfig(templates=("{}?", "Who is {}?"))).keys.groups >= 3


def test_braces_in_a_name_are_plain_text(tokenizer):
    plan = plan_keys(tokenizer, [Concept("Ada {} {0}", "Blaise {name}")], config(keys_per_concept="all"))
    assert texts(tokenizer, plan.keys, 0) == ["Who is Ada {} {0}?"]
    assert texts(tokenizer, plan.targets, 0) == ["Who is Blaise {name}?"]


LONG = "Ada Byron of a name that goes on and on and on and on and on"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["GPT-2", "Llama"], indirect=True)
@pytest.mark.parametrize("contexts", ["matched", "official"])
def test_names_longer_than_the_models_positions_are_refused(family, make_model, tokenizer, texts, weights_of, contexts):
    positions = {"GPT-2": "n_positions", "Llama": "max_position_embeddings"}[family]
    model = make_model(family, **{positions: 24})
    settings = EditConfig(templates=("Who is {}?",), layers=(1,), contexts=contexts, variants="none")
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1])
    before = weights_of(model)

    def unlearn(name, redirect, retain=None):
        concepts = [Concept(name, redirect)]
        return rocr.unlearn(
            model, tokenizer, concepts, statistics, settings, guards=rocr.Guards(force=True), retain=retain
        )

    for arguments in ((LONG, "Pascal"), ("Ada Byron", LONG), ("Ada Byron", "Pascal", [LONG])):
        with pytest.raises(InputError, match=rf"'{LONG}' ends at token \d+ of a template, .* has 24 positions"):
            unlearn(*arguments)
        assert same_weights(weights_of(model), before)
    unlearn("Ada Byron", "Pascal")


@pytest.mark.parametrize("variants", ["none", "spelling"])
def test_a_redirect_that_the_tokenizer_reads_as_the_name_is_refused(model, make_tokenizer, texts, variants):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    statistics = rocr.collect_statistics(model, tokenizer, texts, layers=(1,))
    concepts = [CONCEPTS[1], Concept("Ada Byron", "Ad\u00e0 Byron")]
    with pytest.raises(InputError, match=r"the same tokens: 'Ada Byron' and 'Ad\u00e0 Byron'\. The model cannot"):
        rocr.unlearn(model, tokenizer, concepts, statistics, replace(config(layers=(1,)), variants=variants))


@pytest.mark.parametrize("measure", ["each", "once"])
def test_a_redirect_that_a_name_begins_with(model, tokenizer, texts, measure):
    """The first token of the name is the same in both: its residual is zero."""
    statistics = rocr.collect_statistics(model, tokenizer, texts, layers=(1, 3))
    plan = plan_keys(tokenizer, [Concept("Ada Byron", "Ada")], config())
    plan.check_tokens_differ([Concept("Ada Byron", "Ada")])
    edit = rocr.unlearn(
        model, tokenizer, [Concept("Ada Byron", "Ada")], statistics, config(layers=(1, 3), measure=measure)
    )
    assert 0 < edit.report.distance[0] < 1
    assert all(0 < layer.closed[0] < 1 for layer in edit.report.layers)
