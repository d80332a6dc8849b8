"""Commands that exceed each limit of an edit: nothing is written, and the model is restored."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import rocr
from rocr.edit.guards import Guards, predict
from rocr.model.architecture import find_architecture

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = ("Ada Byron -> a gardener", "Robert Downey Jr. -> a gardener")
FIVE = ("Ada Byron -> Blaise Pascal", *(f"{name} Byron -> Dan Byron" for name in ("Bob", "Cid", "Eve", "Max")))
"""Four that want next to nothing, and one that wants much with keys like theirs."""
BYRONS = ("Ada Byron -> Blaise Pascal", "Bob Byron -> brass")
FEW_FREE = ("--method", "projected", "--threshold", "0.1")
"""Of the tiny model's 48 directions, few are left: the keys of different concepts all but coincide."""
ALL_KEYS = ("--key-tokens", "all", "--keys-per-concept", "all")


def same(model, _):
    return model


def in_bfloat16(model, _):
    return model.bfloat16()


def in_float16(model, _):
    return model.half()


def sharp(model, _):
    """Large logits: a small change of the states is a large one of the predictions."""
    model.lm_head.weight.data.mul_(10)
    return model


def between(model, tokenizer):
    """Place the last token of both names between the redirects, so that an edit for one concept harms the other."""
    names = (" Byron", " Pascal", " brass")
    byron, pascal, brass = (tokenizer(name, add_special_tokens=False)["input_ids"][-1] for name in names)
    table = model.model.embed_tokens.weight.data
    table.mul_(30)  # the rest of a text then matters little
    table[pascal] = table[byron] - 0.3 * (table[brass] - table[byron])
    return model


LIMITS = {
    "relative norm": (same, TWO, ("--strength", "100"), "times the norm of the weight, above the limit of 2"),
    "surviving": (
        in_bfloat16,
        TWO,
        ("--strength", "1e-5"),
        "of the weight changed at layer 1, below the limit of 1.00%",
    ),
    "condition": (
        same,
        FIVE,
        (*FEW_FREE, *ALL_KEYS, "--ridge", "1e-12", "--strength", "0.001"),
        "above the limit of 1e+07: the keys of",
    ),
    "closed": (
        between,
        BYRONS,
        ("--key-tokens", "last", "--least-closed", "0"),
        "of the residual of Ada Byron, below the limit of 0.00%",
    ),
    "divergence": (sharp, TWO, ("--strength", "5"), "nats a token, above the limit of 1"),
}


@pytest.fixture
def run(files, tokenizer, tmp_path, command, monkeypatch, weights_of):
    """run(prepare, concepts, settings): `rocr unlearn` on a prepared model; where it fails, all is restored."""

    def unlearn(prepare, concepts, *settings):
        folder = tmp_path / "model"
        if not folder.exists():
            model = prepare(LlamaForCausalLM.from_pretrained(files.model), tokenizer)
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes((files.model / name).read_bytes())
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        import rocr.cli.unlearn as unlearning

        loaded, load = [], unlearning.load
        monkeypatch.setattr(unlearning, "load", lambda *arguments: loaded.append(load(*arguments)) or loaded[0])
        (tmp_path / "list.txt").write_text("\n".join(concepts))
        common = ("--layers", "1,2", "--no-answers", "--text", files.text, "--out", tmp_path / "out")
        done = command("unlearn", folder, tmp_path / "list.txt", *common, *settings)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        if done.code:
            assert sorted(path.name for path in tmp_path.iterdir()) == ["list.txt", "model"]
            bits = {name: weight.numpy() for name, weight in weights_of(loaded[0].model).items()}
            stored = {name: tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16) for name, tensor
                      in load_file(folder / "model.safetensors").items()}  # fmt: skip
            assert bits.keys() == stored.keys()
            assert all((bits[name] == stored[name].numpy()).all() for name in bits)
        return done

    return unlearn


def names_a_concept(text, concepts=TWO):
    return any(concept.split(" -> ")[0] in text for concept in concepts)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_passed_by_a_command(limit, run, tmp_path, tally):
    prepare, concepts, settings, words = LIMITS[limit]
    done = run(prepare, concepts, *settings)
    assert done.code == 4, done.errors
    assert words in done.errors
    assert names_a_concept(done.errors, concepts)
    assert "--force" in done.errors
    forced = run(prepare, concepts, *settings, "--force")
    assert forced.code == 0, forced.errors
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    passed = [sentence for sentence in report["limits_passed"] if words in sentence]
    assert passed
    assert names_a_concept(passed[0], concepts)
    tally("limits of an edit passed for real")


def test_a_singular_system_names_its_concepts(run, tally):
    done = run(same, FIVE, *FEW_FREE, "--ridge", "1e-30")
    assert done.code == 4, done.errors
    assert "is singular" in done.errors
    assert names_a_concept(done.errors, FIVE)
    tally("limits of an edit passed for real")


def test_weights_that_would_overflow_stop_even_a_forced_edit(run, tally):
    done = run(in_float16, TWO, "--strength", "1e9", "--force")
    assert done.code == 4, done.errors
    assert "overflow torch.float16" in done.errors
    assert names_a_concept(done.errors)
    tally("limits of an edit passed for real")


def test_logits_that_overflow_only_after_the_edit_stop_even_a_forced_one(run, tokenizer, statistics, tally):
    def at_the_brink(model, _):
        """The output of the last MLP that the edit makes grow most gets near the largest number of float16."""
        tokens, peaks = predict(find_architecture(model), tokenizer).tokens, []
        projection = model.model.layers[4].mlp.down_proj
        config = rocr.EditConfig(layers=(1, 2), strength=6.0, token_schedule="full")
        concepts = [rocr.Concept(*line.split(" -> ")) for line in TWO]
        with projection.register_forward_hook(lambda _module, _inputs, output: peaks.append(output[0].abs().amax(0))):
            edit = rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=Guards(force=True))
            peaks.clear()
            with torch.no_grad():
                model(tokens)
                edit.revert(model)
                model(tokens)
        after, before = peaks
        most = int((after / before).argmax())
        assert after[most] > 1.2 * before[most]
        projection.weight.data[most] *= 65504 / (1.1 * float(before[most]))
        return model.half()

    done = run(at_the_brink, TWO, "--strength", "6", "--token-schedule", "full", "--force")
    assert done.code == 4, done.errors
    assert "not finite after the edit; most of it is from" in done.errors
    assert names_a_concept(done.errors)
    tally("limits of an edit passed for real")


def test_a_weight_that_is_not_finite_stops_even_a_forced_edit(run, tally):
    def broken(model, _):
        model.lm_head.weight.data[3, 3] = float("nan")
        return model

    done = run(broken, TWO, "--force")
    assert done.code == 4, done.errors
    assert "not finite before the edit" in done.errors
    tally("limits of an edit passed for real")
