"""config.json of models that somebody made to do harm: refused by name, quickly, and nothing is written."""

import math

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = "config.json"
PICKLE = b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
TERMINAL = "\x1b]0;title\x07\x1b[2J"

TEXTS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "a text": '"x"',
    "an empty object": "{}",
    "deep": "[" * 100_000,
    "deep in a field": '{"model_type": ' + "[" * 100_000,
    "zeros": b"\0" * 1000,
    "a pickle": PICKLE,
    "a gzip": b"\x1f\x8b\x08\x00" + b"\0" * 60,
    "not UTF-8": b'{"a": "\xff"}',
    "over the limit": b" " * (17 * 2**20),
    "a number of 10,000 digits": '{"model_type": "llama", "x": ' + "9" * 10_000 + "}",
    "cut": '{"model_type": "lla',
    "a field twice": '{"model_type": "llama", "model_type": "gpt2"}',
    "no model type": '{"hidden_size": 32}',
    "comments": '{"model_type": "llama" /* for now */}',
}
VALUES = {
    "model_type": [
        "nonesuch",
        "m" * 10**7,
        "../llama",
        "/etc/llama",
        "llama\0",
        TERMINAL,
        "\u202ellama",
        "",
        5,
        [],
        {},
    ],
    "num_hidden_layers": [10**6, "five", -3, 0, 6, 2.5, [], math.inf, 10**30],
    "hidden_size": [10**6, "wide", -32, 0, 16, math.nan, [32], 2**63],
    "vocab_size": [7, -1, 0, "many", 10**9, 2**63, [], math.inf],
    "intermediate_size": [-1, "wide", 7, [], math.nan],
    "num_attention_heads": [5, 0, -4, "four", [4]],
    "num_key_value_heads": [3, 0, "two"],
    "head_dim": [-8, 7, "eight"],
    "hidden_act": ["nonesuch", ["x"], 5, "__import__('os').system('true')", "x" * 10**7],
    "dtype": ["float31", "os.system"],
    "quantization_config": ["x", 5, ["x"]],
}
CASES = {
    **{f"text: {name}": lambda f, text=text: f.write(CONFIG, text) for name, text in TEXTS.items()},
    **{
        f"{field}: {value!r:.30}": lambda f, field=field, value=value: f.change(CONFIG, **{field: value})
        for field, values in VALUES.items()
        for value in values
    },
    "missing": lambda f: (f.path / CONFIG).unlink(),
    "a link out": lambda f: f.link(CONFIG, "/etc/hostname"),
    "a link to nothing": lambda f: f.link(CONFIG, "nowhere"),
    "a link to itself": lambda f: f.link(CONFIG, CONFIG),
    "a device": lambda f: f.link(CONFIG, "/dev/zero"),
    "a folder": lambda f: f.make(CONFIG, "folder"),
    "a pipe": lambda f: f.make(CONFIG, "pipe"),
    "code of an unknown type": lambda f: (
        f.change(CONFIG, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil"),
        f.write("evil.py", "open('/tmp/rocr-evil', 'w')"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hostile_configs(name, hostile_folder, on_folder):
    CASES[name](hostile_folder)
    on_folder("config.json files")
