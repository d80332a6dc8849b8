import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import rocr
from rocr import Concept, EditConfig, InputError
from rocr.edit.guards import Guards
from rocr.model.architecture import find_architecture
from rocr.model.causality import PROBE_TOKENS
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = EditConfig(key_tokens="last", templates=("Who is {}?",), ridge=0.01)
NEARLY_NOTHING = 1e-6  # a ridge, in units of ordinary keys
NORMS_BEHIND = {"Gemma2", "Gemma3", "OLMo2"}  # families that normalise the MLP's output, which no edit passes exactly
PLAIN = ["Llama", "GPT-2", "GPT-J", "GPT-NeoX", "Phi3", "Qwen3"]


def state(model, tokenizer, text, name, layer):
    """Output of a decoder layer at the last token of a name, from a plain forward pass."""
    encoded = tokenizer(text)
    position = encoded.char_to_token(text.index(name) + len(name) - 1)
    found = []

    def keep(_module, _inputs, output):
        found.append((output if isinstance(output, torch.Tensor) else output[0])[0, position].double())

    handle = find_architecture(model).layers[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([encoded["input_ids"]]))
    handle.remove()
    return found[0]


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits


def weight_change(model, original, layer):
    new, old = (find_architecture(m).down_projection(layer).weight.double() for m in (model, original))
    return new - old


def test_every_family_is_edited(family, make_model, tokenizer, texts, concepts, weights_of, tmp_path):
    model = make_model(family)
    original, before = copy.deepcopy(model), weights_of(model)
    statistics = rocr.collect_statistics(model, tokenizer, texts)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, LAST)

    assert edit.layers == (1, 3)
    assert max(edit.report.distance) < (0.5 if family in NORMS_BEHIND else 0.05)
    text = "Who is Robert Downey Jr.?"
    target = state(original, tokenizer, "Who is a gardener?", "a gardener", 3)
    old, new = (state(m, tokenizer, text, "Robert Downey Jr.", 3) for m in (original, model))
    assert edit.report.distance[1] == pytest.approx(float((new - target).norm() / (old - target).norm()), abs=1e-4)
    edited_logits = logits(model, tokenizer, text)
    assert (edited_logits - logits(original, tokenizer, text)).abs().max() > 0.1
    changed = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert changed == {update.parameter for update in edit.updates}

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokenizer, text), edited_logits)

    edit.revert(model)
    assert same_weights(weights_of(model), before)
    assert torch.equal(logits(model, tokenizer, text), logits(original, tokenizer, text))


@pytest.mark.parametrize(("family", "count"), [("Llama", 1), *((family, 3) for family in PLAIN)])
def test_keys_reach_their_targets_as_the_ridge_goes_to_zero(family, make_model, tokenizer, texts, count):
    original = make_model(family)
    statistics = rocr.collect_statistics(original, tokenizer, texts, [2])
    concepts = [Concept("Ada Byron", "Blaise Pascal"), Concept("Robert Downey Jr.", "rain"), Concept("Æsop", "a key")]
    distances = []
    for ridge in (10.0, 0.1, NEARLY_NOTHING):
        model = copy.deepcopy(original)
        config = EditConfig(layers=[2], key_tokens="last", templates=("Who is {}?",), ridge=ridge, least_closed=0.0)
        edit = rocr.unlearn(model, tokenizer, concepts[:count], statistics, config, guards=Guards(force=True))
        shares = []
        for concept in concepts[:count]:
            target = state(original, tokenizer, f"Who is {concept.redirect}?", concept.redirect, 2)
            old, new = (state(m, tokenizer, f"Who is {concept.name}?", concept.name, 2) for m in (original, model))
            shares.append(float((new - target).norm() / (old - target).norm()))
        assert edit.report.distance == pytest.approx(shares, abs=1e-4)
        distances.append(max(shares))
    assert distances[0] > 0.2
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3


@pytest.mark.parametrize("keys_per_concept", ["mean", "all"])
@pytest.mark.parametrize("key_tokens", ["last", "all"])
def test_the_update_has_the_rank_of_its_keys(model, tokenizer, statistics, concepts, key_tokens, keys_per_concept):
    original = copy.deepcopy(model)
    templates = ("Who is {}?", "It is about {}.")
    config = EditConfig(
        key_tokens=key_tokens, keys_per_concept=keys_per_concept, templates=templates, token_schedule="full"
    )
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, config)
    for update in edit.updates:
        change = weight_change(model, original, update.layer)
        n = len(edit.concept_of)
        assert update.keys.shape[0] == update.residuals.shape[0] == n
        assert torch.linalg.matrix_rank(change, atol=1e-4 * float(change.norm())) == min(n, 32)
        torch.testing.assert_close(
            update.factors.left.double() @ update.factors.right.double(), change, rtol=0, atol=1e-6
        )


