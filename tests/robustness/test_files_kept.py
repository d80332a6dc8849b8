"""Outputs keep all tensors and files of the input, whatever transformers loads of them."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import rocr
from rocr.model.load import find_model, load_model
from rocr.model.load_partial import load_partial
from tests.support.vision import qwen3_5

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]
EDITED = {f"{prefix}layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3) for prefix in ("model.", "")}
INNER = [name.replace("model.", "model.language_model.") for name in DOWN]


def tensors(folder):
    """Every tensor of the weight files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {} if path.name == "edit.safetensors" else load_file(path)
    return found


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


def change(folder, rewrite):
    """Rewrite the tensors of a folder's one weight file."""
    found = load_file(folder / WEIGHTS)
    save_file({n: t.clone().contiguous() for n, t in rewrite(found).items()}, folder / WEIGHTS, {"format": "pt"})


def settings(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cast(dtype, names=""):
    """The tensors whose names hold a text, in a dtype."""
    return lambda found: {n: t.to(dtype) if names in n else t for n, t in found.items()}


def half_but(names):
    return lambda found: {n: t if names in n else t.bfloat16() for n, t in found.items()}


def sharded(folder, model, index):
    """A model in small files, with an index that is changed."""
    model.save_pretrained(folder, max_shard_size="60KB")
    path = folder / INDEX
    found = json.loads(path.read_text())
    index(found["weight_map"])
    path.write_text(json.dumps(found))


def stale(folder, make_model):
    """A newer model.safetensors beside older shards and their index."""
    make_model("Llama", seed=1).save_pretrained(folder, max_shard_size="60KB")
    make_model("Llama").save_pretrained(folder / "new")
    (folder / "new" / WEIGHTS).rename(folder / WEIGHTS)
    for path in [*(folder / "new").iterdir()]:
        path.unlink()
    (folder / "new").rmdir()


def saved(rewrite, **config):
    def make(folder, make_model):
        tied = {name: value for name, value in config.items() if name == "tie_word_embeddings"}
        make_model("Llama", **tied).save_pretrained(folder)
        change(folder, rewrite)
        settings(folder, **config)

    return make


def base_model(folder, make_model):
    make_model("Llama", tie_word_embeddings=True).model.save_pretrained(folder)
    settings(folder, architectures=["LlamaForCausalLM"])


EXTRA = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.5.mlp.down_proj.weight": torch.ones(32, 48),
    "mtp.layers.0.mlp.down_proj.weight": torch.ones(32, 48),
    "score.weight": torch.ones(2, 32),
}
FOLDERS = {
    "settings of half precision": saved(cast(torch.float32), dtype="bfloat16"),
    "settings of float16": saved(cast(torch.float32), dtype="float16"),
    "files of half precision": saved(cast(torch.bfloat16), dtype="float32"),
    "norms in float32": saved(half_but("norm"), dtype="bfloat16"),
    "down-projections in float32": saved(half_but("down_proj"), dtype="bfloat16"),
    "down-projections in half precision": saved(cast(torch.bfloat16, "down_proj"), dtype="float32"),
    "tensors that the class ignores": saved(lambda found: found | EXTRA),
    "tied embeddings stored twice": saved(
        lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"]}, tie_word_embeddings=True
    ),
    "tied embeddings stored twice and differing": saved(
        lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"] + 1}, tie_word_embeddings=True
    ),
    "weights under two names": saved(
        lambda found: found | {n.removeprefix("model."): t for n, t in found.items() if "down_proj" in n}
    ),
    "names without the first part": base_model,
    "an index that leaves a weight out": lambda folder, make: sharded(
        folder, make("Llama"), lambda index: index.pop(DOWN[0])
    ),
    "older shards and their index": stale,
}


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder with a tokenizer, for weights of one's own."""
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def edited(folder, files, concept, command, tmp_path):
    """edited(options): the folder's model edited into "out", which verify must find right; the report."""

    def run(*options, out="out"):
        done = command("unlearn", folder, *concept, "--text", files.text, *options, "--out", tmp_path / out, "--json")
        assert done.code == 0, done.errors
        assert command("verify", tmp_path / out).code == 0, command("verify", tmp_path / out).errors
        return json.loads(done.output) | {"warnings": done.errors}

    return run


