"""Indexes of weight files that somebody made to do harm: refused by name, quickly, and nothing is written."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
NORM, HEAD = "model.norm.weight", "lm_head.weight"
PICKLE = b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."


def to_shard(damage):
    """An index that puts one tensor into a second file, which is damaged."""

    def make(folder):
        folder.shard("second.safetensors", NORM)
        folder.index({NORM: "second.safetensors"})
        damage(folder, (folder.path / "second.safetensors").read_bytes())

    return make


TEXTS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "a text": '"x"',
    "deep": "[" * 100_000,
    "a deep map": '{"weight_map": ' + '{"a":' * 100_000,
    "zeros": b"\0" * 1000,
    "a pickle": PICKLE,
    "a gzip": b"\x1f\x8b\x08\x00" + b"\0" * 60,
    "not UTF-8": b'{"weight_map": {"a": "\xff"}}',
    "over the limit": b" " * (33 * 2**20),
    "a number of 10,000 digits": '{"weight_map": {}, "x": ' + "9" * 10_000 + "}",
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
    "an invisible tensor": lambda f: f.index({f"{NORM}\u200b": WEIGHTS}),
    "a tensor to steer the terminal": lambda f: f.index({"\x1b]0;title\x07": WEIGHTS}),
    "a tensor that is a path": lambda f: f.index({"../../etc/passwd": WEIGHTS}),
    "a hundred thousand tensors that are not there": lambda f: f.index({f"t{i}": WEIGHTS for i in range(10**5)}),
    "a hundred thousand files": lambda f: f.index({f"t{i}": f"{i}.safetensors" for i in range(10**5)}),
    "a link out": lambda f: f.link(INDEX, "/etc/hostname"),
    "a link to nothing": lambda f: f.link(INDEX, "nowhere"),
    "a link to itself": lambda f: f.link(INDEX, INDEX),
    "a device": lambda f: f.link(INDEX, "/dev/zero"),
    "a folder": lambda f: f.make(INDEX, "folder"),
    "a pipe": lambda f: f.make(INDEX, "pipe"),
    "weights that are missing": lambda f: (f.index(), (f.path / WEIGHTS).unlink()),
    "a shard that is empty": to_shard(lambda f, whole: f.write("second.safetensors", b"")),
    "a shard that is cut": to_shard(lambda f, whole: f.write("second.safetensors", whole[:-1])),
    "a shard that goes on": to_shard(lambda f, whole: f.write("second.safetensors", whole + b"\0")),
    "a shard that is a pickle": to_shard(lambda f, whole: f.write("second.safetensors", PICKLE)),
    "a shard with a huge header": to_shard(lambda f, w: f.write("second.safetensors", b"\xff" * 6 + b"\0\0" + w[8:])),
    "a shard that is a link out": to_shard(lambda f, whole: f.link("second.safetensors", "/etc/hostname")),
    "a shard that is a device": to_shard(lambda f, whole: f.link("second.safetensors", "/dev/zero")),
    "a shard that is a folder": to_shard(lambda f, whole: f.make("second.safetensors", "folder")),
    "a shard that is a pipe": to_shard(lambda f, whole: f.make("second.safetensors", "pipe")),
    "a tensor in two files": to_shard(lambda f, whole: None),
    "a shard with another tensor": lambda f: (f.shard("b.safetensors", HEAD), f.index({NORM: "b.safetensors"})),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hostile_indexes(name, hostile_folder, on_folder):
    CASES[name](hostile_folder)
    on_folder("safetensors indexes")


def test_an_index_that_is_right_is_no_hindrance(hostile_folder, files, command, tmp_path):
    hostile_folder.index()
    assert json.loads((hostile_folder.path / INDEX).read_text())["weight_map"][NORM] == WEIGHTS
    done = command("stats", hostile_folder.path, "--text", files.text, "--layers", "1", "--out", tmp_path / "out")
    assert done.code == 0, done.errors
