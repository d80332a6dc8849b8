"""GGUF files of mixtures: only experts that are routed to change, in bytes that are undone, and adapters hold them."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rocr
from rocr import InputError, VerificationError
from rocr.edit.guards import Guards
from rocr.export.gguf import check_gguf_possible, save_edited_gguf
from rocr.export.gguf_lora import write_gguf_lora
from rocr.model.gguf import fast_reader
from rocr.model.gguf_layout import read_gguf_layout
from rocr.model.load import find_model, load_model
from tests.support.gguf_mixtures import build_mixture, write_mixture_gguf

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
gguf = pytest.importorskip("gguf")
KINDS = {"F32": "F32", "F16": "F16", "Q8_0": "Q8_0", "Q4_0": "F16"}
"""The type of the experts, and the type that edited ones are written in."""


def copy_of(loaded):
    """A loaded model with weights of its own: files of experts take long to load."""
    return replace(loaded, model=copy.deepcopy(loaded.model))


def edited_model(family, kind, tokenizer, texts, folder, dtype=None):
    """A mixture that is loaded from a GGUF file and edited, and the file that is written."""
    model = build_mixture(family, len(tokenizer))
    path = write_mixture_gguf(model, family, tokenizer, folder / "m.gguf", kind)
    loaded = load_model(find_model(str(path)), dtype)
    unedited = copy_of(loaded)
    first = {name: values.clone() for name, values in loaded.model.state_dict().items()}
    statistics = rocr.collect_statistics(loaded.model, loaded.tokenizer, texts[:2], layers=(1, 2))
    concepts = [rocr.Concept("Ada Byron", "Blaise Pascal")]
    config = rocr.EditConfig(layers=(1, 2), templates=("Who is {}?", "About {}"))
    check_gguf_possible(loaded, (1, 2), folder / "out", None)
    edit = rocr.unlearn(loaded.model, loaded.tokenizer, concepts, statistics, config, guards=Guards(force=True))
    (folder / "out").mkdir()
    saved = save_edited_gguf(loaded, edit, folder / "out")
    saved.edit.save(folder / "edit.safetensors")
    stored = rocr.Edit.load(folder / "edit.safetensors")
    return SimpleNamespace(
        family=family, kind=kind, model=model, path=path, out=folder / "out" / "m.gguf", loaded=loaded, first=first,
        unedited=unedited, edit=stored, report=saved.report,
    )  # fmt: skip


CASES = [("Qwen2Moe", "Q8_0"), ("Qwen3Moe", "Q4_0")]
SLOW = [
    ("Qwen2Moe", "F16"),
    ("Qwen3Moe", "F32"),
    ("Qwen3Moe", "Q8_0"),
    ("Qwen2Moe", "Q4_0"),
    ("MiniMaxM2", "F32"),
    ("MiniMaxM2", "Q8_0"),
]


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda case: "-".join(case),
)
def edited(request, tokenizer, texts, tmp_path_factory):
    return edited_model(*request.param, tokenizer, texts, tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def written(edited):
    """The model that is loaded from the written file; tests that change it copy it."""
    return load_model(find_model(str(edited.out)))


def tensors_of(edited):
    """The names of the tensors that the edit changes, with the experts that it changes in each."""
    found = {}
    for update in edited.edit.updates:
        for part in update.parts:
            name = "ffn_down_exps" if part.expert is not None else "ffn_down_shexp"
            found.setdefault(f"blk.{update.layer}.{name}.weight", []).append(part.expert)
    return found


def test_the_loaded_model_has_the_sizes_and_the_values_of_the_file(edited):
    if edited.kind == "F32":
        assert all(torch.equal(values, edited.first[name]) for name, values in edited.model.state_dict().items())
    if edited.family != "MiniMaxM2":
        assert edited.loaded.model.config.moe_intermediate_size == 32
    if edited.family == "Qwen2Moe":
        assert edited.loaded.model.config.shared_expert_intermediate_size == 96


def test_only_the_bytes_of_edited_experts_differ(edited):
    before, after = read_gguf_layout(edited.path), read_gguf_layout(edited.out)
    assert list(before.tensors) == list(after.tensors)
    changed, held = tensors_of(edited), 0
    for name, tensor in before.tensors.items():
        mine, theirs = after.tensors[name].read_bytes(), tensor.read_bytes()
        if name not in changed:
            assert torch.equal(mine, theirs) and after.tensors[name].kind == tensor.kind
            continue
        assert (tensor.kind, after.tensors[name].kind) == (edited.kind, KINDS[edited.kind])
        if changed[name] == [None]:
            assert not torch.equal(mine, theirs)
            continue
        for expert in range(8):
            if expert not in changed[name]:
                held += 1
                # A tensor has one type: in another one, experts without an update are rounded to it.
                values, first = after.tensors[name].read()[expert], tensor.read()[expert]
                assert torch.equal(values, first.half().float() if KINDS[edited.kind] == "F16" else first)
            if KINDS[edited.kind] == edited.kind:
                same = torch.equal(mine.reshape(8, -1)[expert], theirs.reshape(8, -1)[expert])
                assert same == (expert not in changed[name])
    assert held > 0
    if edited.kind == KINDS[edited.kind]:
        mine, theirs = (np.fromfile(path, dtype=np.uint8) for path in (edited.out, edited.path))
        assert len(mine) == len(theirs) and np.array_equal(mine[: before.data_start], theirs[: before.data_start])


def test_the_edited_experts_are_the_edited_weights_rounded_once(edited):
    after, state = read_gguf_layout(edited.out), edited.loaded.model.state_dict()
    for update in edited.edit.updates:
        for part in update.parts:
            kind = "exps" if part.expert is not None else "shexp"
            values = after.tensors[f"blk.{update.layer}.ffn_down_{kind}.weight"].read()
            weight = state[part.parameter]
            if part.expert is not None:
                values, weight = values[part.expert], weight[part.expert]
            if KINDS[edited.kind] == "Q8_0":
                scale = weight.reshape(-1, 32).abs().amax(dim=1, keepdim=True) / 127
                bound = scale * (0.5 + 127 * 2**-11) * (1 + 1e-6)  # half a step, and the rounding of the scale
                assert ((values - weight).reshape(-1, 32).abs() <= bound).all()
            else:
                assert torch.equal(values, weight.half().float() if KINDS[edited.kind] == "F16" else weight)


def test_the_report_has_one_entry_for_each_tensor(edited):
    entries, changed = edited.report["weights"], tensors_of(edited)
    assert [entry["stored"] for entry in entries] == [[name] for name in changed]
    largest = {"F32": 1e-5, "F16": 2e-3, "Q8_0": 5e-2}[KINDS[edited.kind]]
    for entry in entries:
        assert (entry["was"], entry["dtype"], entry["loaded"]) == (edited.kind, KINDS[edited.kind], "float32")
        assert entry["surviving"] > 0.5 and 0 <= entry["key_error"] < largest


def test_the_edit_is_undone_in_the_bytes_and_in_memory(edited, written, tmp_path):
    loaded = copy_of(written)
    save_edited_gguf(loaded, edited.edit, tmp_path, reverted=True)
    assert (tmp_path / "m.gguf").read_bytes() == edited.path.read_bytes()
    edited.edit.revert(loaded.model)
    for name, values in loaded.model.state_dict().items():
        first = edited.first[name]
        for update in edited.edit.updates:
            touched = [part.expert for part in update.parts if part.parameter == name and part.expert is not None]
            values, first = (values[touched], first[touched]) if touched else (values, first)
        assert torch.equal(values, first), name


def test_the_edit_is_applied_again_with_the_same_bytes(edited, tmp_path):
    loaded = copy_of(edited.unedited)
    edit = rocr.Edit.load(edited.path.parent / "edit.safetensors")  # applying it replaces its records
    edit.apply(loaded.model)
    save_edited_gguf(loaded, edit, tmp_path)
    assert (tmp_path / "m.gguf").read_bytes() == edited.out.read_bytes()
    with pytest.raises(VerificationError, match=r"ffn_down_\w+\.weight in .* is not the tensor after this edit"):
        save_edited_gguf(edited.unedited, edited.edit, tmp_path, reverted=True)


@pytest.mark.parametrize("kind", [pytest.param("F32", marks=pytest.mark.slow), "BF16", "Q8_0"])
def test_experts_that_are_not_edited_get_their_bytes_back_from_another_type(kind, edited, tmp_path):
    loaded, edit = copy_of(edited.unedited), rocr.Edit.load(edited.path.parent / "edit.safetensors")
    edit.apply(loaded.model)
    for name in ("other", "back"):
        (tmp_path / name).mkdir()
    saved = save_edited_gguf(loaded, edit, tmp_path / "other", kind=kind)
    saved.edit.save(tmp_path / "edit.safetensors")
    tensors = read_gguf_layout(tmp_path / "other" / "m.gguf").tensors
    assert {tensors[name].kind for name in tensors_of(edited)} == {kind}
    stored = rocr.Edit.load(tmp_path / "edit.safetensors")
    save_edited_gguf(load_model(find_model(str(tmp_path / "other" / "m.gguf"))), stored, tmp_path / "back", True)
    assert (tmp_path / "back" / "m.gguf").read_bytes() == edited.path.read_bytes()


def test_the_adapter_has_a_pair_for_each_expert(edited, tmp_path):
    layers = write_gguf_lora(edited.edit, edited.loaded.source, 5, tmp_path)
    tensors, changed = read_gguf_layout(tmp_path / "lora.gguf").tensors, tensors_of(edited)
    assert set(tensors) == {f"{name}.lora_{end}" for name in changed for end in "ab"} and len(layers) == len(changed)
    alpha = gguf.GGUFReader(tmp_path / "lora.gguf").fields["adapter.lora.alpha"].parts[-1][0]
    for update in edited.edit.updates:
        delta = update.factors.left @ update.factors.right
        for part, place in zip(update.parts, update.columns, strict=True):
            name = f"blk.{update.layer}.ffn_down_{'shexp' if part.expert is None else 'exps'}.weight"
            a, b = (tensors[f"{name}.lora_{end}"].read() for end in "ab")
            assert alpha == b.shape[-1]  # llama.cpp multiplies by alpha / rank
            product = b @ a
            if part.expert is not None:
                others = [expert for expert in range(8) if expert not in changed[name]]
                assert product.shape[0] == 8 and not product[others].any()
                product = product[part.expert]
            torch.testing.assert_close(product, delta[:, place], rtol=1e-5, atol=1e-6)


def test_a_damaged_record_is_refused(edited, written, tmp_path):
    update = edited.edit.updates[0]
    first, *others = update.applied.stored
    sentence = "does not give its first bytes"
    flaws = [
        (InputError, r"no record of blk\.1", ()),
        (VerificationError, sentence, (replace(first, sha256="0" * 64), *others)),
        (VerificationError, sentence, (replace(first, data=torch.zeros(5, dtype=torch.uint8)), *others)),
    ]
    for kind, sentence, records in flaws:
        bad = replace(update, applied=replace(update.applied, stored=records))
        edit = replace(edited.edit, updates=[bad, edited.edit.updates[1]])
        with pytest.raises(kind, match=sentence):
            save_edited_gguf(written, edit, tmp_path, reverted=True)
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_loaded_in_bfloat16_gives_nearly_the_same_file(tokenizer, texts, tmp_path):
    made = edited_model("Qwen2Moe", "Q8_0", tokenizer, texts, tmp_path, torch.bfloat16)
    before, after = read_gguf_layout(made.path), read_gguf_layout(made.out)
    for update in made.edit.updates:
        assert update.applied.dtype == "torch.float32"
        for part, place in zip(update.parts, update.columns, strict=True):
            name = f"blk.{update.layer}.ffn_down_{'shexp' if part.expert is None else 'exps'}.weight"
            pick = ... if part.expert is None else part.expert
            exact = before.tensors[name].read()[pick] + update.factors.left @ update.factors.right[:, place]
            found = after.tensors[name].read()[pick]
            assert float((found - exact).abs().max()) <= float(exact.abs().max()) / 127
    (tmp_path / "back").mkdir()
    save_edited_gguf(load_model(find_model(str(made.out))), made.edit, tmp_path / "back", reverted=True)
    assert (tmp_path / "back" / "m.gguf").read_bytes() == made.path.read_bytes()


def test_experts_that_transformers_does_not_load_are_refused(tokenizer, tmp_path):
    """Files of Mixtral have the architecture of the dense Llama, whose MLPs they lack."""
    path = write_mixture_gguf(build_mixture("Mixtral", len(tokenizer)), "Mixtral", tokenizer, tmp_path / "m.gguf")
    with pytest.raises(
        InputError, match=r"lacks 15 .* holds experts \(blk\.0\.ffn_gate_exps\.weight\)\. .* is 'llama'"
    ):
        load_model(find_model(str(path)))


def test_a_file_is_read_while_it_is_loaded(tokenizer, tmp_path):
    """The reader of the package gguf is replaced while transformers loads a file; its layout can be read then too."""
    path = write_mixture_gguf(build_mixture("Qwen3Moe", len(tokenizer)), "Qwen3Moe", tokenizer, tmp_path / "m.gguf")
    with fast_reader():
        assert read_gguf_layout(path).tensors.keys() == read_gguf_layout(path).tensors.keys()
        assert not isinstance(gguf.GGUFReader, type)
    assert isinstance(gguf.GGUFReader, type)
