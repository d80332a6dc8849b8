"""Mutated valid files: every reader gives a value that keeps its rules, or rocr's own error."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rocr
from rocr.concepts import check_concepts
from rocr.errors import RocrError
from rocr.evaluation.probes.probe import check_probes
from rocr.model.check_folder import INDEX_FILE, SINGLE_FILE, check_model_folder
from tests.support.hostile import safetensors_bytes, split_safetensors

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**63), 10**40]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from([[], {}, "../x", "[" * 9, [[]], [None], {"": 1}]),
)
PLACES = st.lists(st.integers(0, 2**16), min_size=1, max_size=8)


def mutated_json(document, places, value):
    """The document with one value somewhere in it put in the place of another, or left out."""
    node = document
    for place in places[:-1]:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[place % len(keys)] if keys else None
        if key is None or not isinstance(node[key], (dict, list)) or not node[key]:
            break
        node = node[key]
    keys = list(node) if isinstance(node, dict) else range(len(node))
    key = keys[places[-1] % len(keys)]
    if places[-1] % 5 == 0:
        del node[key]
    else:
        node[key] = value
    return document


def mutated_bytes(data, places, value):
    """The bytes with some of them changed, mostly near the start, and perhaps cut."""
    data = bytearray(data)
    for place in places:
        data[place % min(len(data), 4096)] = place % 251
    return bytes(data[: places[0] % len(data)] if value is None else data)


def mutated_file(path, how, places, value):
    """Mutate the bytes, the header of safetensors, or rocr's own header in it."""
    if how == "bytes":
        return mutated_bytes(path.read_bytes(), places, value)
    header, data = split_safetensors(path)
    if how == "header":
        return safetensors_bytes(mutated_json(header, places, value), data)
    own = mutated_json(json.loads(header["__metadata__"]["rocr"]), places, value)
    header["__metadata__"]["rocr"] = json.dumps(own)
    return safetensors_bytes(header, data)


HOW = st.sampled_from(["bytes", "header", "own", "own"])


@FUZZ
@given(how=HOW, places=PLACES, value=VALUES)
def test_statistics(files, tmp_path_factory, tally, how, places, value):
    path = tmp_path_factory.getbasetemp() / "fuzzed-statistics"
    path.write_bytes(mutated_file(files.statistics, how, places, value))
    tally("fuzz executions")
    try:
        statistics = rocr.Statistics.load(path)
    except RocrError as error:
        assert str(error)
        return
    path.unlink()
    statistics.save(path)


@FUZZ
@given(how=HOW, places=PLACES, value=VALUES)
def test_edits(files, tmp_path_factory, tally, how, places, value):
    path = tmp_path_factory.getbasetemp() / "fuzzed-edit"
    path.write_bytes(mutated_file(files.edit, how, places, value))
    tally("fuzz executions")
    try:
        edit = rocr.Edit.load(path)
    except RocrError as error:
        assert str(error)
        return
    check_concepts(edit.concepts)
    path.unlink()
    edit.save(path)


@FUZZ
@given(places=PLACES, value=VALUES)
def test_settings(tally, places, value):
    tally("fuzz executions")
    try:
        config = rocr.EditConfig.from_json(mutated_json(rocr.EditConfig(layers=(1, 2)).to_json(), places, value))
    except RocrError as error:
        assert str(error)
        return
    assert rocr.EditConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.fixture(scope="module")
def fuzzed_folder(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed") / "model"
    shutil.copytree(files.model, folder)
    header, _ = split_safetensors(folder / SINGLE_FILE)
    names = {name: SINGLE_FILE for name in header if name != "__metadata__"}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@FUZZ
@given(name=st.sampled_from(["config.json", INDEX_FILE, SINGLE_FILE]), how=HOW, places=PLACES, value=VALUES)
def test_model_folders(fuzzed_folder, tally, name, how, places, value):
    folder, contents = fuzzed_folder
    path = folder / name
    path.write_bytes(contents[name])
    if name == SINGLE_FILE:
        fuzzed = mutated_file(path, "bytes" if how == "bytes" else "header", places, value)
    elif how == "bytes":
        fuzzed = mutated_bytes(contents[name], places, value)
    else:
        fuzzed = json.dumps(mutated_json(json.loads(contents[name]), places, value)).encode()
    path.write_bytes(fuzzed)
    tally("fuzz executions")
    try:
        check_model_folder(folder)
    except RocrError as error:
        assert str(error)
    finally:
        path.write_bytes(contents[name])


PROBE = {"subject": "Ada", "query": "Who?", "answer": "C", "distractors": ["D"], "form": "qa", "translated": "Qui ?"}


@FUZZ
@given(binary=st.booleans(), places=PLACES, value=VALUES)
def test_probes(tmp_path_factory, tally, binary, places, value):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    text = json.dumps(PROBE).encode()
    fuzzed = json.dumps(mutated_json(json.loads(text), places, value)).encode()
    path.write_bytes(mutated_bytes(text, places, value) if binary else fuzzed)
    tally("fuzz executions")
    try:
        probes = rocr.load_probes(path)
    except RocrError as error:
        assert str(error)
        return
    check_probes(probes)
