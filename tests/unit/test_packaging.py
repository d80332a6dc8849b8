"""The package beside its neighbours: a folder named kernels must not hide the package of that name."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


def setup_arguments():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"]
    assert len(calls) == 1
    return {keyword.arg: keyword.value for keyword in calls[0].keywords}


def test_kernels_is_no_regular_package():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_packages_are_listed_by_hand_and_completely():
    arguments = setup_arguments()
    packages = ast.literal_eval(arguments["packages"])
    places = ast.literal_eval(arguments["package_dir"])
    folders = {path.parent for path in (ROOT / "rocr").rglob("__init__.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"rocr_kernels"}
    assert sorted(packages) == sorted(expected)
    assert places["rocr_kernels"] == "kernels"
    for name in packages:
        place = (
            places.get(name) or f"{places.get('rocr', 'rocr')}/{name.removeprefix('rocr').strip('.').replace('.', '/')}"
        )
        assert (ROOT / place).is_dir(), f"{name} is said to lie in {place}"


def test_transformers_finds_no_kernels_of_ours():
    done = run(
        "import sys\n"
        "from transformers import LlamaForCausalLM\n"
        "found = sys.modules.get('kernels')\n"
        "print(getattr(found, '__file__', None))"
    )
    assert done.returncode == 0, done.stderr
    file = done.stdout.strip().splitlines()[-1]
    assert file == "None" or ROOT not in Path(file).parents


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


def test_the_package_is_imported_without_torch():
    done = run("import sys, rocr\nassert rocr.__version__\nprint('torch' in sys.modules)")
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_importing_everything_starts_no_work_and_prints_nothing():
    done = run(
        "import rocr, torch\nfor name in rocr.__all__:\n    getattr(rocr, name)\nprint(torch.get_num_threads() > 0)"
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


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
