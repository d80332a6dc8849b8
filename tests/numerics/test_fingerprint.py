import copy
import hashlib

import pytest
import torch

import rocr
from rocr import Concept, EditConfig
from rocr.model.architecture import find_architecture
from rocr.model.fingerprint import (
    SAMPLED_VALUES,
    Fingerprint,
    down_projection_digests,
    fingerprint,
    model_digest,
    tensor_digest,
    tokenizer_digest,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def digest(model, layer=2):
    return model_digest(find_architecture(model), layer)


def test_one_model_has_one_fingerprint(family, make_model, tokenizer):
    first, second = (fingerprint(find_architecture(make_model(family)), tokenizer, 2) for _ in range(2))
    assert first == second
    assert first != fingerprint(find_architecture(make_model(family, seed=1)), tokenizer, 2)


def test_in_float32_and_bfloat16_alike(family, make_model):
    model = make_model(family).bfloat16()
    assert digest(model) == digest(copy.deepcopy(model).float())


def test_it_covers_the_layers_up_to_its_own(model):
    whole = digest(model, 2)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.zero_()
        model.lm_head.weight.zero_()
    assert digest(model, 2) == whole
    assert digest(model, 3) != whole
    for parameter in (model.model.embed_tokens.weight, model.model.layers[2].input_layernorm.weight):
        changed = digest(model, 2)
        with torch.no_grad():
            parameter.mul_(2.0)
        assert digest(model, 2) != changed


def test_edits_do_not_change_it(family, make_model, tokenizer, texts):
    model = make_model(family)
    before = digest(model, 4)
    config = EditConfig(layers=[1, 2], templates=("Who is {}?",))
    statistics = rocr.collect_statistics(model, tokenizer, texts, config.layers)
    edit = rocr.unlearn(model, tokenizer, [Concept("Ada Byron", "Blaise Pascal")], statistics, config)
    assert edit.fingerprint.model == statistics.fingerprint.model == digest(model, 2)
    assert digest(model, 4) == before


def test_of_a_shallower_model_it_differs(make_model):
    deep = make_model("Llama", num_hidden_layers=7)
    shallow = copy.deepcopy(deep)
    shallow.model.layers = shallow.model.layers[:5]
    shallow.config.num_hidden_layers = 5
    assert digest(deep, 4) == digest(shallow, 4)
    assert digest(deep, 6) != digest(shallow, 6)


def test_layers_without_a_dense_mlp_are_covered_too(make_model):
    assert digest(make_model("Mixtral")) != digest(make_model("Mixtral", seed=1))


def test_of_tokenizers(make_tokenizer):
    first = tokenizer_digest(make_tokenizer())
    used = make_tokenizer(padding_side="left")
    used(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(used) == first, "how the last batch was padded and cut is no part of it"
    assert tokenizer_digest(make_tokenizer(start=True)) != first
    assert tokenizer_digest(make_tokenizer(chat=None)) != first
    used.add_tokens(["<|new|>"])
    assert tokenizer_digest(used) != first


def test_saving_and_loading_changes_nothing(model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    before, after = (fingerprint(find_architecture(m), t, 2) for m, t in ((model, tokenizer), loaded))
    assert (before.model, before.tokenizer) == (after.model, after.tokenizer)
    assert after.name == str(tmp_path)


def test_tensor_digest_is_of_the_bytes_in_row_major_order():
    matrix = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    expected = hashlib.sha256(matrix.numpy().tobytes()).hexdigest()
    assert tensor_digest(matrix) == tensor_digest(matrix.T.contiguous().T) == expected
    assert tensor_digest(matrix.T) != expected
    assert tensor_digest(matrix.bfloat16()) != expected
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0])), "bits, not values"


@pytest.mark.parametrize("field", ["model", "layer", "tokenizer", "name"])
def test_what_is_no_fingerprint(field):
    values = {"model": "ab", "layer": 2, "tokenizer": "cd", "name": "tiny"}
    assert Fingerprint(**values).to_json() == values
    with pytest.raises(TypeError, match="fingerprint"):
        Fingerprint(**(values | {field: None}))


def test_it_reads_well():
    mark = Fingerprint("0123456789abcdef", 6, "fedcba9876543210", "tiny")
    assert str(mark) == "tiny (model 0123456789ab to layer 6, tokenizer fedcba987654)"


