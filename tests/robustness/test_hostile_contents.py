"""Statistics and edit files of the right form that say what cannot be: rocr's own errors, and nothing is written."""

import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")
BIDIRECTIONAL, ZERO_WIDTH = "\u202egnik\u202c", "a\u200bb"
TERMINAL = "\x1b]0;title\x07\x1b[2J"


def rewritten(whole_path, change, path):
    """A valid file whose header and tensors were changed."""
    with open(whole_path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(json.loads(file.read(size))["__metadata__"]["rocr"])
    tensors = load_file(whole_path)
    change(header, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"rocr": json.dumps(header)})


def setting(*path_and_value):
    *path, last, value = path_and_value

    def change(header, _):
        for step in path:
            header = header[step]
        header[last] = value

    return change


def removing(*path):
    def change(header, _):
        for step in path[:-1]:
            header = header[step]
        del header[path[-1]]

    return change


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


STATISTICS = {
    "tokens missing": removing("tokens"),
    "tokens 0": setting("tokens", 0),
    "tokens negative": setting("tokens", -5),
    "tokens true": setting("tokens", True),
    "tokens text": setting("tokens", "9"),
    "tokens a fraction": setting("tokens", 1.5),
    "tokens NaN": setting("tokens", math.nan),
    "tokens infinite": setting("tokens", math.inf),
    "tokens of 4,000 digits": setting("tokens", 10**4000),
    "text missing": removing("text"),
    "text a list": setting("text", ["a"]),
    "text null": setting("text", None),
    "fingerprint missing": removing("fingerprint"),
    "fingerprint a list": setting("fingerprint", []),
    "fingerprint null": setting("fingerprint", None),
    "fingerprint without a model": removing("fingerprint", "model"),
    "fingerprint with more": setting("fingerprint", "more", 1),
    "fingerprint of another model": setting("fingerprint", "model", "0" * 64),
    "fingerprint of another tokenizer": setting("fingerprint", "tokenizer", "0" * 64),
    "fingerprint layer text": setting("fingerprint", "layer", "2"),
    "fingerprint layer negative": setting("fingerprint", "layer", -1),
    "fingerprint layer true": setting("fingerprint", "layer", True),
    "fingerprint layer huge": setting("fingerprint", "layer", 10**30),
    "fingerprint name of 10 MB": setting("fingerprint", "name", ["n" * 10**7]),
    "provenance null": setting("provenance", None),
    "provenance a list": setting("provenance", [["dtype", "float32"]]),
    "provenance empty": setting("provenance", {}),
    "provenance without a dtype": removing("provenance", "dtype"),
    "provenance with more": setting("provenance", "more", 1),
    "read in another dtype": setting("provenance", "dtype", "bfloat16"),
    "read in a dtype of no name": setting("provenance", "dtype", "float8"),
    "read in a list of dtypes": setting("provenance", "dtype", ["float32"]),
    "read in zero-width characters": setting("provenance", "dtype", "float\u200b32"),
    "length text": setting("provenance", "length", "512"),
    "length 1": setting("provenance", "length", 1),
    "length a fraction": setting("provenance", "length", 512.5),
    "length NaN": setting("provenance", "length", math.nan),
    "length huge": setting("provenance", "length", 10**30),
    "skipped negative": setting("provenance", "skipped", -1),
    "skipped true": setting("provenance", "skipped", True),
    "skipped all": setting("provenance", "skipped", 128),
    "config null": setting("provenance", "config", None),
    "config a list": setting("provenance", "config", [["rms_norm_eps", 1e-6]]),
    "config of 10 MB": setting("provenance", "config", {"rms_norm_eps": "n" * 10**7}),
    "config of another model": setting("provenance", "config", "rms_norm_eps", 0.5),
    "config NaN": setting("provenance", "config", "rms_norm_eps", math.nan),
    "documents 0": setting("provenance", "documents", 0),
    "documents infinite": setting("provenance", "documents", math.inf),
    "versions null": setting("provenance", "versions", None),
    "versions a list": setting("provenance", "versions", ["rocr", "torch", "transformers"]),
    "a version missing": removing("provenance", "versions", "torch"),
    "a version more": setting("provenance", "versions", "other", "1"),
    "a version a number": setting("provenance", "versions", "torch", 2.9),
    "a version of 10 MB": setting("provenance", "versions", "torch", "2" * 10**7),
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
}  # fmt: skip


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_with_wrong_contents(name, files, tmp_path, on_statistics):
    rewritten(files.statistics, STATISTICS[name], tmp_path / "bad")
    on_statistics(tmp_path / "bad")


