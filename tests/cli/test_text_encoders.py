"""Commands on text encoders: they are edited, and not asked."""

import json
from types import SimpleNamespace

import pytest
import torch

import rocr
from rocr import InputError
from rocr.model.causality import why_no_text
from tests.support.vision import stored_tensors
from tests.unit.test_encoders import BERT, CONCEPT, ENCODERS, build, closing, prompts  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = (1, 2)
GIVEN = ("--concept", CONCEPT.name, "--redirect", CONCEPT.redirect, "--layers", "1,2", "--force")
PROBE = {"subject": CONCEPT.name, "query": f"What did {CONCEPT.name} paint?", "answer": "a mill"}
KINDS = ["CLIPTextModel", "T5EncoderModel", *(
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("CLIPTextModelWithProjection", "BertModel", "BartForConditionalGeneration")
)]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def edited(request, closing, prompts, command, tmp_path_factory):  # noqa: F811
    """The folder of an encoder, and what `rocr unlearn` writes for it."""
    base = tmp_path_factory.mktemp("encoder")
    build(request.param, len(closing)).save_pretrained(base / "model")
    closing.save_pretrained(base / "model")
    (base / "text.txt").write_text("\n".join(prompts[:60]), encoding="utf-8")
    (base / "probes.jsonl").write_text(json.dumps(PROBE), encoding="utf-8")
    given = (*GIVEN, "--text", base / "text.txt", "--save", "model,edit,lora", "--json", "--out", base / "out")
    done = command("unlearn", base / "model", *given)
    assert done.code == 0, done.errors
    assert "Nothing is asked before and after" in done.errors
    return SimpleNamespace(kind=request.param, base=base, report=json.loads(done.output))


def test_the_commands_edit_a_text_encoder(edited, command, tmp_path):
    base, out = edited.base, edited.base / "out"
    before, after = stored_tensors(base / "model"), stored_tensors(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for weight in edited.report["weights"] for name in weight["stored"]}
    assert {name.removeprefix("text_model.") for name in changed} == {
        f"{ENCODERS[edited.kind][2].format(layer)}.weight".removeprefix("text_model.") for layer in LAYERS
    }
    assert edited.report["drift"] > 0 and edited.report["divergence"] is None
    done = command("verify", out, "--json")
    assert done.code == 0 and {check["state"] for check in json.loads(done.output)["checks"]} == {"passed"}
    assert command("info", out / "edit.safetensors").code == command("info", out).code == 0
    assert command("apply", base / "model", out / "edit.safetensors", "--out", tmp_path / "again").code == 0
    assert command("revert", out, "--out", tmp_path / "back").code == 0
    again, back = stored_tensors(tmp_path / "again"), stored_tensors(tmp_path / "back")
    assert all(torch.equal(again[name], after[name]) and torch.equal(back[name], before[name]) for name in before)


def test_statistics_and_a_dry_run(edited, command, tmp_path):
    given = ("--text", edited.base / "text.txt")
    done = command("unlearn", edited.base / "model", *GIVEN, *given, "--dry-run", "--json")
    assert done.code == 0 and json.loads(done.output)["seconds"]["total"] > 0, done.errors
    assert json.loads(done.output)["keys"] == edited.report["layers"][0]["keys"], "closing keys, and no variants"
    done = command("stats", edited.base / "model", *given, "--layers", "1,2", "--out", tmp_path / "statistics")
    assert done.code == 0 and rocr.Statistics.load(tmp_path / "statistics").layers == LAYERS
    done = command("unlearn", edited.base / "model", *GIVEN, "--out", tmp_path / "out")
    assert done.code == 2 and "cannot write the text of its own statistics" in done.errors


def test_what_asks_questions_is_refused_with_one_sentence(edited, command, tmp_path):
    model, probes = edited.base / "model", ("--probes", edited.base / "probes.jsonl")
    (tmp_path / "names.txt").write_text("Ada Byron")
    for name, more in (
        ("eval", (*probes, "--forms", "qa")),
        ("redirects", (*probes, "--among", CONCEPT.redirect, "Mona Klee")),
        ("aliases", (tmp_path / "names.txt",)),
        (
            "compare",
            (*probes, "--forms", "qa", "--targets", CONCEPT.name, "--redirect", CONCEPT.redirect, "--text",
             edited.base / "text.txt"),
        ),
    ):  # fmt: skip
        done = command(name, model, *more, "--out", tmp_path / "out.jsonl")
        assert done.code == 2 and not (tmp_path / "out.jsonl").exists()
        assert f"rocr {name} needs a language model that continues the text that it reads" in done.errors
        # transformers loads CLIP's text model for a text encoder, without the projection.
        assert f"and {edited.kind.removesuffix('WithProjection')} " in done.errors and "Traceback" not in done.errors


def test_masked_language_models_and_models_without_a_head_write_no_text(closing, make_model):  # noqa: F811
    masked = build("BertForMaskedLM", len(closing))
    assert "depend on the text after them" in why_no_text(masked)
    with pytest.raises(InputError, match=r"Asking questions needs a language model .* BertForMaskedLM"):
        rocr.evaluate(masked, closing, [rocr.Probe(**PROBE)])
    model = make_model("Llama")
    assert why_no_text(model) is None and "returns states" in why_no_text(model.model)
