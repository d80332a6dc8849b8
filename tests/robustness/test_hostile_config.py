"""A config.json made to do harm is refused by its name and soon, and nothing is written."""

import math

import pytest

from tests.support.hostile import CONFIG, DEEP, DIGITS, FOLDER_PLACES, HUGE, NO_OBJECTS, TERMINAL, by_value

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = NO_OBJECTS | {
    "an empty object": "{}",
    "deep in a field": '{"model_type": ' + DEEP,
    "over the limit": b" " * (17 * 2**20),
    "a number of 10,000 digits": f'{{"model_type": "llama", "x": {DIGITS}}}',
    "cut": '{"model_type": "lla',
    "a field twice": '{"model_type": "llama", "model_type": "gpt2"}',
    "no model type": '{"hidden_size": 32}',
    "comments": '{"model_type": "llama" /* for now */}',
}
VALUES = {
    "model_type": ["nonesuch", HUGE, "../llama", "/etc/llama", "llama\0", TERMINAL, "\u202ellama", "", 5, [], {}],
    "num_hidden_layers": [10**6, "five", -3, 0, 6, 2.5, [], math.inf, 10**30],
    "hidden_size": [10**6, "wide", -32, 0, 16, math.nan, [32], 2**63],
    "vocab_size": [7, -1, 0, "many", 10**9, 2**63, [], math.inf],
    "intermediate_size": [-1, "wide", 7, [], math.nan],
    "num_attention_heads": [5, 0, -4, "four", [4]],
    "num_key_value_heads": [3, 0, "two"],
    "head_dim": [-8, 7, "eight"],
    "hidden_act": ["nonesuch", ["x"], 5, "__import__('os').system('true')", HUGE],
    "dtype": ["float31", "os.system"],
    "quantization_config": ["x", 5, ["x"]],
}
EVIL = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
CASES = {
    **{f"text: {name}": lambda f, text=text: f.write(CONFIG, text) for name, text in TEXTS.items()},
    **{n: lambda f, field=field, value=value: f.change(CONFIG, **{field: value})
       for n, (field, value) in by_value(VALUES).items()},
    **{place: lambda f, place=place: f.put(CONFIG, place) for place in FOLDER_PLACES},
    "code of an unknown type": lambda f: (f.change(CONFIG, **EVIL), f.write("evil.py", "open('/tmp/rocr-evil', 'w')")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hostile_configs(name, hostile_folder, on_folder):
    CASES[name](hostile_folder)
    on_folder("config.json files")
