"""Edits of mixtures of experts, against exact products and dense solves in float64."""

import copy

import peft
import pytest
import torch

import rocr
from rocr import Concept, EditConfig, GuardError, Guards, InputError
from rocr.keys.plan import plan_keys
from rocr.keys.read import read_states
from rocr.model.architecture import find_architecture
from rocr.model.blocks import layer_blocks
from rocr.model.gated_keys import gated_keys_hook
from rocr.model.layers import resolve_layers
from rocr.ops.arithmetic import plain_arithmetic
from rocr.statistics.corpus import pack_tokens
from tests.support.listed_experts import ListedExperts
from tests.support.versions import MAJOR, needs_transformers

pytestmark = pytest.mark.thorough

LAYER = 2
FORCE = Guards(force=True)
CONFIG = EditConfig(layers=[LAYER], templates=("{}", "Who is {}?", "Tell me about {}."))
TOKENS = torch.arange(2, 26).view(2, 12)
SAME = 1e-5
"""Relative error of a float32 solve of a small well-conditioned system."""


ADAPTED = ("Mixtral", "Qwen2Moe", "GPT-OSS", "Deepseek-V3", "Llama4")


def listed(make_model):
    model = make_model("Llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in model.model.layers[1:]:
            layer.mlp = ListedExperts(32, 12, 4)
    return model.eval()


def build(mixture, make_model):
    model = listed(make_model) if mixture == "listed" else make_model(mixture)
    if mixture in ("Mixtral", "Qwen2Moe", "GPT-OSS", "Deepseek-V3") and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others have no float64
    return model


@pytest.fixture(scope="module", params=["listed", "Mixtral", "Qwen2Moe", "GPT-OSS", "Deepseek-V3", "Llama4"])
def first(request, make_model):
    """A mixture of each kind; tests get copies."""
    return build(request.param, make_model)


@pytest.fixture(scope="module")
def collected(first, tokenizer, texts):
    """The statistics of all texts at the layer."""
    return rocr.collect_statistics(copy.deepcopy(first), tokenizer, texts, [LAYER])


@pytest.fixture
def moe(first):
    return copy.deepcopy(first)


def in_float64(model):
    """The blocks of the layer in a copy of a model in float64, which itself cannot be edited; and the copy."""
    exact = copy.deepcopy(model)
    blocks = layer_blocks(find_architecture(exact), LAYER)
    for module in exact.modules():
        if MAJOR < 5 and type(module).__name__ == "DeepseekV3TopkRouter":
            # Experts' outputs are added up in the dtype of the gates, which is float32 else.
            module.register_forward_hook(lambda _module, _inputs, found: (found[0], found[1].double()))
    return blocks, exact.double()


def wide_keys(blocks, model, tokens=TOKENS):
    """The gated keys of all tokens, (tokens, sum of d_in), in the model's dtype, and the output of the mixture."""
    columns = blocks.columns(range(len(blocks.blocks)))
    keys = torch.zeros(tokens.numel(), columns[-1].stop, dtype=model.dtype)
    outputs = []

    def receive(output, found):
        outputs.append(output)
        for each in found:
            keys[each.tokens, columns[blocks.index_of(each)]] += each.inputs * each.gates[:, None].to(each.inputs)

    with gated_keys_hook(blocks.module, blocks.parameters, receive), torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return keys, outputs[0]


def test_a_change_of_all_experts_moves_the_output_by_the_wide_product(moe):
    """Exact in float64: the gated keys are right whatever the model's routing, biases and layout are."""
    blocks, exact = in_float64(moe)
    keys, before = wide_keys(blocks, exact)
    columns = blocks.columns(range(len(blocks.blocks)))
    expected = torch.zeros_like(before)
    for block, place in zip(blocks.blocks, columns, strict=True):
        change = torch.randn(block.weight.shape, dtype=torch.float64)
        block.weight.add_(change)
        expected += keys[:, place] @ change.T
    after = wide_keys(blocks, exact)[1]
    # Gates are read in float32.
    assert (after - before - expected).norm() <= 1e-6 * expected.norm()
    assert expected.norm() > before.norm() / 100


def test_every_expert_is_a_block_and_routers_are_none(moe):
    blocks = layer_blocks(find_architecture(moe), LAYER)
    names = {block.parameter_name.rpartition(f"layers.{LAYER}.")[2] for block in blocks.blocks}
    assert not any("router" in name or "gate" in name.split(".")[1] for name in names), names
    routed = [block for block in blocks.blocks if block.weight.shape[1] == blocks.blocks[0].weight.shape[1]]
    assert len(routed) >= 4
    for block in blocks.blocks:
        assert block.weight.shape[0] == 32
        assert block.weight.untyped_storage().data_ptr() == block.parameter.untyped_storage().data_ptr()


def test_listed_experts_that_are_not_loaded_are_found_by_their_shapes(make_model):
    model = listed(make_model)
    loaded = layer_blocks(find_architecture(model), LAYER)
    empty = layer_blocks(find_architecture(model.to("meta")), LAYER)
    routed = [block.parameter_name for block in loaded.blocks if ".experts." in block.parameter_name]
    assert empty.is_mixture and [block.parameter_name for block in empty.blocks] == routed
    assert empty.widths == (12,) * 4


def test_statistics_are_the_second_moments_of_all_gated_keys(moe, tokenizer, texts):
    options = rocr.CollectOptions(length=16, batch_tokens=48)
    found = rocr.collect_statistics(moe, tokenizer, texts[:12], [LAYER], options).mixtures[LAYER]
    whole = rocr.collect_statistics(moe, tokenizer, texts[:12], [LAYER], rocr.CollectOptions(length=16))
    tokens = whole.tokens
    sequences = [torch.tensor([s]) for s in pack_tokens(iter(texts[:12]), tokenizer, 16, len(tokenizer))]
    blocks, exact = in_float64(moe)
    keys = torch.cat([wide_keys(blocks, exact, sequence)[0][1:] for sequence in sequences])
    assert len(keys) == tokens
    places = blocks.columns(range(len(blocks.blocks)))
    size = (keys.T @ keys / tokens).norm()
    for moment, other, place in zip(found.moments, whole.mixtures[LAYER].moments, places, strict=True):
        expected = keys[:, place].T @ keys[:, place] / tokens
        assert (moment - expected).norm() <= SAME * size
        assert (other - expected).norm() <= SAME * size
    counts = torch.tensor([int(keys[:, place].any(dim=1).sum()) for place in places])
    assert torch.equal(found.routed, counts) and torch.equal(whole.mixtures[LAYER].routed, counts)


def metrics_of(moments, config, scale, dtype):
    """The metric of each block, (d_in, d_in) float64, from eigenvectors in a dtype."""
    found = []
    for moment in moments:
        values, vectors = (each.double() for each in torch.linalg.eigh(moment.to(dtype)))
        kept = 1 / (config.gamma * values / scale + 1)
        if config.method == "projected":
            kept = (values < config.threshold * scale).double()
        found.append(vectors * kept @ vectors.T)
    return found


def dense_solve(update, metrics, ridge, dtype=torch.float64):
    """The authors' (d_in, d_in) system of an update's wide keys in float64, with the product M Kᵀ of a dtype."""
    keys = update.keys.double()
    metric = torch.block_diag(*(metrics[block] for block in update.blocks))
    removed = torch.eye(len(metric), dtype=torch.float64) - metric
    product = (keys.to(dtype) - keys.to(dtype) @ removed.to(dtype)).double().T
    system = product @ keys + ridge * torch.eye(len(metric), dtype=torch.float64)
    return torch.linalg.solve(system, product @ update.residuals.double()).T


@pytest.mark.parametrize(
    ("method", "relative"),
    [
        ("whitened", True),
        ("whitened", False),
        ("projected", True),
        pytest.param("projected", False, marks=pytest.mark.slow),
    ],
)
def test_the_update_is_the_dense_solve_on_the_wide_key(moe, tokenizer, collected, concepts, method, relative):
    """The authors' (d_in, d_in) system on [g₁k₁ … g_E k_E], with the block-diagonal metric, in float64."""
    config = EditConfig(
        layers=[LAYER], templates=CONFIG.templates, method=method, relative_ridge=relative, ridge=0.05, threshold=0.5,
        relative_threshold=True,
    )  # fmt: skip
    blocks = layer_blocks(find_architecture(moe), LAYER)
    before = [block.weight.double().clone() for block in blocks.blocks]
    update = rocr.unlearn(moe, tokenizer, concepts, collected, config, guards=FORCE).updates[0]
    moments = [moment.double() for moment in collected.second_moments(LAYER)]
    scale = sum(moment.trace() for moment in moments) / sum(map(len, moments))
    metrics = metrics_of(moments, config, scale, torch.float64)
    ordinary = sum((moment * metric).sum() for moment, metric in zip(moments, metrics, strict=True))
    ridge = 0.05 * (ordinary if relative else 1.0)
    if relative and method == "whitened":
        # tr(C M) is estimated by random vectors; the value that was used is recorded.
        assert abs(update.system.ridge / ridge - 1) < 0.1
        ridge = update.system.ridge
    expected = dense_solve(update, metrics, ridge)
    # The factors are stored in float32, and their product may cancel.
    stored = torch.finfo(torch.float32).eps * update.factors.left.norm() * update.factors.right.norm()
    allowed = SAME * expected.norm() + stored
    if method == "projected":
        # What the rounding of torch's own eigenvectors and product does: the projector removes most of a key.
        rounded = dense_solve(update, metrics_of(moments, config, scale, torch.float32), ridge, torch.float32)
        allowed += 2 * (rounded - expected).norm()
        assert allowed < 1e-3 * expected.norm()
    assert (update.factors.left.double() @ update.factors.right.double() - expected).norm() <= allowed
    places = dict(zip(update.blocks, update.columns, strict=True))
    for number, (block, old) in enumerate(zip(blocks.blocks, before, strict=True)):
        change = expected[:, places[number]] if number in places else torch.zeros_like(old)
        rounding = torch.finfo(torch.float32).eps * old.norm()
        assert (block.weight - old - change).norm() <= allowed * bool(change.any()) + rounding


def test_keys_are_means_over_the_templates_whatever_the_batch(moe, tokenizer, concepts):
    architecture = find_architecture(moe)
    config = resolve_layers(CONFIG.for_concepts(len(concepts)), architecture)
    reading = plan_keys(tokenizer, concepts, config).keys
    with plain_arithmetic():
        one, many = (read_states(architecture, reading, LAYER, LAYER, token_budget=budget) for budget in (1, 4096))
    assert one.blocks == many.blocks and torch.equal(one.routing.tokens, many.routing.tokens)
    assert (one.keys - many.keys).norm() <= SAME * many.keys.norm()
    expected = torch.zeros(reading.groups, many.keys.shape[1], dtype=torch.float64)
    blocks, exact = in_float64(moe)
    counts = torch.bincount(torch.tensor(reading.group_of))
    for prompt, position, group in zip(reading.prompt_of, reading.position_of, reading.group_of, strict=True):
        tokens = torch.tensor([reading.prompts[prompt].tokens])
        keys, _ = wide_keys(blocks, exact, tokens)
        own = blocks.arranged(keys[position : position + 1], range(len(blocks.blocks)), many.blocks)
        expected[group] += own[0] / counts[group]
    assert (many.keys - expected).norm() <= SAME * expected.norm()


def test_only_routed_experts_change_and_revert_restores_every_bit(
    moe, tokenizer, texts, concepts, weights_of, tmp_path
):
    layers = [1, LAYER]
    statistics = rocr.collect_statistics(moe, tokenizer, texts, layers)
    before = weights_of(moe)
    config = EditConfig(layers=layers, token_schedule="full")
    edit = rocr.unlearn(moe, tokenizer, concepts, statistics, config, guards=FORCE)
    after = weights_of(moe)
    edited = {part.parameter for update in edit.updates for part in update.parts}
    assert {name for name in before if not torch.equal(before[name], after[name])} == edited
    architecture = find_architecture(moe)
    for update in edit.updates:
        blocks = layer_blocks(architecture, update.layer).blocks
        for number, block in enumerate(blocks):
            old = before[block.parameter_name]
            if block.expert is not None:
                old = old[block.expert]
            is_same = torch.equal(block.stored.view(torch.int32), old)
            assert is_same == (number not in update.blocks)
    edit.save(tmp_path / "edit")
    loaded = rocr.Edit.load(tmp_path / "edit")
    loaded.revert(moe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(moe).items())
    loaded.apply(moe)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights_of(moe).items())
    assert max(edit.report.distance) < 1


