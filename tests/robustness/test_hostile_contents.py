"""Statistics and edit files of the right form with impossible contents: rocr's own errors, and nothing is written."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.hostile import (
    BIDIRECTIONAL,
    HUGE,
    MISSING,
    TERMINAL,
    ZERO_WIDTH,
    by_value,
    set_value,
    split_safetensors,
)

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]


def rewrite(whole_path, change, path):
    """Write a valid file whose header and tensors are changed: by a function, or by a value at a path of the header."""
    header = json.loads(split_safetensors(whole_path)[0]["__metadata__"]["rocr"])
    tensors = load_file(whole_path)
    if callable(change):
        change(header, tensors)
    else:
        set_value(header, *change)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"rocr": json.dumps(header)})


def tensor(name, function):
    def change(_, tensors):
        tensors[name] = function(tensors[name])

    return change


def copied(name):
    def change(_, tensors):
        tensors[name] = tensors["second_moment.1"].clone()

    return change


def filled(value):
    def fill(values):
        values[0, 0] = value
        return values

    return fill


OTHER_MODEL = "0" * 64
STATISTICS = by_value(
    {
        "tokens": [MISSING, 0, -5, True, "9", 1.5, math.nan, math.inf, 10**4000],
        "text": [MISSING, ["a"], None],
        "fingerprint": [MISSING, [], None],
        "fingerprint.model": [MISSING, OTHER_MODEL],
        "fingerprint.more": [1],
        "fingerprint.tokenizer": [OTHER_MODEL],
        "fingerprint.layer": ["2", -1, True, 10**30],
        "fingerprint.name": [[HUGE]],
        "provenance": [None, [["dtype", "float32"]], {}],
        "provenance.dtype": [MISSING, "bfloat16", "float8", ["float32"], "float\u200b32"],
        "provenance.more": [1],
        "provenance.length": ["512", 1, 512.5, math.nan, 10**30],
        "provenance.skipped": [-1, True, 128],
        "provenance.config": [None, [["rms_norm_eps", 1e-6]], {"rms_norm_eps": HUGE}],
        "provenance.config.rms_norm_eps": [0.5, math.nan],
        "provenance.documents": [0, math.inf],
        "provenance.versions": [None, ["rocr", "torch", "transformers"]],
        "provenance.versions.torch": [MISSING, 2.9, HUGE],
        "provenance.versions.other": ["1"],
    }
) | {
    "not a number": tensor("second_moment.1", filled(math.nan)),
    "infinity": tensor("second_moment.1", filled(math.inf)),
    "not a number off the diagonal": tensor("second_moment.1", lambda m: m + torch.full_like(m, math.nan).triu(1)),
    "half precision": tensor("second_moment.1", lambda m: m.half()),
    "double precision": tensor("second_moment.1", lambda m: m.double()),
    "integers": tensor("second_moment.1", lambda m: m.int()),
    "not square": tensor("second_moment.1", lambda m: m[:5]),
    "three dimensions": tensor("second_moment.1", lambda m: m[None]),
    "a single number": tensor("second_moment.1", lambda m: m[0, 0].clone()),
    "no numbers": tensor("second_moment.1", lambda m: m[:0, :0]),
    "smaller than the model's": tensor("second_moment.1", lambda m: m[:5, :5]),
    "all zero": tensor("second_moment.1", lambda m: m * 0),
    "negative mean squares": tensor("second_moment.1", lambda m: -m),
    "not symmetric": tensor("second_moment.1", lambda m: m.tril()),
    "a layer less": lambda header, tensors: tensors.pop("second_moment.2"),
    "a layer named twice": copied("second_moment.01"),
    "a layer below 0": copied("second_moment.-1"),
    "a layer in other digits": copied("second_moment.\u0663"),
    "a tensor more": lambda header, tensors: tensors.update(other=torch.zeros(1)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_with_wrong_contents(name, files, tmp_path, on_statistics):
    rewrite(files.statistics, STATISTICS[name], tmp_path / "bad")
    on_statistics(tmp_path / "bad")


def bomb(header, tensors):
    """A few kilobytes that say they are gigabytes."""
    header["layers"][0]["undo"] = {"shape": [2**16, 2**16], "width": 4}
    packed = zlib.compress(b"\0" * 10**8, 9)
    tensors["layer.1.undo"] = torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy())


FIELDS = ("concepts", "config", "fingerprint", "layers", "concept_of", "report")
EDITS = by_value(
    {
        **{field: [MISSING, None, "x"] for field in FIELDS},
        "concepts": [MISSING, None, "x", [], [3]],
        "concepts.0.name": [TERMINAL, BIDIRECTIONAL, HUGE, 7],
        "concepts.0.redirect": [ZERO_WIDTH, "ada  BYRON"],
        "concepts.0.aliases": ["abc", [[]]],
        "concepts.0.kind": ["place", 1, []],
        "layers": [MISSING, None, "x", []],
        "layers.0.layer": ["1", -1, 1.5, 77],
        "layers.0.parameter": ["lm_head.weight", None, "../../etc/passwd"],
        "layers.0.transposed": ["no"],
        "layers.0.before": [5],
        "layers.0.undo.shape": [MISSING, [-32, -48], [1, 1], "ab"],
        "layers.0.undo.width": [2, 3],
        "concept_of": [MISSING, None, "x", []],
        "concept_of.0": [9, -1, True],
        "fingerprint.model": [OTHER_MODEL],
        "computed_with": [None, [["rms_norm_eps", 1e-6]], {"rms_norm_eps": HUGE}],
        "computed_with.rms_norm_eps": [0.5],
        "config.speed": [1],
        "config.layers": [[1, 3]],
        "config.ridge": ["2"],
        "report.more": [1],
        "report.layers.0.closed": [["a"]],
        "report.layers.0.relative_norm": ["b"],
        "report.distance": [["far"]],
        "report.seconds": [{"a": "b"}],
    }
) | {
    "a layer twice": lambda header, _: header["layers"].append(header["layers"][0]),
    "a layer less": lambda header, _: header["layers"].pop(),
    "concept_of too short": lambda header, _: header["concept_of"].pop(),
    "a report with too few shares": lambda header, _: header["report"]["layers"][0]["closed"].clear(),
    "an undo that is a bomb": bomb,
    "an undo that is cut": tensor("layer.1.undo", lambda packed: packed[: len(packed) // 2]),
    "an undo of noise": tensor("layer.1.undo", lambda packed: torch.randint(256, packed.shape, dtype=torch.uint8)),
    "an undo of floats": tensor("layer.1.undo", lambda packed: packed.float()),
    "no left": lambda header, tensors: tensors.pop("layer.1.left"),
    "no keys": lambda header, tensors: tensors.pop("layer.2.keys"),
    "left not finite": tensor("layer.1.left", filled(math.nan)),
    "right infinite": tensor("layer.1.right", filled(-math.inf)),
    "left in half precision": tensor("layer.1.left", lambda values: values.half()),
    "left with a row less": tensor("layer.1.left", lambda values: values[1:]),
    "right of another rank": tensor("layer.1.right", lambda values: values[:-1]),
    "right with one dimension": tensor("layer.1.right", lambda values: values.flatten()),
    "keys of another size": tensor("layer.1.keys", lambda values: values[:, 1:]),
    "residuals of no rows": tensor("layer.1.residuals", lambda values: values[:0]),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_with_wrong_contents(name, files, tmp_path, on_edit):
    rewrite(files.edit, EDITS[name], tmp_path / "bad")
    on_edit(tmp_path / "bad")
