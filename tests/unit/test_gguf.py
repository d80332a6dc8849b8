"""A GGUF file is read once, without other files, and gives the same model as transformers."""

import json
import shutil
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from rocr import InputError
from rocr.model import hub
from rocr.model.fingerprint import tokenizer_digest
from rocr.model.load import find_model, load_model, load_tokenizer
from rocr.model.load_partial import empty_model

pytestmark = pytest.mark.usefixtures("one_thread")
gguf = pytest.importorskip("gguf")
NEIGHBOURS = {
    "adapter_config.json": json.dumps({"base_model_name_or_path": "owner/base", "peft_type": "LORA"}),
    "config.json": json.dumps(
        {
            "model_type": "llama",
            "auto_map": {"AutoConfig": "owner/repo--a.B", "AutoModelForCausalLM": "owner/repo--a.C"},
            "hidden_size": 7,
        }
    ),
    "tokenizer_config.json": json.dumps(
        {
            "tokenizer_class": "GemmaTokenizer",
            "chat_template": "{{ raise_exception('no') }}",
            "auto_map": {"AutoTokenizer": ["owner/repo--a.D", None]},
        }
    ),
    "chat_template.jinja": "{{ raise_exception('no') }}",
    "chat_template.json": json.dumps({"chat_template": "{{ raise_exception('no') }}"}),
    "generation_config.json": json.dumps({"eos_token_id": 3, "cache_implementation": "none such"}),
    "tokenizer.json": "{broken",
    "tokenizer.model": "not one",
    "special_tokens_map.json": json.dumps({"eos_token": "<|begin|>"}),
    "added_tokens.json": json.dumps({"roses": 100_000}),
    "processor_config.json": "{broken",
    "model.safetensors": "not one",
    "a.py": "raise SystemExit('code beside a GGUF file was run')",
}


@pytest.fixture
def folder(gguf_file, tmp_path):
    """A folder that holds a GGUF file by itself."""
    (tmp_path / "alone").mkdir()
    shutil.move(gguf_file, tmp_path / "alone" / "m.gguf")
    return tmp_path / "alone"


def same(loaded, other):
    pairs = zip(loaded.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    assert all(name == second and torch.equal(values, found) for (name, values), (second, found) in pairs)
    assert tokenizer_digest(loaded.tokenizer) == tokenizer_digest(other.tokenizer)
    assert loaded.tokenizer.special_tokens_map == other.tokenizer.special_tokens_map
    assert loaded.model.config.to_dict() == other.model.config.to_dict()
    assert loaded.model.generation_config.to_dict() == other.model.generation_config.to_dict()


@pytest.mark.parametrize("names", [*((name,) for name in NEIGHBOURS), tuple(NEIGHBOURS)], ids=lambda names: names[-1])
def test_nothing_beside_a_gguf_file_is_read(names, folder, tmp_path, tried, monkeypatch):
    source = find_model(str(folder / "m.gguf"))
    alone = load_model(source)
    for name in names:
        (folder / name).write_text(NEIGHBOURS[name])
    for trusted in (False, True):
        same(load_model(source, trust_remote_code=trusted), alone)
        assert tokenizer_digest(load_tokenizer(source, trusted)) == tokenizer_digest(alone.tokenizer)
        assert empty_model(source, trusted).config.to_dict() == alone.model.config.to_dict() | {"dtype": None}
    assert not tried


def test_commands_read_nothing_beside_a_gguf_file(folder, files, command, concept, tmp_path, tried):
    for name, text in NEIGHBOURS.items():
        (folder / name).write_text(text)
    model = folder / "m.gguf"
    for trust in ((), ("--trust-remote-code",)):
        place = tmp_path / f"statistics{len(trust)}"
        done = command("stats", model, "--text", files.text, "--layers", "1,2", *trust, "--out", place)
        assert done.code == 0, done.errors
        edit = ("unlearn", model, *concept, "--statistics", place, *trust)
        for arguments in ((*edit, "--dry-run"), (*edit, "--out", tmp_path / f"out{len(trust)}")):
            done = command(*arguments)
            assert done.code == 0, done.errors
    assert not tried


def test_a_file_of_the_same_name_in_the_current_folder_is_not_read(folder, tmp_path, monkeypatch):
    alone = load_model(find_model(str(folder / "m.gguf")))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "m.gguf").write_bytes(b"GGUF and nothing more")
    monkeypatch.chdir(tmp_path / "here")
    same(load_model(find_model(str(folder / "m.gguf"))), alone)


def test_a_model_has_the_name_of_its_file(folder):
    name = str(folder / "m.gguf")
    loaded = load_model(find_model(name))
    assert loaded.model.config.name_or_path == name
    assert loaded.tokenizer.name_or_path == loaded.tokenizer.init_kwargs["name_or_path"] == name
    assert empty_model(find_model(name)).config.name_or_path == name


def test_quick_reading_gives_what_slow_reading_gives(folder, monkeypatch):
    source = find_model(str(folder / "m.gguf"))
    quick = load_model(source)
    monkeypatch.setattr(hub, "fast_reader", nullcontext)
    same(load_model(source), quick)


def test_a_file_is_parsed_once(folder, monkeypatch):
    made = []
    plain = gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, *given: (made.append(given), plain(self, *given))[1])
    before = (gguf.GGUFReader, gguf.get_tensor_name_map)
    load_model(find_model(str(folder / "m.gguf")))
    assert len(made) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


KINDS = {
    "uint8": [0, 255], "int8": [-128, 127], "uint16": [0, 65535], "int16": [-32768, 32767], "uint32": [0, 2**32 - 1],
    "int32": [-(2**31), 2**31 - 1], "float32": [0.1, -np.inf, 1e-45], "uint64": [0, 2**64 - 1],
    "int64": [-(2**63), 2**63 - 1], "float64": [0.1, 1e300], "bool": [True, False], "string": ["", "é東", "a" * 1000],
}  # fmt: skip


@pytest.fixture
def reader_of():
    """reader_of(): the quick reader of files."""

    @contextmanager
    def quick():
        with hub.fast_reader():
            yield gguf.GGUFReader

    return quick


def test_every_kind_of_array_is_read_as_the_package_reads_it(tmp_path, reader_of):
    path = tmp_path / "arrays.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, values in KINDS.items():
        writer.add_key_value(f"of.{kind}", values, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind.upper()])
        writer.add_key_value(f"after.{kind}", 7, gguf.GGUFValueType.UINT32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = gguf.GGUFReader(path)
    with reader_of() as reader:
        quick = reader(path)
    assert list(quick.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        found = quick.fields[name]
        assert found.types == field.types and len(found.data) == len(field.data)
        for mine, theirs in zip(found.data, field.data, strict=True):
            assert bytes(np.asarray(field.parts[theirs]).tobytes()) == as_bytes(found.parts[mine], field.types[-1])


def as_bytes(part, kind):
    """A part of a field as the file holds it."""
    if isinstance(part, tuple):
        return np.array(part, dtype=gguf.GGUFReader.gguf_scalar_to_np[kind]).tobytes()
    return bytes(part) if isinstance(part, bytes) else np.asarray(part).tobytes()


@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type"])
@pytest.mark.parametrize("count", [10**4, 2**40, 2**63])
def test_an_array_that_goes_beyond_its_file_is_refused(key, count, folder):
    path = folder / "m.gguf"
    data = bytearray(path.read_bytes())
    place = data.index(key.encode()) + len(key) + 4 + 4  # its name, that it is an array, and the kind of its entries
    data[place : place + 8] = count.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match=str(path)):
        load_model(find_model(str(path)))
