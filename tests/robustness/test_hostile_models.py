"""Model folders and settings that somebody made to do harm: rocr's own errors, quickly, nothing written."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import rocr
from rocr import EditConfig, InputError

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = "[" * 100_000
PICKLE = (
    b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94"
    b"\x93\x94\x8c\x04true\x94\x85\x94R\x94."
)


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def changed(name, *path_and_value):
    """Change one value of a JSON file."""

    def change(folder):
        *path, last, value = path_and_value
        document = place = json.loads((folder / name).read_text())
        for step in path:
            place = place[step]
        place[last] = value
        (folder / name).write_text(json.dumps(document))

    return change


def removed(name):
    return lambda folder: (folder / name).unlink()


def linked(name, target):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def weights(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def pickled(name):
    def write(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(PICKLE)

    return write


def header_of(size):
    def write(folder):
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])

    return write


def cut(length):
    def write(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])

    return write


NORM = "model.norm.weight"
DOWN_PROJECTION = "model.layers.1.mlp.down_proj.weight"
FOLDERS = {
    "generation settings no JSON": content("generation_config.json", "{"),
    "generation settings deep": content("generation_config.json", DEEP),
    "tokenizer settings no JSON": content("tokenizer_config.json", "nonsense"),
    "tokenizer settings deep": content("tokenizer_config.json", DEEP),
    "tokenizer settings a list": content("tokenizer_config.json", "[]"),
    "tokenizer empty": content("tokenizer.json", ""),
    "tokenizer no JSON": content("tokenizer.json", "nonsense"),
    "tokenizer a list": content("tokenizer.json", "[]"),
    "tokenizer deep": content("tokenizer.json", DEEP),
    "tokenizer without a model": content("tokenizer.json", '{"version": "1.0"}'),
    "tokenizer cut": lambda folder: content("tokenizer.json", (folder / "tokenizer.json").read_bytes()[:500])(folder),
    "tokenizer a link out": linked("tokenizer.json", "/etc/hostname"),
    "weights missing": removed("model.safetensors"),
    "weights empty": cut(0),
    "weights of 8 bytes": cut(8),
    "weights cut in the header": cut(300),
    "weights cut in half": cut(40_000),
    "weights a byte short": cut(-1),
    "weights with a header of 2**63": header_of(2**63),
    "weights with a header of 10 GB": header_of(10**10),
    "weights with a header of 2": header_of(2),
    "weights that are text": content("model.safetensors", "no tensors"),
    "weights that are a pickle": content("model.safetensors", PICKLE),
    "weights a link out": linked("model.safetensors", "/etc/hostname"),
    "weights a device": linked("model.safetensors", "/dev/zero"),
    "weights a folder": lambda folder: (removed("model.safetensors")(folder), (folder / "model.safetensors").mkdir()),
    "weights without a tensor": weights(lambda tensors: tensors.pop(NORM)),
    "weights without a down-projection": weights(lambda tensors: tensors.pop(DOWN_PROJECTION)),
    "weights with a tensor of another shape": weights(lambda tensors: tensors.update({NORM: torch.zeros(7)})),
    "weights with none of the names": weights(lambda tensors: tensors.update({"x": tensors.clear() or torch.zeros(2)})),
    "weights in a bin": pickled("pytorch_model.bin"),
    "weights in a pt": pickled("model.pt"),
    "weights in a pth": pickled("consolidated.00.pth"),
    "an adapter": content("adapter_config.json", '{"peft_type": "LORA"}'),
    "an adapter in a bin": lambda f: (content("adapter_config.json", "{}")(f), pickled("adapter_model.bin")(f)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_model_folders(name, hostile_folder, on_folder):
    FOLDERS[name](hostile_folder.path)
    on_folder("model folders")


def test_links_within_a_folder_and_into_a_hub_cache_are_followed(files, tmp_path, command):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    shutil.copytree(files.model, snapshot)
    blobs.mkdir()
    shutil.move(snapshot / "model.safetensors", blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    done = command("stats", snapshot, "--text", files.text, "--layers", "1", "--out", tmp_path / "out")
    assert done.code == 0, done.errors


SETTINGS = [
    5, None, "x", [], [("ridge", 1)], {"speed": 1}, {"": 1}, {"x" * 10**7: 1}, {"\u202ea": 1},
    {"layers": 5}, {"layers": []}, {"layers": [1, 1]}, {"layers": [-1]}, {"layers": ["1"]}, {"layers": [True]},
    {"layers": [1.0]}, {"layers": "1,2"}, {"layers": {"1": 2}}, {"layers": [[1]]}, {"layers": [1] * 10**6},
    {"method": 5}, {"method": []}, {"method": {}}, {"method": "rome"}, {"method": "x" * 10**7}, {"method": None},
    {"ridge": 0}, {"ridge": -1}, {"ridge": "2"}, {"ridge": None}, {"ridge": True}, {"ridge": float("nan")},
    {"ridge": float("inf")}, {"ridge": 10**400}, {"ridge": 1e200}, {"ridge": [1]}, {"ridge": {}},
    {"gamma": -0.1}, {"gamma": float("nan")}, {"gamma": -float("inf")}, {"gamma": "1"}, {"gamma": 10**400},
    {"threshold": 0}, {"threshold": float("nan")}, {"threshold": "a"}, {"strength": 0}, {"strength": 10**400},
    {"strength": -1}, {"strength": float("inf")}, {"strength": None},
    {"relative_ridge": 1}, {"relative_ridge": "yes"}, {"relative_threshold": None}, {"relative_threshold": 0},
    {"templates": 5}, {"templates": None}, {"templates": []}, {"templates": "{}{}"}, {"templates": ["no name"]},
    {"templates": [5]}, {"templates": [None]}, {"templates": [{}]}, {"templates": [{"text": 5}]},
    {"templates": [{"text": "{}", "chat": "yes"}]}, {"templates": [{"text": "{}", "answer": 5}]},
    {"templates": [{"text": "{}", "more": 5}]}, {"templates": [{"text": "x" * 10**7}]}, {"templates": {"text": "{}"}},
    {"key_tokens": "first"}, {"key_tokens": 1}, {"keys_per_concept": "some"}, {"keys_per_concept": ["all"]},
    {"contexts": "other"}, {"contexts": None}, {"seed": -1}, {"seed": True}, {"seed": 1.5}, {"seed": "0"},
    {"seed": 2**63}, {"seed": 10**400}, {"seed": None}, {"seed": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_hostile_settings(number, tally):
    with pytest.raises(InputError) as caught:
        EditConfig.from_json(SETTINGS[number])
    assert len(str(caught.value)) < 500
    tally("bad settings refused")


def test_reports_of_layers_survive_what_they_are_made_of(loaded_edit):
    assert rocr.EditConfig.from_json(json.loads(json.dumps(loaded_edit.config.to_json()))) == loaded_edit.config
