"""Nothing that rocr reads can run code, and rocr opens no connection that nobody asked for."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOB = """
import os, pickle, socket, sys
refused = []

def refuse(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        refused.append(event)
        raise OSError(f"{event} is not allowed")
    if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        refused.append(f"{event} {arguments[:2]}")

os.environ.pop("HF_HUB_OFFLINE", None)
from rocr.cli import main
import transformers.modeling_utils, torch
sys.addaudithook(refuse)
model, text, edit, edited, base = sys.argv[1:]
concept = ["--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,2", "--no-answers", "--force"]
codes = [
    main(["stats", model, "--text", text, "--layers", "1,2", "--out", f"{base}/statistics"]),
    main(["unlearn", model, *concept, "--statistics", f"{base}/statistics", "--out", f"{base}/edited"]),
    main(["apply", model, edit, "--out", f"{base}/applied"]),
    main(["revert", edited, "--out", f"{base}/reverted"]),
    main(["info", edit]),
]
print()
print(codes, sorted(set(refused)))
"""


def test_the_commands_work_without_sockets_and_without_pickle(files, tmp_path, tally):
    arguments = (files.model, files.text, files.edit, files.edited, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", JOB, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("\n")[-1] == "[0, 0, 0, 0, 0] []", done.stdout[-2000:]
    tally("commands run without sockets", 5)


HUB = """
import socket, sys
tried = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        tried.append(event)
        raise OSError("no network here")
sys.addaudithook(watch)
from rocr.cli import main
code = main(["stats", "somebody/nothing", "--text", sys.argv[1], "--out", sys.argv[2]])
print(code, tried)
"""


def test_the_id_of_a_model_on_a_hub_is_not_looked_up_unless_asked(files, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["HF_HOME"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(files.text), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip().split("\n")[-1] == "2 []", done.stdout + done.stderr
    assert "--download" in done.stderr


def test_code_beside_a_model_is_not_run(files, tmp_path, command):
    import shutil

    shutil.copytree(files.model, tmp_path / "model")
    mark = tmp_path / "ran"
    for stem in ("configuration_evil", "modeling_evil"):
        (tmp_path / "model" / f"{stem}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    code = {"AutoConfig": "configuration_evil.E", "AutoModelForCausalLM": "modeling_evil.E"}
    out = tmp_path / "out"
    for model_type, expected in (("evil", 2), ("llama", 0)):
        (tmp_path / "model" / "config.json").write_text(
            json.dumps(config | {"auto_map": code, "model_type": model_type})
        )
        done = command("stats", tmp_path / "model", "--text", files.text, "--layers", "1", "--out", out)
        assert done.code == expected, done.errors
        assert not mark.exists()


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
