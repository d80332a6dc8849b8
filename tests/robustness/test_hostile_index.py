"""An index of weight files made to do harm is refused by its name and soon, and nothing is written."""

import json

import pytest

from tests.support.hostile import (
    DIGITS,
    FOLDER_PLACES,
    HEAD,
    INDEX,
    NO_OBJECTS,
    NORM,
    PICKLE,
    TERMINAL,
    WEIGHTS,
    ZERO_WIDTH,
)

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
SECOND = "second.safetensors"


def to_shard(damage):
    """Put one tensor into a second file, which is damaged."""

    def make(folder):
        folder.shard(SECOND, NORM)
        folder.index({NORM: SECOND})
        damage(folder)

    return make


TEXTS = NO_OBJECTS | {
    "a deep map": '{"weight_map": ' + '{"a":' * 100_000,
    "over the limit": b" " * (33 * 2**20),
    "a number of 10,000 digits": f'{{"weight_map": {{}}, "x": {DIGITS}}}',
    "cut": '{"weight_map": {"model.norm.weight": "model.safe',
    "a comma too many": '{"weight_map": {"a": "model.safetensors",}}',
    "no map": "{}",
    "an empty map": '{"weight_map": {}}',
    "a map twice": '{"weight_map": {}, "weight_map": {}}',
    "a tensor twice": f'{{"weight_map": {{"{NORM}": "{WEIGHTS}", "{NORM}": "other.safetensors"}}}}',
    "another name for the map": f'{{"weightmap": {{"{NORM}": "{WEIGHTS}"}}}}',
}
MAPS = {"a list": [WEIGHTS], "text": WEIGHTS, "a number": 5, "true": True, "lists": [[NORM, WEIGHTS]]}
NAMES = {
    "a file above": "../model.safetensors",
    "far above": "../" * 50 + "etc/x.safetensors",
    "a file above and back": "../bad/model.safetensors",
    "an absolute path": "/etc/hostname.safetensors",
    "a device": "/dev/zero.safetensors",
    "a folder below": "a/model.safetensors",
    "this folder": "./model.safetensors",
    "a backslash": "..\\model.safetensors",
    "a drive": "C:\\model.safetensors",
    "a home": "~/model.safetensors",
    "an address": "https://example.org/model.safetensors",
    "a file address": "file:///etc/model.safetensors",
    "a dot": ".",
    "two dots": "..",
    "nothing": "",
    "a blank": " ",
    "a slash at the end": "model.safetensors/",
    "a blank at the end": "model.safetensors ",
    "capitals": "MODEL.SAFETENSORS",
    "a pickle": "pytorch_model.bin",
    "a pickle after it": "model.safetensors.bin",
    "code": "modeling.py",
    "the config": "config.json",
    "only the ending": ".safetensors",
    "what is missing": "model-00002-of-00002.safetensors",
    "10 MB": "x" * 10**7 + ".safetensors",
    "300 characters": "x" * 300 + ".safetensors",
    "a zero byte": "a\0.safetensors",
    "a line": "a\n.safetensors",
    "an escape": "\x1b[2J.safetensors",
    "an override": "\u202esrotcnetefas.safetensors",
    "a zero-width space": "model\u200b.safetensors",
    "a surrogate": "\ud800.safetensors",
    "letters that look alike": "m\u043edel.safetensors",
    "a number": 3,
    "null": None,
    "true": True,
    "a list": [WEIGHTS],
    "an object": {"file": WEIGHTS},
}
CASES = {
    **{f"text: {name}": lambda f, text=text: f.write(INDEX, text) for name, text in TEXTS.items()},
    **{f"map: {name}": lambda f, value=value: f.index(value) for name, value in MAPS.items()},
    **{f"file: {name}": lambda f, value=value: f.index({NORM: value}) for name, value in NAMES.items()},
    "a tensor that the file lacks": lambda f: f.index({"nonesuch": WEIGHTS}),
    "a tensor without a name": lambda f: f.index({"": WEIGHTS}),
    "a tensor of 10 MB": lambda f: f.index({"t" * 10**7: WEIGHTS}),
    "an invisible tensor": lambda f: f.index({f"{NORM}{ZERO_WIDTH}": WEIGHTS}),
    "a tensor to steer the terminal": lambda f: f.index({TERMINAL: WEIGHTS}),
    "a tensor that is a path": lambda f: f.index({"../../etc/passwd": WEIGHTS}),
    "a hundred thousand tensors that are not there": lambda f: f.index({f"t{i}": WEIGHTS for i in range(10**5)}),
    "a hundred thousand files": lambda f: f.index({f"t{i}": f"{i}.safetensors" for i in range(10**5)}),
    **{place: lambda f, place=place: f.put(INDEX, place) for place in FOLDER_PLACES if place != "missing"},
    "weights that are missing": lambda f: (f.index(), f.put(WEIGHTS, "missing")),
    "a shard that is empty": to_shard(lambda f: f.write(SECOND, b"")),
    "a shard that is cut": to_shard(lambda f: f.edit(SECOND, lambda whole: whole[:-1])),
    "a shard that is too long": to_shard(lambda f: f.edit(SECOND, lambda whole: whole + b"\0")),
    "a shard that is a pickle": to_shard(lambda f: f.write(SECOND, PICKLE)),
    "a shard with a huge header": to_shard(lambda f: f.edit(SECOND, lambda w: b"\xff" * 6 + b"\0\0" + w[8:])),
    **{f"a shard that is {place}": to_shard(lambda f, place=place: f.put(SECOND, place)) for place in FOLDER_PLACES},
    "a tensor in two files": to_shard(lambda f: None),
    "a shard with another tensor": lambda f: (f.shard("b.safetensors", HEAD), f.index({NORM: "b.safetensors"})),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hostile_indexes(name, hostile_folder, on_folder):
    CASES[name](hostile_folder)
    on_folder("safetensors indexes")


def test_a_right_index_is_accepted(hostile_folder, files, command, tmp_path):
    hostile_folder.index()
    assert json.loads((hostile_folder.path / INDEX).read_text())["weight_map"][NORM] == WEIGHTS
    done = command("stats", hostile_folder.path, "--text", files.text, "--layers", "1", "--out", tmp_path / "out")
    assert done.code == 0, done.errors