def test_concepts_are_removed_added_and_merged(moe, tokenizer, collected, concepts, weights_of):
    before = weights_of(moe)

    def fresh(chosen):
        edit = rocr.unlearn(moe, tokenizer, chosen, collected, CONFIG, guards=FORCE)
        edit.revert(moe)
        return edit

    both, first, second = fresh(concepts), fresh(concepts[:1]), fresh(concepts[1:])
    wanted = dense_update(both, moe)
    removed = both.remove(concepts[1].name)
    assert close(dense_update(removed, moe), dense_update(first, moe))
    assert removed.report.routing[0].agreement == pytest.approx(first.report.routing[0].agreement)
    merged = first.merge(second)
    assert close(dense_update(merged, moe), wanted)
    added = first.add(concepts[1:], moe, tokenizer, collected, guards=FORCE)
    assert close(dense_update(added, moe), wanted)
    assert added.report.routing[0].agreement == pytest.approx(both.report.routing[0].agreement)
    added.revert(moe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(moe).items())


def dense_update(edit, model):
    """The update of all experts of the edited layer, (d_out, sum of d_in)."""
    (update,) = edit.updates
    blocks = layer_blocks(find_architecture(model), update.layer)
    matrix = update.factors.left.double() @ update.factors.right.double()
    return blocks.arranged(matrix, update.blocks, range(len(blocks.blocks)))


