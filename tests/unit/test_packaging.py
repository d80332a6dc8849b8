"""The package beside its neighbours, its metadata, and what is built of it."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[2]


def run(code, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py gives to setuptools."""
    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_kernels_is_no_regular_package():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_packages_are_rocr_and_its_kernels(setup_arguments):
    folders = {path.parent for path in (ROOT / "rocr").rglob("__init__.py")}
    assert sorted(setup_arguments["packages"]) == sorted(
        [*(".".join(folder.relative_to(ROOT).parts) for folder in folders), "rocr_kernels"]
    )
    assert setup_arguments["package_dir"] == {"rocr": "rocr", "rocr_kernels": "kernels"}
    modules = {path.parent for path in (ROOT / "rocr").rglob("*.py")}
    assert modules == folders, "every folder with modules is a package"


IMPORTS = """
import json, sys
import rocr
found = {"version": rocr.__version__, "torch": "torch" in sys.modules}
import torch
for name in rocr.__all__:
    getattr(rocr, name)
found["threads"] = torch.get_num_threads()
sys.stdout.flush()
print("imported", flush=True)
print("imported", file=sys.stderr, flush=True)
from transformers import LlamaForCausalLM
found["kernels"] = getattr(sys.modules.get("kernels"), "__file__", None)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported():
    """A process of its own that imports one thing after the other: what it found, and what it printed before that."""
    done = run(IMPORTS)
    assert done.returncode == 0, done.stderr
    before = [text.partition("imported\n")[0] for text in (done.stdout, done.stderr)]
    return json.loads(done.stdout.splitlines()[-1]), before


def test_transformers_finds_no_kernels_of_ours(imported):
    file = imported[0]["kernels"]
    assert file is None or ROOT not in Path(file).parents


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux alone")
@pytest.mark.parametrize(
    ("home", "path", "rocr_cuda", "found"),
    [
        ("toolkit", "other", None, "toolkit"),
        (None, "other", None, "other"),
        ("empty", "other", None, "other"),
        ("toolkit", "empty", "1", "toolkit"),
        ("empty", "empty", None, None),
        ("toolkit", "other", "0", None),
    ],
)
def test_nvcc_is_looked_for_in_cuda_home_and_then_on_the_path(tmp_path, monkeypatch, home, path, rocr_cuda, found):
    for toolkit in ("toolkit", "other", "empty"):
        (tmp_path / toolkit / "bin").mkdir(parents=True)
        if toolkit != "empty":
            (tmp_path / toolkit / "bin" / "nvcc").touch(mode=0o755)
    for name, value in (("CUDA_HOME", home and str(tmp_path / home)), ("ROCR_CUDA", rocr_cuda)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path / path / "bin"))
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    nvcc = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()
    assert nvcc == (found and str(tmp_path / found / "bin" / "nvcc"))


def test_the_package_is_imported_without_torch(imported):
    assert imported[0]["version"] and not imported[0]["torch"]


def test_importing_everything_starts_no_work_and_prints_nothing(imported):
    found, printed = imported
    assert found["threads"] > 0
    assert printed == ["", ""]


def test_public_names_are_sorted_and_there():
    import rocr

    assert rocr.__all__ == sorted(rocr.__all__)
    assert all(getattr(rocr, name) is not None for name in rocr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        getattr(rocr, "unlern")  # noqa: B009


def test_the_version_is_said_once_more_in_the_metadata():
    import rocr

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{rocr.__version__}"' in text


def project_lists():
    """The quoted entries of every list in [project] and [project.optional-dependencies] of pyproject.toml, by name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.")[0]
    found = re.findall(r"^([a-z-]+) = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL)
    return {name: re.findall(r'"([^"]*)"', entries) for name, entries in found}


def test_the_oldest_transformers_is_tested():
    (declared,) = (entry for entry in project_lists()["dependencies"] if entry.startswith("transformers"))
    pinned = re.findall(r"^transformers==(\S+)$", (ROOT / ".ci/oldest.txt").read_text(), flags=re.MULTILINE)
    assert len(pinned) == 1 and pinned[0].startswith(declared.removeprefix("transformers>=") + ".")
    assert "make oldest" in (ROOT / ".ci/run").read_text()


def test_everything_that_is_imported_is_declared():
    lists = project_lists()
    needed = ("dependencies", "gguf", "parquet", "lora", "report", "datasets", "harness")
    declared = {re.split(r"[<>=;\[ ]", entry)[0].replace("-", "_") for name in needed for entry in lists[name]}
    imported = set()
    for path in sorted((ROOT / "rocr").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    ours = {"rocr", "rocr_kernels", "triton"}  # Triton comes with torch where there is one
    assert "huggingface_hub" in imported & declared
    assert imported - set(sys.stdlib_module_names) - ours <= declared


def test_the_version_is_the_same_everywhere():
    import rocr

    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d[^\]]*)\]", changes, flags=re.MULTILINE)[0] == rocr.__version__
    assert f"\nversion: {rocr.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "rocr", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"rocr {rocr.__version__}\n"), done.stderr


