"""docs/promises.md: each promise names tests that hold it, and these tests are there and run by default."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
NUMBER = 14


@functools.cache
def promises():
    """The tests that hold each promise, by its number."""
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| *(\d+) *\|(.+)\|(.+)\| *$", text, flags=re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, NUMBER + 1))
    return {int(number): REFERENCE.findall(tests) for number, _, tests in rows}


@functools.cache
def defined(file):
    """The test functions of a file and the names of their marks."""
    tree = ast.parse(next((ROOT / "tests").rglob(file)).read_text(encoding="utf-8"))
    everywhere = [ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    module_marks = [text for text in everywhere if "pytest.mark." in text]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: [*map(ast.unparse, node.decorator_list), *module_marks] for node in functions}


@pytest.mark.parametrize("number", range(1, NUMBER + 1))
def test_every_promise_has_tests_that_are_run(number):
    tests = promises()[number]
    assert tests
    for file, name in tests:
        assert list((ROOT / "tests").rglob(file)), f"{file} is not there"
        assert name in defined(file), f"{file} has no {name}"
        marks = " ".join(defined(file)[name])
        assert not re.search(r"mark\.(slow|gpu|skip|xfail)\b", marks), f"{file}::{name} is not run by default"


CLAIMS = re.compile(r"\b(erased?|erasure|permanently|irreversibl\w*|guarantee\w*)\b", re.IGNORECASE)
DENIAL = "not proof of erasure"


def test_reports_never_say_that_something_is_erased(files):
    text = (files.edited / "report.json").read_text(encoding="utf-8")
    assert not CLAIMS.search(text)
    report = json.loads(text)
    assert "not proof that the concepts cannot be recovered" in report["note"]
    for field in ("config", "versions", "files", "layers", "concepts", "statistics", "fingerprint", "limits_passed"):
        assert field in report
    for path in sorted((ROOT / "rocr").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for sentence in said:
            assert not CLAIMS.search(sentence.replace(DENIAL, "")), f"{path.name}: {sentence[:100]}"