def close(found, expected):
    return bool((found - expected).norm() <= 1e-4 * expected.norm())


@pytest.mark.parametrize(
    ("mixture", "rank"),
    [
        *((mixture, None) for mixture in ADAPTED),
        *(pytest.param(each, 2, marks=() if each in ("Qwen2Moe", "GPT-OSS") else pytest.mark.slow) for each in ADAPTED),
    ],
)
def test_the_adapter_is_the_edit(mixture, rank, make_model, tokenizer, texts, concepts, tmp_path):
    model = make_model(mixture)
    original = copy.deepcopy(model)
    layers = [0, LAYER]  # layer 0 of Deepseek-V3 is dense
    statistics = rocr.collect_statistics(model, tokenizer, texts, layers)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=layers), guards=FORCE)
    found = edit.export_lora(tmp_path / "adapter", rank=rank)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter").eval()
    merged = peft.PeftModel.from_pretrained(original, tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        before, after, one, other = (
            each(input_ids=TOKENS).logits for each in (make_model(mixture), model, adapted, merged)
        )
    difference = max((one - after).norm(), (other - after).norm())
    if rank is None:
        assert difference <= 1e-5 * after.norm()
    else:
        assert all(0 < layer.key_error < 1 and layer.rank == 2 for layer in found)
        assert difference < (after - before).norm()


def test_the_report_says_how_concepts_are_routed(make_model, tokenizer, texts, concepts):
    model = make_model("Deepseek-V3")
    statistics = rocr.collect_statistics(model, tokenizer, texts[:6], [1, LAYER])
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=[1, LAYER]), guards=FORCE)
    assert [layer.layer for layer in edit.report.routing] == [1, LAYER]
    for layer, update in zip(edit.report.routing, edit.updates, strict=True):
        routed = statistics.mixtures[layer.layer].routed
        assert layer.experts == 5 and layer.touched == list(update.blocks)
        assert layer.tokens == [int(routed[block]) for block in update.blocks]
        assert len(layer.agreement) == 2 and all(0 <= share <= 1 for share in layer.agreement)
        # The text has fewer tokens than an expert needs.
        assert layer.uncovered == [concept.name for concept in concepts]
    one = EditConfig(layers=[LAYER], templates=("Who is {}?",))
    edit.revert(model)
    alone = rocr.unlearn(model, tokenizer, concepts, statistics, one, guards=FORCE)
    assert alone.report.routing[0].agreement == [1.0, 1.0], "one template agrees with itself"


