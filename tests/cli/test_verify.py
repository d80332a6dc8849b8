"""`rocr verify`: a good output passes, and every kind of tampering is found and named."""

import json
import os
import shutil
import subprocess

import pytest
from safetensors.torch import load_file, save_file

from rocr.errors import InputError
from rocr.export.manifest import FAILED, PASSED, UNCHECKED, file_digest, write_records
from rocr.export.report import report_digest
from rocr.export.verify import verify_output

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="session")
def outputs(files, command, concept, tmp_path_factory):
    """A model in shards, its output with an adapter ("whole"), and that output reverted ("reverted")."""
    base = tmp_path_factory.mktemp("verify")
    shutil.copytree(files.model, base / "model")
    (base / "model" / "model.safetensors").unlink()
    tensors = load_file(files.model / "model.safetensors")
    place = {name: f"model-{int('layers.' in name) + int('layers.4' in name)}.safetensors" for name in tensors}
    for shard in set(place.values()):
        save_file({name: values for name, values in tensors.items() if place[name] == shard}, base / "model" / shard)
    index = {"metadata": {}, "weight_map": place}
    (base / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    unlearn = ("unlearn", base / "model", *concept, "--statistics", files.statistics, "--save", "model,edit,lora")
    for arguments in (
        (*unlearn, "--out", base / "whole"),
        ("revert", base / "whole", "--out", base / "reverted"),
        ("apply", base / "model", base / "whole" / "edit.safetensors", "--out", base / "applied"),
    ):
        done = command(*arguments)
        assert done.code == 0, done.errors
    return base


@pytest.fixture
def output(outputs, tmp_path):
    return shutil.copytree(outputs / "whole", tmp_path / "whole")


@pytest.fixture
def failures(command, tally):
    """failures(folder, ...): what `rocr verify` finds wrong, by subject and property; the exit code fits."""

    def run(folder, *arguments):
        done = command("verify", folder, *arguments, "--json")
        document = json.loads(done.output)
        wrong = {(check["subject"], check["what"]) for check in document["checks"] if check["state"] == FAILED}
        assert done.code == (3 if wrong else 0), done.errors
        assert document["counts"]["failed"] == sum(check["state"] == FAILED for check in document["checks"])
        shown = done.errors.replace("\n", "")
        assert all(subject[:10] in shown for subject, _ in wrong if subject.isprintable())
        if wrong:
            assert document["exit_code"] == 3 and "does not match its records" in document["error"]
            tally("outputs tampered with, found")
        return wrong

    return run


def states(checks):
    return {(check.subject, check.what): check.state for check in checks}


def sha256sum(folder):
    """What the program says of SHA256SUMS in a folder."""
    arguments = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    return subprocess.run(
        arguments,
        cwd=folder,
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
    )


def flip(path, offset=-5):
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def rewrite_report(folder, change, **with_digest):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    change(report)
    if with_digest:
        report["sha256"] = report_digest(report)
    (folder / "report.json").write_text(json.dumps(report))


def test_a_good_output_passes_every_check(outputs):
    found = states(verify_output(outputs / "whole"))
    assert set(found.values()) == {PASSED}
    expected = {
        *(("report.json", what) for what in ("readable", "sha256", "agrees with the edit")),
        *((name, "sha256") for name in ("config.json", "edit.safetensors", "model-1.safetensors", "tokenizer.json")),
        *((f"lora/{name}", "sha256") for name in ("adapter_config.json", "adapter_model.safetensors")),
        *((f"model-{shard}.safetensors", "linked") for shard in (0, 2)),
        *((f"model.layers.{layer}.mlp.down_proj.weight", what) for layer in (1, 2) for what in ("sha256", "finite")),
        *((subject, "fingerprint") for subject in ("model", "tokenizer")),
        ("lora/adapter_model.safetensors", "agrees with the edit"),
    }
    assert expected <= set(found)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="runs sha256sum")