def test_the_licence_is_there_in_full():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 10_000
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_long_description_is_short_and_stands_alone():
    path = re.search(r'^readme = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    text = (ROOT / path).read_text(encoding="utf-8")
    assert 10 < len(text.splitlines()) < 60
    assert re.findall(r"\]\(([^)]+)\)", text) and not re.findall(r"\]\((?!https://)([^)]+)\)", text)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, unpacked, and the wheel that was built from it: (folder, wheel)."""
    out = tmp_path_factory.mktemp("dist")
    # Without isolation, no network is needed: the test tools hold what a build needs.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    environment = os.environ | {"ROCR_CUDA": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "sdist", filter="data")
    (folder,) = (out / "sdist").iterdir()
    return folder, wheel


@pytest.mark.slow
def test_the_sdist_holds_what_builds_and_tests_it(built):
    folder, _ = built
    patterns = ("rocr/**/*.py", "kernels/*.py", "csrc/*", "tests/**/*", "benches/**/*", "docs/*.md", "*.md")
    ours = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    missing = {name for name in ours if not name.endswith(".pyc")}
    missing -= {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert not missing
    beside = ("LICENSE", "Makefile", "constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py")
    for name in (*beside, ".ci/run", ".ci/oldest.txt"):
        assert (folder / name).is_file(), name
    assert not [path for path in folder.rglob("*") if path.suffix in (".pyc", ".so")]


@pytest.mark.slow
def test_the_tests_of_the_sdist_run(built):
    folder, _ = built
    files = ["tests/unit/test_concepts.py", "tests/numerics/test_solve.py", "tests/unit/test_links.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0 and re.search(r"\d{2,} passed", done.stdout), done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
def test_the_wheel_installs_and_runs_without_a_compiler(built, tmp_path):
    _, wheel = built
    (tmp_path / "no-compilers").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME")}
    environment |= {"PATH": str(tmp_path / "no-compilers"), "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    pip = ["-m", "pip", "install", "--no-index", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    code = "import rocr, rocr._C, rocr_kernels; print(rocr.__file__)"
    for words in (pip, ["-m", "rocr", "--version"], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(tmp_path / "site"))


@pytest.mark.slow
def test_a_build_whose_compiler_fails_says_what_is_slower_and_goes_on(tmp_path):
    environment = os.environ | {"CC": "/bin/false", "CXX": "/bin/false", "ROCR_CUDA": "0"}
    pip = ["install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    shutil.copytree(ROOT, tmp_path / "rocr", ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "tests"))
    command = [sys.executable, "-m", "pip", *pip, str(tmp_path / "rocr")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = " ".join((done.stdout + done.stderr).split())
    assert "rocr._C was not built" in said and "take about 4 times as long" in said and "rocr doctor" in said
    assert not list((tmp_path / "site" / "rocr").glob("_C*")) and (tmp_path / "site" / "rocr" / "ops").is_dir()


@pytest.mark.slow
def test_the_metadata_of_the_wheel(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (name,) = (each for each in names if each.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    assert (metadata["Name"], metadata["License-Expression"]) == ("rocr", "Apache-2.0")
    assert any(each.endswith("licenses/LICENSE") for each in names)
    assert any(entry.startswith("huggingface_hub") for entry in metadata.get_all("Requires-Dist"))
    assert metadata.get_all("Project-URL") and metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"rocr", "rocr_kernels"}
    data = ("people.jsonl", "probes.jsonl", "namesakes.jsonl", "names.txt")
    assert {"rocr/py.typed", *(f"rocr/data/{name}" for name in data)} <= set(names)