@pytest.mark.parametrize("sizes", [(512, 64), (256, 512), (64, 4096), (96, 80)], ids=str)
@pytest.mark.parametrize("part", ["columns", "rows"])
def test_it_sees_other_rows_and_columns_than_the_first(make_model, sizes, part):
    """Of 512 evenly spaced values, many shapes show those of one column alone."""
    hidden, inner = sizes
    model = make_model("Llama", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2)
    for module in (model.model.layers[1].self_attn.q_proj, model.model.layers[1].mlp.up_proj):
        first = digest(model)
        with torch.no_grad():
            values = module.weight if part == "rows" else module.weight.T
            values[len(values) // 2 :] += 1
        assert digest(model) != first


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 14336), (2048, 2048), (1, 10_000), (10_000, 1), (33, 77)])
def test_sampled_places_lie_in_all_parts_of_a_tensor(shape):
    from rocr.model.fingerprint import _sampled

    rows, columns = shape
    places = _sampled(torch.arange(rows * columns), SAMPLED_VALUES)
    assert len(places) == SAMPLED_VALUES and torch.equal(places, places.sort().values)
    for size, found in ((rows, places // columns), (columns, places % columns)):
        parts = min(size, 16)
        counts = torch.bincount(found * parts // size, minlength=parts)
        assert (counts > SAMPLED_VALUES / parts / 3).all(), "no sixteenth of the rows or columns is all but left out"


def test_places_are_the_same_on_every_machine():
    from rocr.model.fingerprint import _sampled

    places = _sampled(torch.arange(4096 * 14336), 4)
    assert places.tolist() == [16106664, 38691736, 45349043, 49749307]


def test_an_old_fingerprint_is_computed_as_it_was(model):
    """By the files of rocr 0.1: 512 values at even steps, without down-projections."""
    parts = hashlib.sha256()
    modules = [("embedding", model.model.embed_tokens)] + [(f"layer {i}", model.model.layers[i]) for i in range(3)]
    for title, module in modules:
        for name, values in module.named_parameters():
            if not name.startswith("mlp.down_proj"):
                flat = values.detach().reshape(-1)
                taken = flat[:: max(1, flat.numel() // 512)][:512].bfloat16().view(torch.int16).numpy()
                parts.update(f"{title} {name} {tuple(values.shape)}\n".encode() + taken.tobytes())
    assert model_digest(find_architecture(model), 2, like=parts.hexdigest()) == parts.hexdigest()
    assert digest(model) == digest(model, 2) != parts.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("relative_norm", [0.3, 0.003, 1e-4])
def test_digests_of_down_projections_see_an_edit_of_rank_one(make_model, dtype, relative_norm):
    """Ordinary edits have 0.03 to 0.5 of the norm of the weight."""
    model = make_model("Llama", hidden_size=128, intermediate_size=256).to(dtype)
    before = down_projection_digests(find_architecture(model), 4)
    assert before == down_projection_digests(find_architecture(copy.deepcopy(model)), 4) and len(set(before)) == 4
    weight = model.model.layers[2].mlp.down_proj.weight.data
    generator = torch.Generator().manual_seed(5)
    update = torch.randn(128, 1, generator=generator) @ torch.randn(1, 256, generator=generator)
    weight += (update * relative_norm * weight.float().norm() / update.norm()).to(dtype)
    after = down_projection_digests(find_architecture(model), 4)
    assert [i for i in range(4) if before[i] != after[i]] == [2]
    assert down_projection_digests(find_architecture(model), 2) == before[:2]


def test_digests_of_down_projections_in_float32_and_bfloat16_alike(family, make_model):
    model = make_model(family).bfloat16()
    assert down_projection_digests(find_architecture(model), 3) == down_projection_digests(
        find_architecture(copy.deepcopy(model).float()), 3
    )


def test_digests_of_mixtures_cover_their_experts(make_model):
    model = make_model("Qwen3Moe", mlp_only_layers=[0, 2], num_experts_per_tok=2)
    digests = down_projection_digests(find_architecture(model), 9)
    assert all(digests) and len(set(digests)) == 5
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3].add_(1.0)
    assert [a == b for a, b in zip(digests, down_projection_digests(find_architecture(model), 9), strict=True)] == [
        True, False, True, True, True,
    ]  # fmt: skip


def test_a_fingerprint_of_a_mixture_covers_all_but_its_experts(make_model):
    model = make_model("Qwen3Moe", num_experts_per_tok=2)
    before = model_digest(find_architecture(model), 2)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(2.0)
    assert model_digest(find_architecture(model), 2) == before
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.mul_(2.0)
    assert model_digest(find_architecture(model), 2) != before


def test_a_fingerprint_of_0_1_covers_the_experts(make_model):
    model = make_model("Qwen3Moe", mlp_only_layers=[0, 2], num_experts_per_tok=2)
    before = model_digest(find_architecture(model), 2, "0123")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(2.0)
    assert model_digest(find_architecture(model), 2, "0123") != before