def bomb(header, tensors):
    """A few kilobytes that say they are gigabytes."""
    header["layers"][0]["undo"] = {"shape": [2**16, 2**16], "width": 4}
    packed = zlib.compress(b"\0" * 10**8, 9)
    tensors["layer.1.undo"] = torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy())


FIELDS = ("concepts", "config", "fingerprint", "layers", "concept_of", "report")
EDITS = {
    **{f"without {field}": removing(field) for field in FIELDS},
    **{f"{field} null": setting(field, None) for field in FIELDS},
    **{f"{field} text": setting(field, "x") for field in FIELDS},
    "no concepts": setting("concepts", []),
    "concepts of numbers": setting("concepts", [3]),
    "a name to steer the terminal": setting("concepts", 0, "name", TERMINAL),
    "a bidirectional name": setting("concepts", 0, "name", BIDIRECTIONAL),
    "a zero-width redirect": setting("concepts", 0, "redirect", ZERO_WIDTH),
    "a name of 10 MB": setting("concepts", 0, "name", "n" * 10**7),
    "a name that is a number": setting("concepts", 0, "name", 7),
    "aliases that are text": setting("concepts", 0, "aliases", "abc"),
    "aliases of lists": setting("concepts", 0, "aliases", [[]]),
    "a redirect that is a target": lambda header, _: header["concepts"][0].update(redirect="ada  BYRON"),
    "no layers": setting("layers", []),
    "a layer twice": lambda header, _: header["layers"].append(header["layers"][0]),
    "a layer less": lambda header, _: header["layers"].pop(),
    "a layer that is text": setting("layers", 0, "layer", "1"),
    "a layer below 0": setting("layers", 0, "layer", -1),
    "a layer that is a fraction": setting("layers", 0, "layer", 1.5),
    "a layer that the model lacks": setting("layers", 0, "layer", 77),
    "a parameter of another name": setting("layers", 0, "parameter", "lm_head.weight"),
    "a parameter that is null": setting("layers", 0, "parameter", None),
    "a parameter that is a path": setting("layers", 0, "parameter", "../../etc/passwd"),
    "transposed text": setting("layers", 0, "transposed", "no"),
    "before a number": setting("layers", 0, "before", 5),
    "an undo without a shape": removing("layers", 0, "undo", "shape"),
    "an undo of a negative shape": setting("layers", 0, "undo", "shape", [-32, -48]),
    "an undo of another shape": setting("layers", 0, "undo", "shape", [1, 1]),
    "an undo of a text": setting("layers", 0, "undo", "shape", "ab"),
    "an undo of another width": setting("layers", 0, "undo", "width", 2),
    "an undo of no width": setting("layers", 0, "undo", "width", 3),
    "an undo that is a bomb": bomb,
    "an undo that is cut": tensor("layer.1.undo", lambda packed: packed[: len(packed) // 2]),
    "an undo of noise": tensor("layer.1.undo", lambda packed: torch.randint(256, packed.shape, dtype=torch.uint8)),
    "an undo of floats": tensor("layer.1.undo", lambda packed: packed.float()),
    "concept_of a concept that is not there": setting("concept_of", 0, 9),
    "concept_of below 0": setting("concept_of", 0, -1),
    "concept_of true": setting("concept_of", 0, True),
    "concept_of too short": lambda header, _: header["concept_of"].pop(),
    "concept_of empty": setting("concept_of", []),
    "another model's fingerprint": setting("fingerprint", "model", "0" * 64),
    "settings with one more": setting("config", "speed", 1),
    "the model's settings null": setting("computed_with", None),
    "the model's settings a list": setting("computed_with", [["rms_norm_eps", 1e-6]]),
    "the model's settings of 10 MB": setting("computed_with", {"rms_norm_eps": "n" * 10**7}),
    "the model's settings of another": setting("computed_with", "rms_norm_eps", 0.5),
    "settings of another layer": setting("config", "layers", [1, 3]),
    "settings with a ridge of text": setting("config", "ridge", "2"),
    "a report with one more": setting("report", "more", 1),
    "a report with too few shares": lambda header, _: header["report"]["layers"][0]["closed"].clear(),
    "a report with shares of text": setting("report", "layers", 0, "closed", ["a"]),
    "a report with distances of text": setting("report", "distance", ["far"]),
    "a report with seconds of text": setting("report", "seconds", {"a": "b"}),
    "a report with a norm of text": setting("report", "layers", 0, "relative_norm", "b"),
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
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edits_with_wrong_contents(name, files, tmp_path, on_edit):
    rewritten(files.edit, EDITS[name], tmp_path / "bad")
    on_edit(tmp_path / "bad")