def test_protected_directions_keep_their_outputs(model, tokenizer, statistics, concepts):
    original = copy.deepcopy(model)
    changes = {}
    for method in ("whitened", "projected"):
        edited = copy.deepcopy(original)
        config = EditConfig(layers=[1, 2], method=method, threshold=0.2, relative_threshold=True, least_closed=0.0)
        rocr.unlearn(edited, tokenizer, concepts, statistics, config)
        changes[method] = [weight_change(edited, original, layer) for layer in (1, 2)]
    for layer, projected, whitened in zip((1, 2), changes["projected"], changes["whitened"], strict=True):
        moment = statistics.second_moment(layer).double()
        values, vectors = torch.linalg.eigh(moment)
        protected = vectors[:, values >= 0.2 * moment.diagonal().mean()]
        assert 0 < protected.shape[1] < len(moment)
        assert (projected @ protected).norm() < 1e-4 * projected.norm()
        assert (whitened @ protected).norm() > 1e-2 * whitened.norm(), "which is not so without the projector"


def test_template_tokens_before_a_name_are_protected(make_model, make_tokenizer, texts):
    model, tokenizer = make_model("Llama"), make_tokenizer()
    statistics = rocr.collect_statistics(model, tokenizer, texts, [2])
    concepts = [Concept("Ada Byron", "rain"), Concept("Robert Downey Jr.", "a key")]
    before, moved = state(model, tokenizer, "Tell me about rain", "about", 2), []
    for weight in (0.0, 1.0, 100.0):
        edited = copy.deepcopy(model)
        config = EditConfig(layers=[2], templates=("Tell me about {}.",), template_weight=weight)
        rocr.unlearn(edited, tokenizer, concepts, statistics, config, guards=Guards(force=True))
        moved.append(float((state(edited, tokenizer, "Tell me about rain", "about", 2) - before).norm()))
    assert moved[0] > 2 * moved[1] > 4 * moved[2]


def test_a_name_goes_the_further_the_more_of_it_was_read(make_model, make_tokenizer, texts):
    original, tokenizer = make_model("Llama"), make_tokenizer()
    statistics = rocr.collect_statistics(original, tokenizer, texts, [2])
    text, target = "Who is Ada Byron?", state(original, tokenizer, "Who is rain?", "rain", 2)
    for schedule, shares in (("ramp", {"Ada": 0.5**0.5, "Byron": 1.0}), ("full", {"Ada": 1.0, "Byron": 1.0})):
        model = copy.deepcopy(original)
        config = EditConfig(
            layers=[2],
            token_schedule=schedule,
            templates=("Who is {}?",),
            ridge=NEARLY_NOTHING,
            template_weight=0.0,
        )
        edit = rocr.unlearn(
            model, tokenizer, [Concept("Ada Byron", "rain")], statistics, config, guards=Guards(force=True)
        )
        assert max(edit.report.distance) < 1e-3, "the distance is to where each token was sent"
        for word, share in shares.items():
            old, new = (state(m, tokenizer, text, word, 2) for m in (original, model))
            assert (new - old - share * (target - old)).norm() < 1e-3 * (target - old).norm()


