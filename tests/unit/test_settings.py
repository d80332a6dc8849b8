"""Every field of the settings of collecting, evaluating, attacking and guarding changes a number.

Each class has a table of its fields, and a test that none is missing from it.
"""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore

import rocr
from rocr import CollectOptions, Guards, collect_statistics
from rocr.evaluation import EvaluateOptions, Probe, evaluate
from rocr.evaluation.attacks.suite import AttackOptions, attack
from rocr.evaluation.forms import PromptStyle
from rocr.evaluation.lora_training import Training
from rocr.evaluation.measures import ChoiceQuestion, TextSample
from tests.support.models import same_weights

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
CUT = CollectOptions(length=32, batch_tokens=64)
DISTRACTORS = ("Rome", "a key", "rain")
PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London", DISTRACTORS),
    Probe("Ada Byron", "What did Ada Byron write?", "programs", DISTRACTORS),
    Probe("Ada Byron", "What did Ada Byron like?", "engines", DISTRACTORS),
]
OPEN = Guards(
    relative_norm=math.inf,
    surviving=-1.0,
    condition=math.inf,
    closed=-math.inf,
    distance=math.inf,
    divergence=math.inf,
    drift=math.inf,
    kept_answers=0.0,
)


@pytest.fixture
def collect(model, tokenizer, texts):
    def run(**options):
        return collect_statistics(model, tokenizer, texts, [1], dataclasses.replace(CUT, **options))

    return run


@pytest.fixture
def lengths(model):
    """The input tokens of every forward pass."""
    seen = []
    model.model.register_forward_pre_hook(
        lambda _module, _arguments, inputs: seen.append(inputs.get("input_ids").numel()), with_kwargs=True
    )
    return seen


def collects_fewer(collect, **_):
    assert (collect(tokens=100).tokens, collect().tokens) == (100, collect().tokens)
    assert collect().tokens > 100


def cuts_shorter(collect, **_):
    assert (collect().provenance.length, collect(length=16).provenance.length) == (32, 16)
    assert collect(length=16).tokens < collect().tokens, "the first token of each sequence is left out"


def runs_fewer_together(collect, model, **_):
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
    for most in (32, 128):
        seen.clear()
        collect(batch_tokens=most)
        assert max(seen) == most
    hook.remove()


def draws_another_text(model, tokenizer, **_):
    moments = [
        collect_statistics(model, tokenizer, None, [1], CollectOptions(tokens=50, seed=seed)).second_moment(1)
        for seed in (1, 2)
    ]
    assert not torch.equal(*moments)


def names_the_text(collect, **_):
    assert collect(text_sha256="0" * 64).text == "0" * 64 != collect().text


def estimates_the_end(model, tokenizer, texts, **_):
    totals = []
    for size in (None, 10**6):
        steps = []
        options = dataclasses.replace(CUT, text_bytes=size)
        collect_statistics(model, tokenizer, texts, [1], options, steps.append)
        totals.append(steps[0].total)
    assert totals[0] is None
    assert totals[1] > 10_000


