import json
import unicodedata

import pytest
from huggingface_hub import ModelCard

from rocr.export.model_card import build_card
from rocr.model.load import find_model


@pytest.fixture
def report(files):
    return json.loads((files.edited / "report.json").read_text(encoding="utf-8"))


def card(report, files, parts=("model", "edit"), source=None):
    return build_card(report, source or find_model(str(files.model)), parts)


def test_every_output_folder_has_a_card_with_its_sha256(files, report, digests, command, tmp_path):
    text = (files.edited / "README.md").read_text(encoding="utf-8")
    assert text == build_card(report, find_model(str(files.model)), ("model", "edit"), has_settings=True)
    assert report["files"]["README.md"] == digests(files.edited)["README.md"]
    for step in (("apply", files.model, files.edit), ("revert", files.edited)):
        out = tmp_path / step[0]
        done = command(*step, "--out", out, "--json")
        assert done.code == 0, done.errors
        assert json.loads(done.output)["files"]["README.md"] == digests(out)["README.md"]
    assert "was reverted by rocr" in (tmp_path / "revert" / "README.md").read_text(encoding="utf-8")
    assert "proof of erasure" in (tmp_path / "apply" / "README.md").read_text(encoding="utf-8")


def test_it_says_what_was_done_and_measured_and_what_is_not_proven(files, report):
    text = card(report, files)
    for word in ("Ada Byron", "Blaise Pascal", "layers 1, 2", "not proof of erasure", "whitened", "torch"):
        assert word in text
    assert f"{100 * report['concepts'][0]['distance']:.1f}%" in text
    assert f"{report['statistics']['tokens']:,} tokens" in text
    assert "`edit.safetensors`" in text and "originals/" not in text
    assert str(files.model) not in text


def test_metadata_is_what_a_hub_accepts(files, report, tmp_path):
    data = ModelCard(card(report, files)).data
    assert (data.library_name, data.base_model, data.license) == ("transformers", None, None)
    assert "unlearning" in data.tags
    assert ModelCard(card(report, files, parts=("lora",))).data.library_name == "peft"
    assert ModelCard(card(report, files, source=find_model("owner/name"))).data.base_model == "owner/name"
    snapshot = tmp_path / "models--owner--a-model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    data = ModelCard(card(report, files, source=find_model(str(snapshot)))).data
    assert (data.base_model, data.license) == ("owner/a-model", "mit")


@pytest.mark.parametrize(
    "theirs", ["---\nlicense: [a, b]\n---\n", "---\n: : :\n\t-\n---\n", "\udce9", "---\n", "x" * 2**21]
)
def test_a_base_models_broken_card_does_no_harm(theirs, files, report, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "README.md").write_bytes(theirs.encode("utf-8", "surrogateescape"))
    assert ModelCard(card(report, files, source=find_model(str(tmp_path)))).data.license is None


def test_names_are_text_and_no_markup(files, report):
    report["concepts"][0]["name"] = "a | b\n---\n# <img src=x> [c](d) `e`"
    text = card(report, files)
    assert "\n# <img" not in text and "<img" not in text
    (row,) = [line for line in text.splitlines() if "img" in line]
    assert row.replace("\\|", "").count("|") == 5
    assert ModelCard(text).data.library_name == "transformers"


def test_many_concepts_are_counted(files, report):
    report["concepts"] = [{**report["concepts"][0], "name": f"name {i}"} for i in range(1000)]
    text = card(report, files)
    assert "1000 concepts" in text and "and 980 more" in text
    assert len(text) < 10_000


STEERING = "\x1b]0;title\x07\x1b[2J\u202ename\u200b\x9b\ud800"


def test_no_text_of_others_steers_a_terminal(files, report, tmp_path):
    hostile = {
        **report,
        "model": STEERING,
        "fingerprint_mismatch": f"The edit was made for {STEERING}",
        "statistics": {"tokens": 5, "text": STEERING},
        "limits_passed": [STEERING],
        "concepts": [{**report["concepts"][0], "name": STEERING, "redirect": STEERING}],
    }
    (tmp_path / STEERING[:-1]).mkdir()
    (tmp_path / STEERING[:-1] / "config.json").write_text("{}")
    text = card(hostile, files, source=find_model(str(tmp_path / STEERING[:-1])))
    assert not {character for character in text if unicodedata.category(character)[0] == "C"} - {"\n"}
    assert text.count("\\u001b") >= 2 * 6
    text.encode("utf-8")
