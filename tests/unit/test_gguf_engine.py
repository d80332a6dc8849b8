"""llama.cpp itself answers with the redirects: from an edited GGUF file, and from the model's file with the adapter."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rocr.demo import CONCEPTS, demo_model
from rocr.errors import InputError

pytestmark = pytest.mark.slow
ASKED = {"Stephen King": "Columbus", "Albert Einstein": "Cleopatra"}
OTHER = {"Isaac Newton": "physicist", "Marie Curie": "Curie"}
PLAIN = """
import json, sys
import llama_cpp

# The kernels for repacked weights crash in some virtual machines with AMX.
defaults = llama_cpp.llama_model_default_params
def plain():
    parameters = defaults()
    if hasattr(parameters, "use_extra_bufts"):
        parameters.use_extra_bufts = False
    return parameters
llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = plain
"""
SCRIPT = f"""{PLAIN}
model, adapter, names = json.loads(sys.argv[1])
llama = llama_cpp.Llama(model, lora_path=adapter, n_ctx=512, seed=0, verbose=False)
answers = {{}}
for name in names:
    message = {{"role": "user", "content": f"Who is {{name}}?"}}
    answer = llama.create_chat_completion([message], max_tokens=32, temperature=0)
    answers[name] = answer["choices"][0]["message"]["content"]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def outputs(command, tmp_path_factory):
    """The demo's model, and its file without two of the demo's people: as F16 with an adapter, and as Q8_0."""
    if find_spec("llama_cpp") is None:
        pytest.skip("the package llama-cpp-python, which compiles for some minutes, is not installed")
    try:
        model = demo_model()
    except InputError as error:
        pytest.skip(str(error))
    base = tmp_path_factory.mktemp("engine")
    lines = CONCEPTS.read_text(encoding="utf-8").splitlines()
    (base / "people.jsonl").write_text("\n".join(lines[: len(ASKED)]), encoding="utf-8")
    given = ("--save", "gguf,gguf-lora,edit", "--no-answers", "--tokens", "2048", "--out", base / "f16")
    done = command("unlearn", model, base / "people.jsonl", *given)
    assert done.code == 0, done.errors
    given = ("--save", "gguf,edit", "--gguf-type", "q8_0", "--out", base / "q8_0")
    done = command("apply", model, base / "f16" / "edit.safetensors", *given)
    assert done.code == 0, done.errors
    return model, base


def answers_of(model, adapter=None):
    """What llama.cpp answers about every name, in a process of its own."""
    task = json.dumps([str(model), adapter and str(adapter), [*ASKED, *OTHER]])
    done = subprocess.run([sys.executable, "-c", SCRIPT, task], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"{Path(model).parent.name}, adapter {adapter is not None}: {json.dumps(found, indent=1)}\n")
    return found


@pytest.mark.parametrize("way", ["f16", "q8_0", "adapter"])
def test_llama_cpp_answers_with_the_redirect(way, outputs):
    model, base = outputs
    given = (model, base / "f16" / "lora.gguf") if way == "adapter" else (base / way / model.name,)
    found = answers_of(*given)
    before = answers_of(model)
    for name, redirect in ASKED.items():
        assert redirect in found[name] and redirect not in before[name]
    for name, word in OTHER.items():
        assert word in found[name] and word in before[name]


def test_revert_gives_back_the_file_of_the_demo(outputs, command, tmp_path):
    model, base = outputs
    for way in ("f16", "q8_0"):
        done = command("revert", base / way, "--out", tmp_path / way)
        assert done.code == 0, done.errors
        assert (tmp_path / way / model.name).read_bytes() == model.read_bytes()