def test_stronger_statistics_protect_ordinary_keys_more(model, tokenizer, statistics, concepts):
    moved = []
    for gamma in (0.0, 1.0, 100.0):
        edited = copy.deepcopy(model)
        config = EditConfig(layers=[2], gamma=gamma, ridge=1e-4, key_tokens="last")
        rocr.unlearn(edited, tokenizer, concepts, statistics, config)
        change = weight_change(edited, model, 2)
        moved.append(float((change @ statistics.second_moment(2).double() @ change.T).trace()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.9 * moved[0]


def test_strength_scales_the_residuals(model, tokenizer, statistics, concepts):
    config = EditConfig(layers=[2], key_tokens="last")
    once, twice = (
        rocr.unlearn(copy.deepcopy(model), tokenizer, concepts, statistics, replace(config, strength=strength))
        for strength in (1.0, 2.0)
    )
    torch.testing.assert_close(twice.updates[0].residuals, 2 * once.updates[0].residuals)
    torch.testing.assert_close(twice.updates[0].factors.left, 2 * once.updates[0].factors.left)


def test_both_padding_sides_give_the_same_edit(model, make_tokenizer, texts, concepts, weights_of):
    edited = []
    for side in ("left", "right"):
        other, tokenizer = copy.deepcopy(model), make_tokenizer(padding_side=side)
        statistics = rocr.collect_statistics(other, tokenizer, texts)
        rocr.unlearn(other, tokenizer, concepts, statistics)
        edited.append(weights_of(other))
    assert same_weights(*edited)
    assert not same_weights(edited[0], weights_of(model))


def test_same_inputs_give_the_same_bytes(model, tokenizer, statistics, concepts, weights_of):
    edited = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = copy.deepcopy(model)
        rocr.unlearn(other, tokenizer, concepts, statistics)
        edited.append(weights_of(other))
    assert same_weights(*edited)


def test_without_statistics_the_model_writes_the_text(model, tokenizer, concepts, capfd):
    state = torch.get_rng_state()
    edit = rocr.unlearn(model, tokenizer, concepts, config=EditConfig(layers=[1]))
    assert edit.report.statistics == {
        "text": "written by the model, seed 0",
        "tokens": 8192,
        "dtype": "float32",
        "length": 65,
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr().out == "", "nothing is printed"


def test_a_model_in_training_mode_is_edited_as_if_it_were_not(make_model, tokenizer, texts, concepts, weights_of):
    edited = []
    for training in (False, True):
        model = make_model("GPT-2").train(training)
        edit = rocr.unlearn(model, tokenizer, concepts, rocr.collect_statistics(model, tokenizer, texts))
        assert all(module.training == training for module in model.modules())
        edited.append(weights_of(model))
    assert same_weights(*edited)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert edit.report.divergence < 1


def test_names_with_accents_braces_and_other_scripts(model, tokenizer, statistics):
    concepts = [Concept("José Martí", "東京"), Concept("{name} {}", "Æsop"), Concept("🙂 Émile", "a key")]
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, LAST)
    assert max(edit.report.distance) < 0.1


def test_the_report(model, tokenizer, statistics, concepts):
    edit = rocr.unlearn(model, tokenizer, concepts, statistics)
    report = edit.report
    assert len(report.distance) == len(concepts)
    assert [layer.layer for layer in report.layers] == [1, 3]
    expected = {"text": statistics.text, "tokens": statistics.tokens, "dtype": "float32", "length": 128}
    assert report.statistics == expected
    assert {"keys", "metric", "solve", "apply", "measure"} <= set(report.seconds)
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert edit.concepts == concepts
    assert edit.config.layers == (1, 3)


def test_progress_names_its_stages(model, tokenizer, statistics, concepts):
    steps = []
    rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=[1, 2]), steps.append)
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages[0] == "targets"
    assert {"keys of layer 1", "keys of layer 2", "edit"} <= set(stages)
    edits = [(step.done, step.total) for step in steps if step.stage == "edit"]
    assert edits == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("concepts", "sentence"),
    [
        ([], "empty"),
        ([Concept("", "b")], "name is empty"),
        ([Concept("a", "a")], "is the concept itself"),
        ([Concept("a", "b"), Concept("A", "c")], "duplicate"),
        (["a"], "must be a Concept"),
    ],
)
def test_bad_concepts_are_refused_before_anything_runs(model, tokenizer, concepts, sentence, weights_of):
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=sentence):
        rocr.unlearn(model, tokenizer, concepts)


def test_names_without_a_key_are_refused_before_the_model_reads_prompts(model, tokenizer):
    # A few tokens are run to find out whether the model reads from left to right.
    def check(_, inputs):
        assert inputs[0].shape[1] <= PROBE_TOKENS, "the model read prompts"

    model.model.layers[0].register_forward_pre_hook(check)
    with pytest.raises(InputError, match="'x': the name is a single token"):
        rocr.unlearn(model, tokenizer, [Concept("x", "y")], config=EditConfig(templates=("{}?",)))


def test_layers_that_were_never_loaded_are_refused(model, tokenizer, statistics, concepts):
    model.model.layers[3].to("meta")
    with pytest.raises(InputError, match=r"layers\.3\.mlp\.down_proj\.weight is on the meta device"):
        rocr.unlearn(model, tokenizer, concepts, statistics)


def test_layers_out_of_range(model, tokenizer, concepts):
    with pytest.raises(InputError, match="Layer 9 is out of range: the model has 5 decoder layers"):
        rocr.unlearn(model, tokenizer, concepts, config=EditConfig(layers=[1, 9]))