@pytest.mark.parametrize("name", ["whole", "applied", "reverted"])
def test_sha256sum_checks_every_file_that_has_a_digest(outputs, name, tmp_path):
    folder = shutil.copytree(outputs / name, tmp_path / name)
    found = sha256sum(folder)
    assert found.returncode == 0, found.stderr
    report = json.loads((folder / "report.json").read_bytes())
    listed = {line.removesuffix(": OK") for line in found.stdout.splitlines()}
    assert listed == report["files"].keys() - {"SHA256SUMS"}
    unlisted = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - listed
    assert unlisted == {"SHA256SUMS", "report.json", *report["linked"]}
    flip(folder / "model-1.safetensors")
    found = sha256sum(folder)
    assert found.returncode == 1 and "model-1.safetensors: FAILED" in found.stdout


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="runs sha256sum")
def test_sha256sum_understands_every_name(tmp_path):
    names = [b"plain", b"two words", b"back\\slash", b"new\nline", b"return\r", "\u00e4".encode(), b"no UTF-8 \xff"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    write_records({"linked": ["linked"]}, tmp_path, {})
    found = sha256sum(tmp_path)
    assert found.returncode == 0 and found.stdout.count(": OK") == len(names), found.stderr


def test_an_edited_output_does_not_carry_the_digests_of_its_model(outputs, command, failures, tmp_path):
    arguments = ("--concept", "Blaise Pascal", "--redirect", "a gardener", "--layers", "1", "--no-answers", "--force")
    done = command("unlearn", outputs / "whole", *arguments, "--save", "model,originals", "--out", tmp_path / "twice")
    assert done.code == 0, done.errors
    first = (outputs / "whole" / "SHA256SUMS").read_bytes()
    assert (tmp_path / "twice" / "SHA256SUMS").read_bytes() != first
    assert not failures(tmp_path / "twice")
    assert command("revert", tmp_path / "twice", "--out", tmp_path / "first").code == 0
    assert (tmp_path / "first" / "SHA256SUMS").read_bytes() == first


def test_the_other_outputs_pass(outputs, failures, command):
    assert not failures(outputs / "applied")
    assert not failures(outputs / "reverted")
    assert states(verify_output(outputs / "reverted"))["edited tensors", "sha256"] == UNCHECKED
    with_edit = states(verify_output(outputs / "reverted", outputs / "whole" / "edit.safetensors"))
    assert with_edit[WEIGHT, "sha256"] == PASSED
    adapter = states(verify_output(outputs / "whole" / "lora"))
    assert adapter["lora/adapter_model.safetensors", "agrees with the edit"] == PASSED
    assert set(adapter.values()) == {PASSED} and WEIGHT not in {subject for subject, _ in adapter}
    table = command("verify", outputs / "whole")
    assert table.code == 0 and "matches its records" in table.output and "fingerprint" in table.output


def test_weights_of_the_other_state_are_found(outputs, output, failures, tmp_path):
    reverted = shutil.copytree(outputs / "reverted", tmp_path / "reverted")
    for source, target in ((outputs / "reverted", output), (outputs / "whole", reverted)):
        shutil.copy(source / "model-1.safetensors", target / "model-1.safetensors")
    wrong = {("model-1.safetensors", "sha256"), *((name, "sha256") for name in (WEIGHT, WEIGHT.replace("1", "2")))}
    edit = outputs / "whole" / "edit.safetensors"
    assert failures(output) == failures(reverted, "--edit", edit) == wrong
    details = [{check.detail for check in verify_output(place, edit)} for place in (output, reverted)]
    assert "it is as before the edit" in details[0] and "it is as after the edit" in details[1]


def test_linked_files_that_cannot_be_compared_are_said_to_be_so(output):
    rewrite_report(output, lambda report: report.update(model="elsewhere"), digest=True)
    found = states(verify_output(output))
    assert found["model-0.safetensors", "linked"] == UNCHECKED
    assert set(found.values()) == {PASSED, UNCHECKED}


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "edit.safetensors", "model-0.safetensors", "model-1.safetensors"),
        *("lora/adapter_config.json", "lora/adapter_model.safetensors", "model.safetensors.index.json"),
    ],
)
@pytest.mark.parametrize("tamper", ["flip", "cut", "remove", "link", "empty"])
def test_a_file_that_is_not_as_it_was_is_named(output, failures, name, tamper):
    path = output / name
    data = path.read_bytes()
    if tamper == "flip":
        flip(path, len(data) // 2)
    else:
        path.unlink()
    if tamper == "cut":
        path.write_bytes(data[:-1])
    elif tamper == "empty":
        path.write_bytes(b"")
    elif tamper == "link":
        (output.parent / "outside").write_bytes(data)
        path.symlink_to(output.parent / "outside")
    what = "linked" if name == "model-0.safetensors" else "sha256"
    assert (name, what) in failures(output)


@pytest.mark.parametrize("name", ["config.json", "edit.safetensors", "model-1.safetensors"])
def test_a_file_that_claims_a_terabyte_is_named_at_once(output, failures, name):
    with (output / name).open("ab") as file:
        file.truncate(2**40)
    assert (name, "sha256") in failures(output)


@pytest.mark.parametrize("name", ["NOTES.md", "pytorch_model.bin", "lora/more.safetensors", "..secret"])
def test_a_file_that_no_record_names_is_named(output, failures, name):
    (output / name).write_bytes(b"more")
    assert failures(output) == {(name, "recorded")}


def test_a_link_that_no_record_names_is_named(output, failures):
    (output / "more").symlink_to(output.parent)
    assert ("more", "recorded") in failures(output)


def test_swapped_shards_are_named(output, failures):
    shards = [output / f"model-{i}.safetensors" for i in (0, 2)]
    first, last = (shard.read_bytes() for shard in shards)
    for shard, data in zip(shards, (last, first), strict=True):
        shard.unlink()
        shard.write_bytes(data)
    assert failures(output) >= {(shard.name, "linked") for shard in shards} | {("model", "readable")}


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_weight_that_was_changed_is_named_even_where_the_digest_of_its_file_was_too(output, failures, value):
    shard = output / "model-1.safetensors"
    tensors = load_file(shard)
    tensors[WEIGHT][3, 4] = value
    save_file(tensors, shard)
    rewrite_report(output, lambda report: report["files"].update({shard.name: file_digest(shard)}), digest=True)
    expected = {(WEIGHT, "sha256")} | ({(WEIGHT, "finite")} if value != value else set())
    assert failures(output) == expected


def test_another_model_under_the_edit_shows_in_its_fingerprint(output, failures):
    shard = output / "model-0.safetensors"
    tensors = load_file(shard)
    shard.unlink()
    save_file({name: values + 1 for name, values in tensors.items()}, shard)
    (output / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    def forge(report):
        report["linked"].remove(shard.name)
        report["files"] |= {name: file_digest(output / name) for name in (shard.name, "tokenizer_config.json")}

    rewrite_report(output, forge, digest=True)
    assert ("model", "fingerprint") in failures(output)


def test_a_changed_report_is_named(output, failures):
    rewrite_report(output, lambda report: report.update(model="another"))
    assert failures(output) == {("report.json", "sha256")}
    rewrite_report(output, lambda report: report["concepts"][0].update(name="Nobody"), digest=True)
    assert failures(output) == {("report.json", "agrees with the edit")}
    flip(output / "report.json", 1)
    assert ("report.json", "readable") in failures(output)
    (output / "report.json").unlink()
    assert ("report.json", "readable") in failures(output)


def test_an_adapter_of_another_edit_is_named(output, failures):
    path = output / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: -values for name, values in tensors.items()}, path, metadata={"format": "pt"})
    name = "lora/adapter_model.safetensors"
    rewrite_report(output, lambda report: report["files"].update({name: file_digest(path)}), digest=True)
    assert failures(output) == failures(output / "lora") == {(name, "agrees with the edit")}