def goes_on_from_a_file(model, tokenizer, texts, tmp_path, **_):
    def stop(_):
        raise KeyboardInterrupt

    options = dataclasses.replace(CUT, text_sha256="0" * 64, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(model, tokenizer, texts, [1], options, stop)
    assert (tmp_path / "checkpoint").exists()


def works_alone_in_a_group(collect, **_):
    alone = collect()
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        assert torch.equal(collect(distributed=False).second_moment(1), alone.second_moment(1))
        with pytest.raises(rocr.InputError, match="Process 1 of 2"):  # the other one is not there
            collect()
    finally:
        dist.destroy_process_group()


def opens_chats_otherwise(model, tokenizer, **_):
    moments = [
        collect_statistics(model, tokenizer, None, [1], CollectOptions(tokens=50, chat=chat)).second_moment(1)
        for chat in (rocr.ChatSettings(), rocr.ChatSettings(system="Answer in verse."))
    ]
    assert not torch.equal(*moments)


COLLECT = {
    "tokens": collects_fewer,
    "length": cuts_shorter,
    "batch_tokens": runs_fewer_together,
    "seed": draws_another_text,
    "text_sha256": names_the_text,
    "text_bytes": estimates_the_end,
    "checkpoint": goes_on_from_a_file,
    "distributed": works_alone_in_a_group,
    "chat": opens_chats_otherwise,
}


@pytest.fixture
def asked(model, tokenizer):
    def run(forms=("qa",), **options):
        return evaluate(model, tokenizer, PROBES, forms, options=EvaluateOptions(**options))

    return run


def scores(evaluation):
    return [item.score for item in evaluation.items]


def shuffles_options(asked, **_):
    assert len({str(scores(asked(("mcp",), seed=seed))) for seed in range(4)}) > 1


def asks_in_more_orders(asked, **_):
    assert len(asked(("mcp",), orders=3).items) == 3 * len(asked(("mcp",)).items)


def runs_shorter_batches(asked, lengths, **_):
    most = {}
    for budget in (1, 4096):
        lengths.clear()
        asked(token_budget=budget)
        most[budget] = len(lengths)
    assert most[1] > most[4096]


def writes_answers(asked, **_):
    assert "n-gram entropy" in asked(generate=True).measures
    assert asked().measures == {}


def reads_text(asked, tokenizer, texts, **_):
    text = TextSample.take(texts, tokenizer, 64, 32)
    assert asked(text=text).measures["perplexity"] > 1


def asks_choices(asked, **_):
    found = asked(utility=[ChoiceQuestion("What falls?", ("rain", "a key"), 0)]).measures["utility"]
    assert (found["questions"], found["chance"]) == (1, 0.5)


def keeps_a_journal(asked, tmp_path, **_):
    asked(journal=tmp_path / "journal")
    assert len((tmp_path / "journal").read_text().splitlines()) == 1 + len(PROBES)


def asks_in_another_style(asked, **_):
    assert scores(asked(style=PromptStyle(direct=True))) != scores(asked())


def asks_with_a_system_message(asked, **_):
    assert scores(asked()) != scores(asked(chat=rocr.ChatSettings(system="Answer in verse.")))


EVALUATE = {
    "seed": shuffles_options,
    "orders": asks_in_more_orders,
    "token_budget": runs_shorter_batches,
    "generate": writes_answers,
    "text": reads_text,
    "utility": asks_choices,
    "journal": keeps_a_journal,
    "style": asks_in_another_style,
    "chat": asks_with_a_system_message,
}


@pytest.fixture
def attacked(model, tokenizer):
    def run(name, forms=("qa",), **options):
        return attack(model, tokenizer, PROBES, [name], forms, options=AttackOptions(**options))

    return run


RELEARN = {"taught": 1, "epochs": (1,), "training": Training("learn", 1e-2, batch=4, warmup=0)}


def teaches_more(attacked, **_):
    pytest.importorskip("peft")
    counts = [len(attacked("relearn", **{**RELEARN, "taught": n})["relearn 1 epochs"].items) for n in (1, 2)]
    assert counts == [2, 1]


def trains_longer(attacked, **_):
    pytest.importorskip("peft")
    found = attacked("relearn", **{**RELEARN, "epochs": (1, 4)})
    assert scores(found["relearn 1 epochs"]) != scores(found["relearn 4 epochs"])


def trains_otherwise(attacked, **_):
    pytest.importorskip("peft")
    other = dataclasses.replace(RELEARN["training"], learning_rate=1e-4)
    found = [attacked("relearn", **{**RELEARN, "training": t}) for t in (RELEARN["training"], other)]
    assert scores(found[0]["relearn 1 epochs"]) != scores(found[1]["relearn 1 epochs"])


def shows_examples(attacked, **_):
    found = [attacked("examples", examples=count)["examples"] for count in (0, 1, 2)]
    assert len({str(scores(one)) for one in found}) == 3


def begins_otherwise(attacked, asked, **_):
    assert scores(attacked("prefixes", prefixes=("",))["prefixes"]) == scores(asked())
    assert scores(attacked("prefixes", prefixes=("Remember {}. ",))["prefixes"]) != scores(asked())


def asks_as_the_evaluation_does(attacked, **_):
    """Every attack: orders of options, and the style of prompts."""
    pytest.importorskip("peft")
    direct = EvaluateOptions(style=PromptStyle(direct=True))
    for name in ("relearn", "8-bit", "prefixes", "examples"):
        more = RELEARN if name == "relearn" else {}
        before = attacked(name, ("qa", "mcp"), **more)
        orders = attacked(name, ("qa", "mcp"), **more, evaluate=EvaluateOptions(orders=3))
        styled = attacked(name, ("qa", "mcp"), **more, evaluate=direct)
        for part in before:
            assert len(orders[part].select("mcp", "forget")) == 3 * len(before[part].select("mcp", "forget")), part
            assert scores(styled[part]) != scores(before[part]), part


ATTACK = {
    "taught": teaches_more,
    "epochs": trains_longer,
    "training": trains_otherwise,
    "examples": shows_examples,
    "prefixes": begins_otherwise,
    "evaluate": asks_as_the_evaluation_does,
}


@pytest.fixture
def guarded_edit(model, tokenizer, concepts, statistics):
    def run(guards):
        config = rocr.EditConfig(layers=(1, 2))
        return rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=guards)

    return run


