import copy
import hashlib

import pytest
import torch

import rocr
from rocr import Concept, EditConfig
from rocr.architectures import find_architecture
from rocr.fingerprint import Fingerprint, fingerprint, model_digest, tensor_digest, tokenizer_digest

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
