"""An edited GGUF file differs from its model's in the edited tensors alone, and an edit is undone in its bytes."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rocr
from rocr import GuardError, InputError, VerificationError
from rocr.edit.guards import Guards
from rocr.export.gguf import check_gguf_possible, save_edited_gguf
from rocr.export.gguf_lora import write_gguf_lora
from rocr.export.gguf_rewrite import NewTensor, grown_size, rewrite_gguf
from rocr.model.fingerprint import tensor_digest
from rocr.model.gguf_layout import encode, encode_changed, read_gguf_layout
from rocr.model.hub import loading
from rocr.model.load import LoadedModel, find_model, load_model
from rocr.solve.factors import Factors
from tests.support.models import write_gguf

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
gguf = pytest.importorskip("gguf")
EDITED = ("blk.1.ffn_down.weight", "blk.2.ffn_down.weight")
KINDS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "F16", "Q4_K": "F16", "Q6_K": "F16"}
"""The type of the model's matrices, and the type that edited ones are written in."""


def edit_of(path, tokenizer, texts, dtype=None):
    """A model that is loaded from a GGUF file and edited, and its edit."""
    loaded = load_model(find_model(str(path)), dtype)
    statistics = rocr.collect_statistics(loaded.model, loaded.tokenizer, texts, layers=(1, 2))
    first = {name: values.clone() for name, values in loaded.model.state_dict().items()}
    config = rocr.EditConfig(layers=(1, 2))
    concepts = [rocr.Concept("Ada Byron", "Blaise Pascal")]
    edit = rocr.unlearn(loaded.model, loaded.tokenizer, concepts, statistics, config, guards=Guards(force=True))
    return SimpleNamespace(path=path, loaded=loaded, edit=edit, first=first)