def check_round_trip(folder, command, tmp_path):
    """Nothing but the edit differs; apply repeats it, and revert gives every first tensor back."""
    first, out = tensors(folder), tensors(tmp_path / "out")
    assert set(first) == set(out)
    different = {name for name in out if not same(first[name], out[name])}
    assert different and different <= {*EDITED, *INNER}
    assert all(first[name].dtype == out[name].dtype for name in out)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())
    done = command("revert", tmp_path / "out", "--out", tmp_path / "back")
    assert done.code == 0, done.errors
    back = tensors(tmp_path / "back")
    assert set(back) == set(out) and all(same(first[name], back[name]) for name in back)
    done = command("apply", folder, tmp_path / "out" / "edit.safetensors", "--out", tmp_path / "again")
    assert done.code == 0, done.errors
    again = tensors(tmp_path / "again")
    assert set(again) == set(out) and all(same(again[name], out[name]) for name in out)
    done = command("verify", tmp_path / "back", "--edit", tmp_path / "out" / "edit.safetensors")
    assert done.code == 0, done.errors
    return different


IN_PART = (
    "settings of half precision",
    "norms in float32",
    "down-projections in float32",
    "names without the first part",
    "an index that leaves a weight out",
    "older shards and their index",
)
"""Of these folders, a model loaded in part is edited as the whole is."""


@pytest.mark.parametrize("kind", FOLDERS)
def test_everything_but_the_edit_is_kept(kind, folder, edited, make_model, command, tmp_path):
    FOLDERS[kind](folder, make_model)
    report = edited("--token-schedule", "full", "--retain-weight", "0")
    different = check_round_trip(folder, command, tmp_path)
    assert different == {name for weight in report["weights"] for name in weight["stored"]}
    if kind in IN_PART:
        edited("--partial", "--token-schedule", "full", "--retain-weight", "0", out="part")
        whole, part = tensors(tmp_path / "out"), tensors(tmp_path / "part")
        assert set(whole) == set(part) and all(same(whole[name], part[name]) for name in whole)


