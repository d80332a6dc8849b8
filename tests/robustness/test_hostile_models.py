"""Model folders and settings made to do harm: rocr's own errors, soon, and nothing is written."""

import json
import shutil
import struct

import pytest
import torch

import rocr
from rocr import EditConfig, InputError
from tests.support.hostile import DEEP, DOWN_PROJECTION, FOLDER_PLACES, HUGE, NORM, PICKLE, WEIGHTS, short

pytestmark = pytest.mark.usefixtures("one_thread")
GENERATION, SETTINGS, TOKENIZER = "generation_config.json", "tokenizer_config.json", "tokenizer.json"
TEXTS = {
    GENERATION: {"no JSON": "{", "deep": DEEP},
    SETTINGS: {"no JSON": "nonsense", "deep": DEEP, "a list": "[]"},
    TOKENIZER: {"empty": "", "no JSON": "nonsense", "a list": "[]", "deep": DEEP, "no model": '{"version": "1.0"}'},
    WEIGHTS: {"empty": "", "text": "no tensors", "a pickle": PICKLE},
    "adapter_config.json": {"an adapter": '{"peft_type": "LORA"}'},
}
CUTS = {"of 8 bytes": 8, "cut in the header": 300, "cut in half": 40_000, "a byte short": -1}
TENSORS = {
    "without a tensor": lambda tensors: tensors.pop(NORM),
    "without a down-projection": lambda tensors: tensors.pop(DOWN_PROJECTION),
    "with a tensor of another shape": lambda tensors: tensors.update({NORM: torch.zeros(7)}),
    "with none of the names": lambda tensors: (tensors.clear(), tensors.update(x=torch.zeros(2))),
}
PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth")
FOLDERS = {
    **{f"{file}: {name}": lambda f, file=file, text=text: f.write(file, text)
       for file, texts in TEXTS.items() for name, text in texts.items()},
    f"{TOKENIZER}: cut": lambda f: f.edit(TOKENIZER, lambda whole: whole[:500]),
    f"{TOKENIZER}: a link out": lambda f: f.put(TOKENIZER, "a link out"),
    **{f"weights {place}": lambda f, place=place: f.put(WEIGHTS, place) for place in FOLDER_PLACES},
    **{f"weights {name}": lambda f, size=size: f.edit(WEIGHTS, lambda whole: whole[:size])
       for name, size in CUTS.items()},
    **{f"weights with a header of {size:,}":
       lambda f, size=size: f.edit(WEIGHTS, lambda whole: struct.pack("<Q", size) + whole[8:])
       for size in (2**63, 10**10, 2)},
    **{f"weights {name}": lambda f, change=change: f.weights(change) for name, change in TENSORS.items()},
    **{f"weights in {name}": lambda f, name=name: (f.put(WEIGHTS, "missing"), f.write(name, PICKLE))
       for name in PICKLES},
    "an adapter in a bin": lambda f: (f.put(WEIGHTS, "missing"), f.write("adapter_config.json", "{}"),
                                      f.write("adapter_model.bin", PICKLE)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_model_folders(name, hostile_folder, on_folder):
    FOLDERS[name](hostile_folder)
    on_folder("model folders")


def test_links_within_a_folder_and_into_a_hub_cache_are_followed(files, tmp_path, command):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    shutil.copytree(files.model, snapshot)
    blobs.mkdir()
    shutil.move(snapshot / "model.safetensors", blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    done = command("stats", snapshot, "--text", files.text, "--layers", "1", "--out", tmp_path / "out")
    assert done.code == 0, done.errors


NAN, INFINITE, HUGE_NUMBER = float("nan"), float("inf"), 10**400
NO_SETTINGS = [5, None, "x", [], [("ridge", 1)], {"speed": 1}, {"": 1}, {HUGE: 1}, {"\u202ea": 1}]
VALUES = {
    "layers": [5, [], [1, 1], [-1], ["1"], [True], [1.0], "1,2", {"1": 2}, [[1]], [1] * 10**6],
    "method": [5, [], {}, "rome", HUGE, None],
    "ridge": [0, -1, "2", None, True, NAN, INFINITE, HUGE_NUMBER, 1e200, [1], {}],
    "gamma": [-0.1, NAN, -INFINITE, "1", HUGE_NUMBER],
    "threshold": [0, NAN, "a"],
    "strength": [0, HUGE_NUMBER, -1, INFINITE, None],
    "least_closed": [1, -0.1, 1.5, "0.9", None, True, NAN, HUGE_NUMBER],
    "relative_ridge": [1, "yes"],
    "relative_threshold": [None, 0],
    "templates": [
        *(5, None, [], "{}{}", ["no name"], [5], [None], [{}], [{"text": 5}], [{"text": "{}", "chat": "yes"}]),
        *([{"text": "{}", "answer": 5}], [{"text": "{}", "more": 5}], [{"text": HUGE}], {"text": "{}"}),
    ],
    "key_tokens": ["first", 1],
    "keys_per_concept": ["some", ["all"]],
    "contexts": ["other", None],
    "seed": [-1, True, 1.5, "0", 2**63, HUGE_NUMBER, None, NAN],
}
CASES = [*NO_SETTINGS, *({field: value} for field, values in VALUES.items() for value in values)]


@pytest.mark.parametrize("settings", CASES, ids=short)
def test_hostile_settings(settings, tally):
    with pytest.raises(InputError) as caught:
        EditConfig.from_json(settings)
    assert len(str(caught.value)) < 500
    tally("bad settings refused")


def test_the_settings_of_an_edit_survive_json(loaded_edit):
    assert rocr.EditConfig.from_json(json.loads(json.dumps(loaded_edit.config.to_json()))) == loaded_edit.config
