"""What may import what: DESIGN.md's layers, read from the source itself."""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "rocr").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
CHECKED = [*PACKAGE, *KERNELS, *sorted((ROOT / "tests").rglob("*.py")), ROOT / "setup.py"]
MAX_LINES = 400
PLAIN_MODULES = {"rocr.errors", "rocr.progress", "rocr.io.json_values"}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path):
    """Full names of everything that a file imports, also inside functions and for type checks only."""
    package = module_name(path).split(".")[: -1 if path.name != "__init__.py" else None]
    names = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, node.module] if node.module else base)
            names += [f"{origin}.{alias.name}" for alias in node.names]
    return names


def is_of(name, package):
    return name == package or name.startswith(f"{package}.")


def violations(paths, is_wrong):
    return [f"{path.relative_to(ROOT)} imports {name}" for path in paths for name in imports(path) if is_wrong(name)]


def is_backend(path):
    return path.parent.name == "ops"


def test_there_is_something_to_check():
    assert len(PACKAGE) > 30
    assert "rocr.ops" in {module_name(path) for path in PACKAGE}
    assert "rocr.errors.InputError" in set(imports(ROOT / "rocr" / "ops" / "dispatch.py"))


def test_only_ops_and_its_backends_know_the_compiled_parts():
    others = [path for path in PACKAGE if not is_backend(path)]
    assert not violations(others, lambda name: is_of(name, "rocr._C") or is_of(name, "rocr_kernels"))
    assert violations([path for path in PACKAGE if is_backend(path)], lambda name: is_of(name, "rocr._C"))


def test_compiled_parts_are_imported_when_they_are_used():
    for path in filter(is_backend, PACKAGE):
        tree = parsed(path)
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [alias.name for node in top for alias in node.names]
        assert not [name for name in names if is_of(name, "rocr._C") or is_of(name, "rocr_kernels")], path
        assert not [name for name in names if is_of(name, "triton")], path


def test_only_the_command_line_prints():
    for path in PACKAGE:
        if (ROOT / "rocr" / "cli") in path.parents:
            continue
        calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
        printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printed, f"{path} prints in line {printed}"


def test_the_reference_imports_torch_only():
    allowed = ("torch", "rocr.ops.rounding", "collections.abc", "__future__")
    path = ROOT / "rocr" / "ops" / "reference.py"
    assert not violations([path], lambda name: not any(is_of(name, package) for package in allowed))
    rounding = ROOT / "rocr" / "ops" / "rounding.py"
    standard = sys.stdlib_module_names
    allowed_in_rounding = ("torch", "rocr.errors")
    assert not violations(
        [rounding],
        lambda name: name.split(".")[0] not in standard and not any(is_of(name, p) for p in allowed_in_rounding),
    )


def test_kernels_import_torch_and_triton_only():
    known = {"torch", "triton", "rocr_kernels"} | sys.stdlib_module_names
    assert not violations(KERNELS, lambda name: name.split(".")[0] not in known)


def test_nothing_imports_tests_benches_or_the_command_line():
    entrances = {ROOT / "rocr" / "__main__.py"}
    library = [path for path in PACKAGE if (ROOT / "rocr" / "cli") not in path.parents and path not in entrances]
    assert not violations(
        [*library, *KERNELS], lambda name: any(is_of(name, p) for p in ("tests", "benches", "rocr.cli"))
    )
    assert not violations([*PACKAGE, *KERNELS], lambda name: is_of(name, "tests") or is_of(name, "benches"))


def test_plain_modules_import_the_standard_library_only():
    paths = [path for path in PACKAGE if module_name(path) in PLAIN_MODULES]
    assert paths
    assert not violations(paths, lambda name: name.split(".")[0] not in sys.stdlib_module_names)


FLOORS = (
    {"errors", "progress"},
    {"argument_checks"},
    {"io", "deprecation"},
    {"concepts"},
    {"chat_settings"},
    {"config"},
    {"ops"},
    {"solve", "model"},
    {"keys", "statistics"},
    {"edit"},
    {"unlearn"},
    {"evaluation"},
    {"export"},
    {"demo"},
    {"cli"},
)
"""The folders and files of rocr/, the lowest first: each imports from floors below its own, and from itself."""


def floor_of(name):
    part = name.split(".")[1] if "." in name else ""
    return next((number for number, floor in enumerate(FLOORS) if part in floor), None)


def package_imports(path):
    """The modules of rocr that a file imports, also inside functions and for type checks; a package's name stays."""
    known = {module_name(each) for each in PACKAGE}
    found = set()
    for name in imports(path):
        if is_of(name, "rocr"):
            found.add(next(part for part in (name, name.rpartition(".")[0]) if part in known or part == "rocr._C"))
    return found - {"rocr", "rocr._C"}


def test_every_folder_imports_from_floors_below_its_own():
    wrong = []
    for path in PACKAGE:
        name = module_name(path)
        if floor_of(name) is None:
            assert name in ("rocr", "rocr.__main__"), f"{name} is on no floor"
            continue
        part = name.split(".")[1]
        for other in package_imports(path):
            if other.split(".")[1] != part and not floor_of(other) < floor_of(name):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {module_name(path): package_imports(path) for path in PACKAGE}
    # A module and the package it is in belong together: `from rocr.cli import stats` loads what is asked for.
    graph = {name: {other for other in found if not is_of(name, other)} for name, found in graph.items()}
    done = set()

    def visit(name, path):
        assert name not in path, " imports ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; the limit is {MAX_LINES}"