def stops(error=rocr.GuardError, **limit):
    """The limit stops an edit that succeeds without it."""

    def check(guarded_edit, model, weights_of, **_):
        before = weights_of(model)
        with pytest.raises(error):
            guarded_edit(dataclasses.replace(OPEN, **limit))
        assert same_weights(weights_of(model), before)
        guarded_edit(OPEN).revert(model)

    return check


def goes_on(guarded_edit, **_):
    passed = guarded_edit(dataclasses.replace(OPEN, divergence=0.0, force=True)).report.limits_passed
    assert len(passed) == 1


def stops_an_encoder(tokenizer, concepts, texts, weights_of, **_):
    """Only text encoders have this limit, instead of that of divergence."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    statistics = rocr.collect_statistics(encoder, tokenizer, texts, [1])
    before, config = weights_of(encoder), rocr.EditConfig(layers=(1,))
    with pytest.raises(rocr.GuardError):
        rocr.unlearn(encoder, tokenizer, concepts, statistics, config, guards=dataclasses.replace(OPEN, drift=0.0))
    assert same_weights(weights_of(encoder), before)
    rocr.unlearn(encoder, tokenizer, concepts, statistics, config, guards=OPEN)


def stops_harm(tokenizer, texts, make_model, weights_of, **_):
    """Only a model that is sure of its answers has some to lose."""
    model = make_model("Llama", initializer_range=0.1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1])
    before, config = weights_of(model), rocr.EditConfig(layers=(1,))
    concepts = [rocr.Concept("Stephen King", "Jane Austen")]
    guards = dataclasses.replace(OPEN, kept_answers=1.0)
    with pytest.raises(rocr.GuardError, match="The edit harms"):
        rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=guards)
    assert same_weights(weights_of(model), before)
    rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=OPEN)


GUARDS = {
    "relative_norm": stops(relative_norm=1e-6),
    "surviving": stops(surviving=1.1),
    "condition": stops(condition=1.0),
    "closed": stops(closed=0.9999),
    "distance": stops(distance=-1.0),
    "divergence": stops(divergence=0.0),
    "concepts": stops(rocr.InputError, concepts=1),
    "force": goes_on,
    "drift": stops_an_encoder,
    "kept_answers": stops_harm,
}
TABLES = {CollectOptions: COLLECT, EvaluateOptions: EVALUATE, AttackOptions: ATTACK, Guards: GUARDS}


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_no_field_is_missing_from_its_table(kind):
    assert [field.name for field in dataclasses.fields(kind)] == list(TABLES[kind])


@pytest.mark.parametrize("field", COLLECT)
def test_a_field_of_collecting_has_an_effect(field, collect, model, tokenizer, texts, tmp_path):
    COLLECT[field](collect=collect, model=model, tokenizer=tokenizer, texts=texts, tmp_path=tmp_path)


@pytest.mark.parametrize("field", EVALUATE)
def test_a_field_of_evaluating_has_an_effect(field, asked, lengths, tokenizer, texts, tmp_path):
    EVALUATE[field](asked=asked, lengths=lengths, tokenizer=tokenizer, texts=texts, tmp_path=tmp_path)


@pytest.mark.parametrize("field", ATTACK)
def test_a_field_of_attacking_has_an_effect(field, attacked, asked):
    ATTACK[field](attacked=attacked, asked=asked)


@pytest.mark.parametrize("field", GUARDS)
def test_a_limit_has_an_effect(field, guarded_edit, model, weights_of, tokenizer, concepts, texts, make_model):
    GUARDS[field](
        guarded_edit=guarded_edit, model=model, weights_of=weights_of, tokenizer=tokenizer, concepts=concepts,
        texts=texts, make_model=make_model,
    )  # fmt: skip


def test_concepts_of_the_base_edit_count_towards_the_limit(guarded_edit, model, tokenizer, statistics):
    edit = guarded_edit(OPEN)
    edit.revert(model)
    more = [rocr.Concept("Grace Hopper", "a gardener")]
    guards = dataclasses.replace(OPEN, concepts=2)
    with pytest.raises(rocr.InputError, match="3 concepts, above the limit of 2"):
        rocr.unlearn(model, tokenizer, more, statistics, edit.config, guards=guards, base_edit=edit)
