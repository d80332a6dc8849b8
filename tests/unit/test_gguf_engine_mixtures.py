"""llama.cpp computes what transformers computes from an edited mixture: from its GGUF file, and with the adapter."""

import functools
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from rocr.model.load import find_model, load_model
from tests.support.gguf_mixtures import build_mixture, write_mixture_gguf
from tests.unit.test_gguf_engine import PLAIN

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SCRIPT = f"""{PLAIN}
model, adapter, tokens = json.loads(sys.argv[1])
llama = llama_cpp.Llama(
    model, lora_path=adapter, n_ctx=64, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False
)
llama.eval(tokens)
print(json.dumps(llama.scores[: len(tokens)].tolist()))
"""
TOKENS = list(range(30, 54))
ROUNDING = 1e-3
"""Error over the change by the edit. Of float32 sums in another order, 2e-5 was measured."""
ROUNDED = ("f16", "bf16", "q8_0")


def of_engine(model, adapter=None):
    """The logits that llama.cpp computes, in a process of its own."""
    task = json.dumps([str(model), adapter and str(adapter), TOKENS])
    done = subprocess.run([sys.executable, "-c", SCRIPT, task], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def of_transformers(model):
    return load_model(find_model(str(model))).model(torch.tensor([TOKENS])).logits[0]


@pytest.fixture(scope="module", params=["Qwen3Moe", "Qwen2Moe", "MiniMaxM2"])
def write(request, tokenizer, files, command, concept, tmp_path_factory):
    """write(experts): the files of a mixture with so many of 8 experts for a token, before and after an edit."""
    if find_spec("llama_cpp") is None:
        pytest.skip("the package llama-cpp-python, which compiles for some minutes, is not installed")

    @functools.cache
    def written(experts):
        base = tmp_path_factory.mktemp("engine")
        mixture = build_mixture(request.param, len(tokenizer), num_experts_per_tok=experts)
        model = write_mixture_gguf(mixture, request.param, tokenizer, base / "m.gguf")
        given = ("--text", files.text, "--layers", "1,2", "--save", "gguf,gguf-lora,edit", "--force", "--no-answers")
        done = command("unlearn", model, *concept, *given, "--out", base / "f32")
        assert done.code == 0, done.errors
        for kind in ROUNDED:
            write_mixture_gguf(mixture, request.param, tokenizer, base / f"{kind}.gguf", down=kind.upper())
            given = ("--save", "gguf", "--gguf-type", kind, "--out", base / kind)
            done = command("apply", model, base / "f32" / "edit.safetensors", *given)
            assert done.code == 0, done.errors
        return base

    return written


def measured(name, found, after, before):
    """The error of the engine's logits, over the change by the edit."""
    change = (after - before).norm()
    error = float((found - after).norm() / change)
    moved = float(change / before.norm())
    sys.stdout.write(f"{name}: the edit changes the logits by {moved:.1%}, error {error:.1e} of it\n")
    return error


@pytest.mark.parametrize("way", ["f32", "adapter"])
def test_llama_cpp_has_the_logits_of_transformers(way, write):
    outputs = write(2)
    model, edited = outputs / "m.gguf", outputs / "f32" / "m.gguf"
    found = of_engine(model, outputs / "f32" / "lora.gguf") if way == "adapter" else of_engine(edited)
    assert measured(way, found, of_transformers(edited), of_transformers(model)) < ROUNDING


@pytest.mark.parametrize("kind", ROUNDED)
def test_its_error_in_other_types_is_that_of_a_model_without_the_edit(kind, write):
    """llama.cpp rounds the inputs of a product to the type of the weight, so its error is that of this rounding.

    All experts are used for each token, since rounding may choose others where two have nearly the same score.
    """
    outputs = write(8)
    plain, edited = outputs / f"{kind}.gguf", outputs / kind / "m.gguf"
    before, after = of_transformers(plain), of_transformers(edited)
    error = measured(kind, of_engine(edited), after, before)
    rounding = float((of_engine(plain) - before).norm() / (after - before).norm())
    assert error < 1.5 * rounding < 1, f"error {error:.2g}, of the model without the edit {rounding:.2g}"