@pytest.mark.parametrize(
    ("stored", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_a_dtype_that_was_asked_for_is_that_of_the_memory_alone(
    stored, loaded, folder, edited, make_model, command, tmp_path
):
    make_model("Llama").to(getattr(torch, stored)).save_pretrained(folder)
    report = edited("--dtype", loaded)
    first, out = tensors(folder), tensors(tmp_path / "out")
    edit = rocr.Edit.load(tmp_path / "out" / "edit.safetensors")
    for update, weight in zip(edit.updates, report["weights"], strict=True):
        before, after = first[update.parameter], out[update.parameter]
        exact = before.double() + update.factors.left.double() @ update.factors.right.double()
        step = torch.finfo(before.dtype).eps * exact.abs().clamp(min=1e-6) + 1e-6
        assert ((after.double() - exact).abs() <= step).all(), "one rounding, to the dtype of the file"
        assert update.applied.dtype == f"torch.{stored}"
        assert (weight["dtype"], weight["loaded"]) == (stored, loaded)
        assert weight["surviving"] == pytest.approx(float((before != after).double().mean()))
    assert f"stored as {stored} and loaded as {loaded}" in report["warnings"].replace("\n", " ")
    assert {n for n in first if not same(first[n], out[n])} == set(DOWN)
    done = command("revert", tmp_path / "out", "--dtype", loaded, "--out", tmp_path / "back")
    assert done.code == 0 and all(same(first[n], t) for n, t in tensors(tmp_path / "back").items())
    # The edit is on the files already, whatever they are loaded as.
    given = (tmp_path / "out", tmp_path / "out" / "edit.safetensors", "--out", tmp_path / "twice")
    done = command("apply", *given, "--dtype", loaded)
    assert done.code == 2 and "holds this edit already" in done.errors.replace("\n", " ")


def test_files_in_float32_are_edited_as_such_though_the_settings_say_half_precision(folder, make_model, tmp_path):
    make_model("Llama").save_pretrained(folder)
    settings(folder, dtype="bfloat16")
    source = find_model(str(folder))
    for loaded in (load_model(source), load_partial(source, 2)):
        assert loaded.model.model.layers[1].mlp.down_proj.weight.dtype == torch.float32


def test_a_beginning_with_norms_in_float32_computes_as_the_whole(folder, make_model):
    saved(half_but("norm"))(folder, make_model)
    source = find_model(str(folder))
    whole, part = load_model(source).model, load_partial(source, 2).model
    for name, parameter in part.model.layers[:3].named_parameters():
        assert same(parameter, whole.model.layers[:3].get_parameter(name)), name


@pytest.mark.parametrize("kind", ["stale", "unnamed"])
def test_weights_that_are_not_loaded_are_named_and_stay_out(kind, folder, edited, make_model, tmp_path):
    make_model("Llama").save_pretrained(folder)
    if kind == "stale":
        stale(folder, make_model)
        others = {path.name for path in folder.glob("model-*.safetensors")}
    else:
        others = {"consolidated.safetensors", "training_args.bin"}
        save_file({"layers.1.feed_forward.w2.weight": torch.ones(32, 48)}, folder / "consolidated.safetensors")
        (folder / "training_args.bin").write_bytes(b"a pickle")
        save_file({"projector.weight": torch.ones(7, 9)}, folder / "projector.safetensors")
    report = edited()
    assert others and set(report["left_out"]) == others
    assert all(name in report["warnings"] for name in sorted(others)[:2])
    assert not others & {path.name for path in (tmp_path / "out").iterdir()}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"].values()) == {WEIGHTS}
    assert set(index["weight_map"]) == set(load_file(tmp_path / "out" / WEIGHTS))
    if kind == "unnamed":
        assert report["beside"] == ["projector.safetensors"]
        assert (tmp_path / "out" / "projector.safetensors").samefile(folder / "projector.safetensors")


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_a_vision_language_checkpoint_keeps_its_tower_and_its_class(
    partial, folder, edited, tokenizer, command, tmp_path
):
    qwen3_5(len(tokenizer)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    report = edited(*(["--partial"] if partial else []))
    assert check_round_trip(folder, command, tmp_path) == set(INNER)
    assert [weight["stored"] for weight in report["weights"]] == [[name] for name in INNER]
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_an_adapter_of_a_vision_language_checkpoint_loads_onto_both_classes(folder, edited, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    qwen3_5(len(tokenizer)).save_pretrained(folder)
    edited("--save", "edit,lora")
    edit = rocr.Edit.load(tmp_path / "out" / "edit.safetensors")
    assert [(update.parameter, update.own) for update in edit.updates] == list(zip(INNER, DOWN, strict=True))
    whole = transformers.Qwen3_5ForConditionalGeneration
    for kind, names in ((transformers.AutoModelForCausalLM, DOWN), (whole, INNER)):
        base = kind.from_pretrained(folder)
        before = {name: base.get_parameter(name).clone() for name in names}
        merged = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "lora").merge_and_unload()
        for name, update in zip(names, edit.updates, strict=True):
            expected = before[name] + update.factors.left @ update.factors.right
            torch.testing.assert_close(merged.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


def test_alternating_layers_are_edited_and_verified(folder, edited, make_model, command, tmp_path):
    config = {"mlp_only_layers": [0, 1, 3], "num_experts_per_tok": 2, "head_dim": 8}
    make_model("Qwen3Moe", **config).save_pretrained(folder)
    edited("--layers", "1,3")  # around a mixture, whose experts are stored one by one and held as one
    check_round_trip(folder, command, tmp_path)


def test_weights_stored_in_another_layout_are_refused_before_the_edit(
    folder, files, concept, command, make_model, tmp_path
):
    from transformers.conversion_mapping import _checkpoint_conversion_mapping_cache as rules
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    saved(lambda found: {n: t.T if "down_proj" in n else t for n, t in found.items()})(folder, make_model)
    rule = WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", operations=[Transpose(0, 1)])
    register_checkpoint_conversion_mapping("LlamaForCausalLM", [rule])
    try:
        given = ("unlearn", folder, *concept, "--text", files.text, "--out", tmp_path / "out")
        for more in ((), ("--dry-run",)):
            done = command(*given, *more)
            said = done.errors.replace("\n", " ")
            assert done.code == 2 and DOWN[0] in said and "store it in another layout" in said, said
            assert "targets" not in said, "nothing was edited"
        assert not (tmp_path / "out").exists()
        done = command(*given, "--save", "edit,lora")
        assert done.code == 0, done.errors
    finally:
        if rules is not None:
            rules.pop("LlamaForCausalLM", None)


@pytest.mark.parametrize("kind", ["another file", "differing names", "float64"])
def test_what_was_not_loaded_from_the_files_is_not_written(kind, folder, files, concept, command, make_model, tmp_path):
    make_model("Llama").save_pretrained(folder)
    if kind == "another file":  # transformers loads the file that the settings name
        change_of_head = load_file(folder / WEIGHTS)
        change_of_head["lm_head.weight"] = change_of_head["lm_head.weight"] + 1
        save_file(change_of_head, folder / "other.safetensors", {"format": "pt"})
        settings(folder, transformers_weights="other.safetensors")
    elif kind == "differing names":
        change(folder, lambda found: found | {n.removeprefix("model."): found[n] + 1 for n in DOWN})
    else:
        change(folder, cast(torch.float64, "down_proj"))
    done = command("unlearn", folder, *concept, "--text", files.text, "--out", tmp_path / "out")
    said = done.errors.replace("\n", " ")
    assert done.code == 2 and ("F64" if kind == "float64" else "was loaded with other values") in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_a_tensor_that_is_missing_is_noticed(partial, folder, edited, make_model, command, tmp_path):
    sharded(folder, make_model("Llama"), lambda index: None)
    edited(*(["--partial"] if partial else []))
    out = tmp_path / "out"
    name = "model.layers.4.input_layernorm.weight"
    index = json.loads((out / INDEX).read_text())
    shard = out / index["weight_map"].pop(name)
    left = load_file(shard)
    del left[name]
    shard.unlink()  # it may be a link to the input
    save_file(left, shard, {"format": "pt"})
    (out / INDEX).write_text(json.dumps(index))
    done = command("verify", out, "--json")
    assert done.code == 3
    failed = {c["subject"]: c for c in json.loads(done.output)["checks"] if c["state"] == "failed"}
    assert failed["tensors"]["what"] == "complete"


@pytest.mark.parametrize("parts", ["model,edit", "model,originals"])
def test_files_of_folders_below_are_kept(parts, folder, edited, make_model, command, tmp_path):
    make_model("Llama").save_pretrained(folder)
    for name in ("additional_chat_templates/tool.jinja", ".git/config", "lora/adapter_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    report = edited("--save", parts)
    kept = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert "additional_chat_templates/tool.jinja" in kept
    assert not kept & {".git/config", "lora/adapter_config.json"}
    assert "additional_chat_templates/tool.jinja" in report["files"]
    assert command("revert", tmp_path / "out", "--out", tmp_path / "back").code == 0
    assert (tmp_path / "back" / "additional_chat_templates" / "tool.jinja").read_text() == "{}"
