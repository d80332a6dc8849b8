"""A tiny model with its files, commands in this process, and counts of attacks."""

from __future__ import annotations

import io
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from huggingface_hub import constants
from torch import nn

import rocr
from rocr.cli import main

WithinLimits = Callable[[], AbstractContextManager[None]]
_COUNTS: pytest.StashKey[Counter[str]] = pytest.StashKey()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the counts of a process of pytest-xdist to the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["promises"] = dict(session.config.stash.get(_COUNTS, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the counts that a process of pytest-xdist sent."""
    node.config.stash.setdefault(_COUNTS, Counter()).update(getattr(node, "workeroutput", {}).get("promises", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the counts of attacks, all of them withstood unless a test has failed."""
    counts = config.stash.get(_COUNTS, Counter())
    if counts:
        terminalreporter.section("promises")
        for what in sorted(counts):
            terminalreporter.write_line(f"{counts[what]:6,} {what}")


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Callable[..., None]:
    """tally(what, count=1): count attacks for the summary at the end."""
    counts = pytestconfig.stash.setdefault(_COUNTS, Counter())

    def add(what: str, count: int = 1) -> None:
        counts[what] += count

    return add


@pytest.fixture(scope="session")
def files(
    tmp_path_factory: pytest.TempPathFactory, _llama: nn.Module, tokenizer: Any, texts: list[str]
) -> SimpleNamespace:
    """A tiny model on disk: model (a folder), text, statistics, edit, edited (a folder)."""
    base = tmp_path_factory.mktemp("promises")
    places = SimpleNamespace(
        model=base / "model",
        text=base / "text.txt",
        statistics=base / "statistics",
        edit=base / "edited" / "edit.safetensors",
        edited=base / "edited",
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _llama.save_pretrained(places.model)  # type: ignore[operator]
    tokenizer.save_pretrained(places.model)
    places.text.write_text("\n\n".join(texts * 4), encoding="utf-8")
    for arguments in (
        ("stats", places.model, "--text", places.text, "--layers", "1,2", "--out", places.statistics),
        ("unlearn", places.model, *CONCEPT, "--statistics", places.statistics, "--out", places.edited),
    ):
        done = run_command(*arguments)
        assert done.code == 0, done.errors
    return places


CONCEPT = (
    *("--concept", "Ada Byron", "--redirect", "Blaise Pascal"),
    *("--layers", "1,2", "--no-answers", "--force"),
)
"""A random model is edited as no trained one is, so that its limits are put aside."""


@pytest.fixture(scope="session")
def concept() -> tuple[str, ...]:
    return CONCEPT


def run_command(*arguments: object) -> SimpleNamespace:
    """A command in this process: code, output, errors."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    return SimpleNamespace(code=code, output=output.getvalue(), errors=errors.getvalue())


@pytest.fixture(scope="session")
def command() -> Callable[..., SimpleNamespace]:
    return run_command


def names(folder: Path) -> list[str]:
    """Return the sorted names of the entries of a folder."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """digests(folder): sha256 of every file below it."""
    from rocr.export.manifest import file_digests

    return file_digests


@pytest.fixture(scope="session")
def loaded_edit(files: SimpleNamespace) -> rocr.Edit:
    return rocr.Edit.load(files.edit)


@pytest.fixture
def refused(command: Callable[..., SimpleNamespace], within_limits: WithinLimits) -> Callable[..., SimpleNamespace]:
    """refused(arguments): the command must end with exit code 2 and a sentence, soon and without much memory."""

    def run(*arguments: object) -> SimpleNamespace:
        with within_limits():
            done = command(*arguments)
        assert done.code == 2, done.errors[-2000:]
        assert "Traceback" not in done.errors
        assert done.errors.replace("\n", "").isprintable()
        assert len(done.errors) < 30_000
        return done

    return run


@pytest.fixture
def attack(
    tmp_path: Path, refused: Callable[..., SimpleNamespace], tally: Callable[..., None]
) -> Callable[..., SimpleNamespace]:
    """attack(kind, arguments): the command must be refused and change nothing."""

    def run(kind: str, *arguments: object) -> SimpleNamespace:
        before = names(tmp_path)
        done = refused(*arguments, "--out", tmp_path / "out")
        assert names(tmp_path) == before
        tally(f"bad {kind} refused")
        return done

    return run


@pytest.fixture
def on_statistics(
    attack: Callable[..., None], files: SimpleNamespace, concept: tuple[str, ...]
) -> Callable[[object], None]:
    """on_statistics(path): a statistics file at a path must be refused."""
    return lambda path: attack("statistics files", "unlearn", files.model, *concept, "--statistics", path)


@pytest.fixture
def on_edit(attack: Callable[..., None], files: SimpleNamespace) -> Callable[[object], None]:
    """on_edit(path): an edit file at a path must be refused."""
    return lambda path: attack("edit files", "apply", files.model, path)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Attempted connections; each is refused. HF_HUB_OFFLINE of the environment is ignored."""
    attempts: list[tuple[object, ...]] = []

    def refuse(*arguments: object, **_options: object) -> None:
        attempts.append(arguments)
        raise RuntimeError("no network here")  # what is no OSError is not tried again and again

    for name in ("getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if hasattr(transformers.utils.hub, "_is_offline_mode"):
        monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False)
    return attempts