@pytest.fixture(
    scope="module",
    params=[kind if kind in ("F16", "Q8_0", "Q4_K") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def edited(request, make_model, tokenizer, texts, tmp_path_factory):
    """An edited model whose file has matrices of each type, and the file that was written."""
    folder = tmp_path_factory.mktemp("gguf")
    model = make_model("Llama", intermediate_size=256)
    path = write_gguf(model, tokenizer, folder / "m.gguf", request.param, 64 if request.param == "F16" else None)
    made = edit_of(path, tokenizer, texts[:2])
    (folder / "out").mkdir()
    saved = save_edited_gguf(made.loaded, made.edit, folder / "out")
    made.kind, made.saved, made.out = request.param, saved, folder / "out" / "m.gguf"
    saved.edit.save(folder / "edit.safetensors")
    made.edit = rocr.Edit.load(folder / "edit.safetensors")
    return made


def contents(path):
    """The metadata and the tensors of a GGUF file, as the package gguf reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: b"".join(part.tobytes() for part in field.parts) for name, field in reader.fields.items()}
    tensors = {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}
    assert all(t.data_offset % reader.alignment == 0 for t in reader.tensors)
    return fields, tensors, reader


def test_only_the_edited_tensors_differ(edited):
    fields, tensors, before = contents(edited.path)
    new_fields, new_tensors, after = contents(edited.out)
    assert new_fields == fields and list(new_tensors) == list(tensors)
    assert {name for name in tensors if tensors[name] != new_tensors[name]} == set(EDITED)
    for name in EDITED:
        assert (tensors[name][0], new_tensors[name][0]) == (edited.kind, KINDS[edited.kind])
        assert tensors[name][1] == new_tensors[name][1]
    # llama.cpp reads a file only if each tensor begins where the one before it, padded, ends.
    expected, alignment = after.data_offset, int(after.alignment)
    for tensor in after.tensors:
        assert tensor.data_offset == expected
        expected += -(-tensor.n_bytes // alignment) * alignment
    assert before.alignment == alignment == (64 if edited.kind == "F16" else 32)


def test_in_the_same_type_every_other_byte_of_the_file_stays(edited):
    layout = read_gguf_layout(edited.path)
    if edited.kind != KINDS[edited.kind]:
        assert edited.out.stat().st_size == grown_size(layout, dict.fromkeys(EDITED, "F16"))
        return
    before, after = (np.fromfile(path, dtype=np.uint8) for path in (edited.path, edited.out))
    assert len(before) == len(after)
    for name in EDITED:
        place = slice(layout.tensors[name].start, layout.tensors[name].start + layout.tensors[name].size)
        assert (before[place] != after[place]).any()
        before[place] = after[place] = 0
    assert np.array_equal(before, after)


def test_the_edited_tensors_are_the_edited_weights_rounded_once(edited):
    layout = read_gguf_layout(edited.out)
    for layer, name in zip((1, 2), EDITED, strict=True):
        weight = edited.loaded.model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight").data
        found, kind = layout.tensors[name].read(), KINDS[edited.kind]
        if kind == "Q8_0":
            blocks = weight.reshape(-1, 32)
            scale = blocks.abs().amax(dim=1, keepdim=True) / 127
            # Half a step, and the rounding of the scale to float16, 2^-11 of it, times 127 steps.
            bound = scale * (0.5 + 127 * 2**-11) * (1 + 1e-6)
            assert ((found.reshape(-1, 32) - blocks).abs() <= bound).all()
        else:
            rounded = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            assert torch.equal(found, weight.to(rounded).float())


def test_the_report_names_types_and_what_survives(edited):
    weights = edited.saved.report["weights"]
    assert [weight["stored"] for weight in weights] == [[name] for name in EDITED]
    kind = KINDS[edited.kind]
    largest = {"F32": 1e-5, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 5e-2}[kind]
    for weight, update in zip(weights, edited.edit.updates, strict=True):
        assert (weight["was"], weight["dtype"], weight["loaded"]) == (edited.kind, kind, "float32")
        first = edited.first[update.parameter]
        found = load_model(find_model(str(edited.out))).model.state_dict()[update.parameter]
        assert weight["surviving"] == float((first != found).double().mean()) > 0.5
        delta, keys = update.factors.left.double() @ update.factors.right.double(), update.keys.double()
        missed = ((found.double() - first.double()) - delta) @ keys.T
        assert weight["key_error"] == pytest.approx(float(missed.norm() / (delta @ keys.T).norm()), rel=1e-3, abs=1e-7)
        assert 0 <= weight["key_error"] < largest


def test_revert_gives_the_first_file_byte_for_byte(edited, tmp_path):
    loaded = load_model(find_model(str(edited.out)))
    save_edited_gguf(loaded, edited.edit, tmp_path, reverted=True)
    assert (tmp_path / "m.gguf").read_bytes() == edited.path.read_bytes()
    edited.edit.revert(loaded.model)
    assert all(torch.equal(values, edited.first[name]) for name, values in loaded.model.state_dict().items())


def test_a_file_without_the_edit_is_not_reverted(edited, tmp_path):
    with pytest.raises(VerificationError, match=rf"{EDITED[0]} in .* is not the tensor after this edit"):
        save_edited_gguf(load_model(find_model(str(edited.path))), edited.edit, tmp_path, reverted=True)
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_of_the_first_bytes_is_refused(edited, tmp_path):
    loaded = load_model(find_model(str(edited.out)))
    update = edited.edit.updates[0]
    flaws = [
        (InputError, "'Q9' is not a type of tensors", {"before": "Q9", "data": torch.zeros(4, dtype=torch.uint8)}),
        (VerificationError, "does not give its first bytes", {"data": torch.zeros(4, dtype=torch.uint8)}),
        (VerificationError, "does not give its first bytes", {"sha256": "0" * 64}),
    ]
    for kind, sentence, changes in flaws:
        stored = replace(update.applied.stored[0], **changes)
        if "before" in changes:
            stored = replace(stored, sha256=tensor_digest(stored.data))
        bad = replace(update, applied=replace(update.applied, stored=(stored,)))
        edit = replace(edited.edit, updates=[bad, edited.edit.updates[1]])
        with pytest.raises(kind, match=sentence):
            save_edited_gguf(loaded, edit, tmp_path, reverted=True)
    assert not list(tmp_path.iterdir())


def test_an_edit_is_applied_to_the_first_file_again(edited, tmp_path):
    loaded = load_model(find_model(str(edited.path)))
    edited.edit.apply(loaded.model)
    save_edited_gguf(loaded, edited.edit, tmp_path)
    assert (tmp_path / "m.gguf").read_bytes() == edited.out.read_bytes()


def test_the_adapter_has_the_update(edited, tmp_path):
    layers = write_gguf_lora(edited.edit, edited.loaded.source, 5, tmp_path)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    values = {name: bytes(reader.fields[name].parts[-1]).decode() for name in ("general.type", "adapter.type")}
    assert values == {"general.type": "adapter", "adapter.type": "lora"}
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"llama"
    alpha = reader.fields["adapter.lora.alpha"].parts[-1][0]
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert set(tensors) == {f"{name}.lora_{end}" for name in EDITED for end in "ab"}
    for update, name, layer in zip(edited.edit.updates, EDITED, layers, strict=True):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert alpha / b.shape[1] == 1 and layer.rank == layer.full_rank  # the factor of llama.cpp
        assert torch.allclose(b @ a, update.factors.left @ update.factors.right, rtol=1e-5, atol=1e-6)


def test_adapters_of_layers_with_other_ranks_are_padded(edited, tmp_path):
    first, second = edited.edit.updates
    short = replace(first, factors=Factors(first.factors.left[:, :1], first.factors.right[:1]))
    edit = replace(edited.edit, updates=[short, second])
    write_gguf_lora(edit, edited.loaded.source, 5, tmp_path)
    tensors = read_gguf_layout(tmp_path / "lora.gguf").tensors
    a, b = (tensors[f"{EDITED[0]}.lora_{end}"].read() for end in "ab")
    assert a.shape[0] == b.shape[1] == second.factors.rank > 1
    assert torch.equal(b @ a, short.factors.left @ short.factors.right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_a_model_that_was_loaded_in_another_dtype_gives_nearly_the_same_file(
    dtype, make_model, tokenizer, texts, tmp_path
):
    path = write_gguf(make_model("Llama", intermediate_size=64), tokenizer, tmp_path / "m.gguf")
    made = edit_of(path, tokenizer, texts[:2], dtype)
    (tmp_path / "out").mkdir()
    saved = save_edited_gguf(made.loaded, made.edit, tmp_path / "out")
    layout = read_gguf_layout(path)
    for update, name in zip(saved.edit.updates, EDITED, strict=True):
        exact = layout.tensors[name].read() + update.factors.left @ update.factors.right
        found = read_gguf_layout(tmp_path / "out" / "m.gguf").tensors[name].read()
        assert float((found - exact).abs().max()) <= float(exact.abs().max()) / 127
        assert update.applied.dtype == "torch.float32" and update.applied.stored[0].before == "Q8_0"
    (tmp_path / "back").mkdir()
    loaded = load_model(find_model(str(tmp_path / "out" / "m.gguf")))
    save_edited_gguf(loaded, saved.edit, tmp_path / "back", reverted=True)
    assert (tmp_path / "back" / "m.gguf").read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def plain(make_model, tokenizer, tmp_path_factory):
    """A GGUF file with matrices in Q8_0."""
    folder = tmp_path_factory.mktemp("plain")
    return write_gguf(make_model("Llama", intermediate_size=64), tokenizer, folder / "m.gguf")


def test_rows_without_a_change_keep_bytes_that_encoding_would_not_give(plain, tmp_path):
    layout = read_gguf_layout(plain)
    tensor = layout.tensors[EDITED[0]]
    stored = tensor.read_bytes().reshape(32, -1)
    stored[:, 2:] = 2  # every value is 2 steps: encoded anew, it would be 127 smaller ones
    rewrite_gguf(layout, {tensor.name: NewTensor("Q8_0", stored.reshape(-1))}, tmp_path / "m.gguf")
    tensor = read_gguf_layout(tmp_path / "m.gguf").tensors[EDITED[0]]
    values = tensor.read()
    assert not torch.equal(encode(values, "Q8_0", "it"), tensor.read_bytes())
    values[3] += 1
    found = encode_changed(values, tensor, "Q8_0").reshape(32, -1)
    kept = torch.arange(32) != 3
    assert torch.equal(found[kept], stored[kept]) and not torch.equal(found[3], stored[3])


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.ffn_down.weight", "output.weight", "output_norm.weight"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_tensor_at_any_place_may_change_its_size(name, kind, plain, tmp_path):
    layout = read_gguf_layout(plain)
    values = layout.tensors[name].read() + 1
    rewrite_gguf(layout, {name: NewTensor(kind, encode(values, kind, name))}, tmp_path / "new.gguf")
    fields, tensors, _ = contents(plain)
    new_fields, new_tensors, _ = contents(tmp_path / "new.gguf")
    assert new_fields == fields and {n for n in tensors if tensors[n] != new_tensors[n]} == {name}
    found = read_gguf_layout(tmp_path / "new.gguf").tensors[name]
    assert found.kind == kind and torch.allclose(found.read(), values, rtol=2**-8)
    assert (tmp_path / "new.gguf").stat().st_size == grown_size(layout, {name: kind})


def rewritten(plain, tmp_path, change):
    data = bytearray(plain.read_bytes())
    change(data)
    (tmp_path / "bad.gguf").write_bytes(data)
    return tmp_path / "bad.gguf"


def with_offset(name, offset):
    def change(data):
        place = data.index(name.encode()) + len(name) + 4 + 16 + 4
        data[place : place + 8] = offset.to_bytes(8, "little")

    return change


def test_tensors_that_overlap_are_refused(plain, tmp_path):
    path = rewritten(plain, tmp_path, with_offset(EDITED[1], 32))
    with pytest.raises(InputError, match=r"is damaged: the tensors .* overlap"):
        read_gguf_layout(path)


def test_a_file_that_is_cut_off_is_refused(plain, tmp_path):
    path = rewritten(plain, tmp_path, lambda data: data.__delitem__(slice(len(data) - 4096, None)))
    with pytest.raises(InputError, match=r"bad\.gguf"):
        read_gguf_layout(path)


def test_a_file_in_the_other_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.ones((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="little-endian files only"):
        read_gguf_layout(tmp_path / "big.gguf")


def test_a_weight_that_overflows_the_type_stops_the_output(plain, tokenizer, texts, tmp_path):
    made = edit_of(plain, tokenizer, texts[:2])
    parameter = made.loaded.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    undo = made.edit.updates[0].applied.undo
    first = parameter.data.view(torch.int32) ^ undo
    parameter.data[0, 0] = 1e5
    undo.copy_(parameter.data.view(torch.int32) ^ first)
    with pytest.raises(GuardError, match=rf"makes {EDITED[0]} overflow F16. Nothing was written"):
        save_edited_gguf(made.loaded, made.edit, tmp_path, kind="F16")
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_values_than_the_model_is_refused(plain, tokenizer, texts, tmp_path):
    shutil.copy(plain, tmp_path / "m.gguf")
    made = edit_of(tmp_path / "m.gguf", tokenizer, texts[:2])
    layout = read_gguf_layout(plain)
    values = layout.tensors[EDITED[1]].read() * 2
    (tmp_path / "m.gguf").unlink()
    rewrite_gguf(layout, {EDITED[1]: NewTensor("Q8_0", encode(values, "Q8_0", "it"))}, tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=rf"was loaded with other values than {EDITED[1]}"):
        save_edited_gguf(made.loaded, made.edit, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_header_is_read_or_refused_with_a_sentence(plain, tmp_path, tally):
    data, generator = plain.read_bytes(), np.random.default_rng(0)
    end, path = read_gguf_layout(plain).data_start, tmp_path / "bad.gguf"
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.integers(4, end, 3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_gguf_layout(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 5
    tally("damaged GGUF headers", 60)


def write_gpt2(model, path):
    """A tiny GPT-2 as a GGUF file, whose matrices are stored the other way round than in transformers."""
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    vocabulary = [f"<{i}>" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = np.ascontiguousarray(values.T)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("mlp.c_proj.weight"):
            values = values.astype(np.float16)
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_weight_that_is_stored_the_other_way_round(make_model, tokenizer, texts, tmp_path):
    model = make_model("GPT-2", n_positions=1024)  # transformers reads no other number from a file
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.c_proj.weight"):
            parameter.data = parameter.data.half().float()
    path = write_gpt2(model, tmp_path / "m.gguf")
    source = find_model(str(path))
    statistics = rocr.collect_statistics(model, tokenizer, texts[:2], layers=(1, 2))
    concepts, config = [rocr.Concept("Ada Byron", "Blaise Pascal")], rocr.EditConfig(layers=(1, 2))
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=Guards(force=True))
    assert edit.updates[0].transposed
    loaded = LoadedModel(model, tokenizer, source)
    (tmp_path / "out").mkdir()
    saved = save_edited_gguf(loaded, edit, tmp_path / "out")
    tensors = read_gguf_layout(tmp_path / "out" / "m.gguf").tensors
    for layer, name in zip((1, 2), EDITED, strict=True):
        assert torch.equal(tensors[name].read(), model.transformer.h[layer].mlp.c_proj.weight.data.T.half().float())
    (tmp_path / "back").mkdir()
    at_output = LoadedModel(model, tokenizer, find_model(str(tmp_path / "out" / "m.gguf")))
    save_edited_gguf(at_output, saved.edit, tmp_path / "back", reverted=True)
    assert (tmp_path / "back" / "m.gguf").read_bytes() == path.read_bytes()
    write_gguf_lora(saved.edit, source, 5, tmp_path)
    tensors = read_gguf_layout(tmp_path / "lora.gguf").tensors
    product = tensors[f"{EDITED[0]}.lora_b"].read() @ tensors[f"{EDITED[0]}.lora_a"].read()
    factors = saved.edit.updates[0].factors
    assert torch.allclose(product, factors.left @ factors.right, rtol=1e-5, atol=1e-6)
    with loading(source) as library:
        first, _ = library.model(library.config(), torch.float32, None)
    check_gguf_possible(LoadedModel(first, tokenizer, source), (1, 2), tmp_path / "new", None)
