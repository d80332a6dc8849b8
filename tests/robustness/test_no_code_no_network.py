"""No file that rocr reads can run code, and rocr opens no connection without being asked."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
JOB = """
import os, pickle, socket, sys
refused = []

def refuse(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        refused.append(event)
        raise OSError(f"{event} is not allowed")
    if checks_code and event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        refused.append(f"{event} {arguments[:2]}")

checks_code = False
sys.addaudithook(refuse)
os.environ.pop("HF_HUB_OFFLINE", None)
from rocr.cli import main
import transformers.modeling_utils, torch
checks_code = True  # what libraries do when they are imported is not about a user's files
model, text, edit, edited, probes, base = sys.argv[1:]
concept = ["--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,2", "--no-answers", "--force"]
codes = [
    main(["stats", model, "--text", text, "--layers", "1,2", "--out", f"{base}/statistics"]),
    main(["unlearn", model, *concept, "--statistics", f"{base}/statistics", "--out", f"{base}/edited"]),
    main(["apply", model, edit, "--out", f"{base}/applied"]),
    main(["revert", edited, "--out", f"{base}/reverted"]),
    main(["eval", model, "--probes", probes, "--edit", edit, "--forms", "qa", "--out", f"{base}/report.json"]),
    main(["info", edit]),
]
checks_code = False
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError as error:
    print(error)
print()
print(codes, sorted(set(refused)))
"""
PROBE = {"subject": "Ada Byron", "query": "What did Ada Byron write?", "answer": "programs"}


def test_the_commands_work_without_sockets_and_without_pickle(files, tmp_path, tally):
    """No socket of Python's is ever tried; where the kernel allows it, there is no network for native code either."""
    (tmp_path / "probes.jsonl").write_text(json.dumps(PROBE))
    arguments = (files.model, files.text, files.edit, files.edited, tmp_path / "probes.jsonl", tmp_path)
    prefix = ("unshare", "--net")
    allowed = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    script = [*(prefix if allowed else ()), sys.executable, "-c", JOB, *map(str, arguments)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # The only attempt is the test's own at the end, which shows that sockets are refused.
    assert done.stdout.strip().split("\n")[-1] == "[0, 0, 0, 0, 0, 0] ['socket.getaddrinfo']", done.stdout[-2000:]
    tally("commands run without sockets", 6)


HUB = """
import os, socket, sys, time
import torch  # the children then need not import it; libraries that read the environment are theirs to import
tried = []
time.sleep = lambda seconds: None  # between the tries of the hub's client
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        tried.append(event)
        raise OSError("no network here")

def ask(said, text, base):
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(f"{base}/{name} {said}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update({said: "1"} if said else {}, HF_HOME=f"{base}/cache {said}")
    sys.addaudithook(watch)
    from rocr.cli import main
    for more in ([], ["--download"]):
        code = main(["stats", "somebody/nothing", "--text", text, "--out", f"{base}/out {said}", *more])
        print(f"\\n{code} {sorted(set(tried))}")
    sys.stdout.flush()

for said in ("", "HF_HUB_OFFLINE"):
    assert not {"transformers", "huggingface_hub"} & set(sys.modules)
    child = os.fork()
    if child == 0:
        try:
            ask(said, *sys.argv[1:])
        except BaseException as error:
            os.write(2, f"Traceback {error!r}".encode())
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def looked_up(files, tmp_path_factory):
    """looked_up(variable): what a command says of a hub's id, without --download and with it, and its errors."""
    base = tmp_path_factory.mktemp("hub")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    script = [sys.executable, "-c", HUB, str(files.text), str(base)]
    subprocess.run(script, check=True, timeout=600, env=environment, cwd=ROOT)

    def read(said):
        output, errors = ((base / f"{name} {said or ''}").read_text() for name in ("output", "errors"))
        assert "Traceback" not in errors, output + errors
        return [line for line in output.split("\n") if line], errors

    return read


def test_the_id_of_a_model_on_a_hub_is_not_looked_up_unless_asked(looked_up):
    results, errors = looked_up(None)
    assert results[0] == "2 []"
    assert "--download" in errors


@pytest.mark.parametrize("said", ["HF_HUB_OFFLINE", None])
def test_an_environment_that_says_offline_is_obeyed_also_where_the_network_was_asked_for(looked_up, said):
    code, tried = looked_up(said)[0][1].split(" ", 1)
    assert code == "2"
    assert (tried == "[]") == bool(said), "without that word, the same command does try"


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(MARK).touch()

class EvilConfig(LlamaConfig):
    model_type = "evil"

class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_beside_a_model_is_run_only_where_that_is_asked_for(
    model_type, asked, files, tmp_path, command, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(files.model, model)
    (model / "evil.py").write_text(CODE.replace("MARK", repr(str(mark))))
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": code, "model_type": model_type}))
    trust = ("--trust-remote-code",) if asked else ()
    done = command("stats", model, "--text", files.text, "--layers", "1", *trust, "--out", tmp_path / "out")
    assert done.code == (0 if asked or model_type == "llama" else 2), done.errors
    assert mark.exists() == asked


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.json", "config.json"])
def test_a_pickle_in_the_place_of_any_file_is_not_loaded(name, files, tmp_path, command, tally):
    mark = tmp_path / "ran"
    shutil.copytree(files.model, tmp_path / "model")
    if name.endswith(".bin"):
        (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Evil(str(mark))))
    done = command("stats", tmp_path / "model", "--text", files.text, "--layers", "1", "--out", tmp_path / "out")
    assert done.code == 2, done.errors
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil(str(mark))))
    assert command("apply", files.model, tmp_path / "evil", "--out", tmp_path / "out").code == 2
    assert command("info", tmp_path / "evil").code == 2
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(str(mark))))
    assert mark.exists(), "the pickle does run where it is loaded"
    tally("pickles not loaded", 3)


class Evil:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_source_file_can_load_a_pickle_or_trust_code_by_itself():
    for path in sorted((ROOT / "rocr").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"} & set(names), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "numpy.load", "yaml.load"), path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value is True), path