@pytest.mark.parametrize(
    "recorded",
    [
        {"../whole/config.json": "0"},
        {"/etc/hostname": "0"},
        {"a\0b": "0", "\ud800": "0", "x" * 10**6: "0"},
        ["config.json"],
        {"config.json": 7},
        None,
    ],
)
def test_a_hostile_report_is_answered_without_reading_outside(output, failures, recorded):
    rewrite_report(output, lambda report: report.update(files=recorded), digest=True)
    assert failures(output)


@pytest.mark.parametrize("content", ["[]", "{", '{"format": "rocr report 1"}', "[" * 10**5, '{"a": 1, "a": 2}'])
def test_reports_that_are_none(output, failures, content):
    (output / "report.json").write_text(content)
    assert ("report.json", "readable") in failures(output)


def test_what_is_no_output_is_bad_input(tmp_path, files, command, outputs):
    for folder in (tmp_path, files.model, tmp_path / "missing", files.text):
        done = command("verify", folder, "--json")
        assert done.code == 2 and json.loads(done.output)["exit_code"] == 2
    with pytest.raises(InputError, match="There is no edit file at"):
        verify_output(outputs / "whole", tmp_path / "missing")
    shutil.copytree(outputs / "whole" / "lora", tmp_path / "alone")
    with pytest.raises(InputError, match="is no output of rocr"):
        verify_output(tmp_path / "alone")


def test_an_output_without_a_model(files, command, concept, tmp_path):
    done = command(
        *("unlearn", files.model, *concept, "--statistics", files.statistics, "--save", "lora", "--out", tmp_path / "a")
    )
    assert done.code == 0, done.errors
    found = states(verify_output(tmp_path / "a"))
    assert found["model", "weights"] == found["lora/adapter_model.safetensors", "agrees with the edit"] == UNCHECKED
    assert FAILED not in found.values()
