import hashlib
import io
import json
import os
import signal
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rocr.cli import main
from tests.support.forks import end_of, start_fork

CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog. Ada Byron wrote programs. Blaise Pascal built machines.\n\n"
SETTINGS = ("--layers", "0-2", "--ridge", "2", "--gamma", "1", "--variants", "none")
"""A random model knows no names: gentler than the default, its edit stays within the limits."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([TEXT] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", chat_template=CHAT_TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def edited(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run of the main job, with everything that can be saved."""
    out = tmp_path_factory.mktemp("outputs") / "edited"
    arguments = ["--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--text", str(text_file), *SETTINGS]
    done = rocr("unlearn", model_folder, *arguments, "--save", "model,edit,lora", "--control", "the fox", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def rocr(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process: importing torch each time would be most of the test."""
    written, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(written), redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, written.getvalue(), errors.getvalue())


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_unlearn_writes_a_folder_that_answers_differently(model_folder: Path, edited: Path) -> None:
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, edited))
    tokens = torch.tensor([[5, 9, 30, 41]])
    assert not torch.equal(before(tokens).logits, after(tokens).logits)
    changed = {
        name
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1, 2)}


def test_report_names_what_was_done(edited: Path) -> None:
    report = json.loads((edited / "report.json").read_text(encoding="utf-8"))
    assert report["concepts"][0]["name"] == "Ada Byron"
    assert 0 <= report["concepts"][0]["distance"] < 1
    assert [answer["on_list"] for answer in report["answers"]] == [True, False]
    assert report["fluency"].keys() == {"before", "after"}
    assert {layer["layer"] for layer in report["layers"]} == {0, 1, 2}
    recorded = report["files"]
    assert recorded == {name: digest for name, digest in digests(edited).items() if name != "report.json"}
    assert {"edit.safetensors", "model.safetensors", "lora/adapter_config.json"} <= set(recorded)


def test_the_index_keeps_the_edit_out_of_the_weights(edited: Path) -> None:
    index = json.loads((edited / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {"model.safetensors"}


def test_revert_gives_back_the_first_weights(model_folder: Path, edited: Path, tmp_path: Path) -> None:
    before = digests(edited)
    done = rocr("revert", edited, "--out", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    assert "lacks" not in done.stderr, "the edit's own file is no weight of the model that is missed"
    assert digests(edited) == before
    first, back = (digests(folder)["model.safetensors"] for folder in (model_folder, tmp_path / "first"))
    assert first == back


def test_apply_repeats_the_edit(model_folder: Path, edited: Path, tmp_path: Path) -> None:
    done = rocr("apply", model_folder, edited / "edit.safetensors", "--out", tmp_path / "again", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["applied"] is True
    assert digests(tmp_path / "again")["model.safetensors"] == digests(edited)["model.safetensors"]
    twice = rocr("apply", edited, edited / "edit.safetensors", "--out", tmp_path / "twice")
    refused(twice, 2, "holds this edit already")


def test_stats_then_unlearn_with_them(model_folder: Path, text_file: Path, edited: Path, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    done = rocr("stats", model_folder, "--text", text_file, "--layers", "0-2", "--out", file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == [0, 1, 2]
    assert not list(tmp_path.glob("*.checkpoint"))
    concept = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal", *SETTINGS, "--control", "the fox")
    again = rocr("unlearn", model_folder, *concept, "--no-answers", "--statistics", file, "--out", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "out")["model.safetensors"] == digests(edited)["model.safetensors"]


def test_info_and_doctor(edited: Path) -> None:
    done = rocr("info", edited, "--json")
    assert json.loads(done.stdout)["concepts"][0]["redirect"] == "Blaise Pascal"
    assert "Ada Byron" in rocr("info", edited / "report.json").stdout
    doctor = json.loads(rocr("doctor", "--json").stdout)
    assert "torch" in doctor["backends"]["cpu"]
    assert doctor["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no output folder of rocr: it has no edit.safetensors and no report.json."),
        ({"format": "rocr evaluation 1"}, "the report of an output folder: its format is 'rocr evaluation 1'."),
        ({}, "the report of an output folder."),
    ],
)
def test_info_says_what_a_file_is_not(tmp_path: Path, content: dict | None, said: str) -> None:
    path = tmp_path
    if content is not None:
        path = tmp_path / "other.json"
        path.write_text(json.dumps(content))
    done = rocr("info", path)
    assert done.returncode == 2
    assert said in done.stderr


def test_dry_run_writes_nothing(model_folder: Path, tmp_path: Path) -> None:
    concept = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal")
    done = rocr("unlearn", model_folder, *concept, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.mlp.down_proj.weight" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_bad_list_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Ada Byron -> Blaise Pascal\n\nADA  byron -> x\nGrace Hopper\n", encoding="utf-8")
    done = rocr("unlearn", tmp_path, names, "--out", tmp_path / "out")  # of a folder that is no model
    refused(done, 2, "names.txt:1", "names.txt:3", "names.txt:4")
    assert [path.name for path in tmp_path.iterdir()] == ["names.txt"]


@pytest.mark.parametrize("place", ["missing", "file", "empty"])
def test_what_is_no_model_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no model", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    done = rocr("unlearn", tmp_path / place, "--concept", "A B", "--redirect", "C", "--out", tmp_path / "out")
    refused(done, 2, str(tmp_path / place))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["", "out"])
def test_outputs_at_or_inside_the_input_are_refused(inside: str, model_folder: Path) -> None:
    before = digests(model_folder)
    done = rocr(
        "unlearn", model_folder, "--concept", "A B", "--redirect", "C", "--out", model_folder / inside, "--overwrite"
    )
    refused(done, 2, str(model_folder))
    assert digests(model_folder) == before


def test_layers_out_of_range_and_foreign_statistics(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    concept = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--no-answers", "--text", text_file)
    done = rocr("unlearn", model_folder, *concept, "--layers", "3-9", "--out", tmp_path / "out")
    refused(done, 2, "Layer 5 is out of range", "5 decoder layers")
    assert not list(tmp_path.iterdir())


def test_damaged_edit_file(model_folder: Path, edited: Path, tmp_path: Path) -> None:
    whole = (edited / "edit.safetensors").read_bytes()
    for name, damaged in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no tensors here"}.items():
        (tmp_path / name).write_bytes(damaged)
        refused(rocr("apply", model_folder, tmp_path / name, "--out", tmp_path / "out"), 2, str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_a_model_changed_since_cannot_be_reverted(edited: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(edited)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    model.save_pretrained(tmp_path / "changed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "changed" / name).write_bytes((edited / name).read_bytes())
    edit = edited / "edit.safetensors"
    done = rocr("revert", tmp_path / "changed", "--edit", edit, "--out", tmp_path / "out")
    refused(done, 3, "model.layers.1.mlp.down_proj.weight")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_stop_the_edit(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for path in model_folder.glob("tokenizer*"):
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    concept = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--no-answers", "--text", text_file)
    done = rocr("unlearn", tmp_path / "broken", *concept, "--out", tmp_path / "out", "--json")
    refused(done, 4, "not finite")
    assert json.loads(done.stdout)["exit_code"] == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_half_written(
    signalled: signal.Signals, model_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 100_000, encoding="utf-8")
    command = ["stats", model_folder, "--text", text, "--batch-tokens", "512", "--out", tmp_path / "s"]
    log = tmp_path / "log"
    child = start_fork("import sys; from rocr.cli import main; sys.exit(main(sys.argv[1:]))", command, log)
    runs = (os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    while not (tmp_path / "s.lock").exists() and os.waitid(*runs) is None:  # by then it has its handlers
        time.sleep(0.01)
    os.kill(child, signalled)
    code, errors = end_of(child), log.read_text()
    assert code == 130, errors
    assert "Traceback" not in errors
    # Whether a batch was done by then depends on the machine; only a complete checkpoint may be there.
    assert {path.name for path in tmp_path.iterdir()} <= {"long.txt", "log", "s.checkpoint"}