@needs_transformers(5, "the experts of Mixtral are modules, and it returns its gates too")
def test_experts_that_cannot_be_read_are_refused_with_their_shapes(make_model, tokenizer, texts):
    model = make_model("Mixtral")
    mixture = model.model.layers[LAYER].mlp

    def fused(states, *_):
        found = torch.einsum("btd,edi->bti", states, mixture.experts.down_proj)
        return torch.nn.functional.pad(found, (0, states.shape[-1]))[..., : states.shape[-1]].tanh()

    mixture.forward = fused
    with pytest.raises(InputError, match=r"layers\.2\.mlp\S*, a Mixtral\w+, cannot be read: .*down_proj \(4, 32"):
        rocr.collect_statistics(model, tokenizer, texts, [LAYER])


@needs_transformers(5, "the experts of Mixtral are modules, and it returns its gates too")
def test_a_mixture_that_sometimes_changes_its_sum_is_refused(make_model, tokenizer, texts):
    """The first tokens show gated products; in text, the sum is cut off where it is large."""
    model = make_model("Mixtral")
    mixture = model.model.layers[LAYER].mlp
    plain = mixture.forward

    def cut(states, *inputs):
        output = plain(states, *inputs)
        return output if states.shape[0] == 1 else output.tanh()

    mixture.forward = cut
    with pytest.raises(InputError, match=r"expert \d of model\.layers\.2\.mlp does not reach the output as a gate"):
        rocr.collect_statistics(model, tokenizer, texts, [LAYER], rocr.CollectOptions(length=16, batch_tokens=64))


def test_keys_of_experts_that_are_not_finite_are_reported(make_model, tokenizer, texts, concepts, weights_of):
    model = make_model("Mixtral")
    statistics = rocr.collect_statistics(model, tokenizer, texts, [LAYER])
    _, mixture = find_architecture(model).mixture(LAYER)
    with torch.no_grad():
        for name, parameter in mixture.experts.named_parameters():
            if name.endswith(("gate_up_proj", "w1.weight")):
                parameter.fill_(torch.inf)
    before = weights_of(model)
    with pytest.raises(GuardError, match="not finite"):
        rocr.collect_statistics(model, tokenizer, texts, [LAYER])
    with pytest.raises((GuardError, InputError)):
        rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_a_name_is_redirected_in_a_mixture(moe, tokenizer, collected):
    """The output of the edited layer at the name moves to that at the redirect, as in a dense model."""
    config = EditConfig(layers=[LAYER], templates=CONFIG.templates, ridge=1e-6, gamma=1e-6)
    edit = rocr.unlearn(moe, tokenizer, [Concept("Ada Byron", "Blaise Pascal")], collected, config, guards=FORCE)
    assert edit.report.layers[0].closed[0] > 0.99
    assert edit.report.distance[0] < 0.5
