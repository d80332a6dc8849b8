import errno
import os
import re
import signal
import time
from pathlib import Path

import pytest

from rocr.errors import InputError, RocrError
from rocr.io.output import check_output, new_directory, new_file
from tests.support.promises import names

LEFTOVER = re.compile(r"out\.(partial|old)-[0-9a-f]{8}")


def fill(folder, text="new"):
    (folder / "inner").mkdir()
    (folder / "a.bin").write_text(text)
    (folder / "inner" / "b.bin").write_text(text)


def test_a_folder_appears_under_its_name_when_the_context_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_directory("out") as partial:
        assert LEFTOVER.fullmatch(partial.name)
        monkeypatch.chdir("/")  # the temporary path does not depend on the current folder
        fill(partial)
        assert names(tmp_path) == [partial.name]
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "inner" / "b.bin").read_text() == "new"


def test_a_file_appears_under_its_name_when_the_context_ends(tmp_path):
    with new_file(tmp_path / "out") as partial:
        assert LEFTOVER.fullmatch(partial.parent.name)
        partial.write_text("new")
        partial.with_name(".tmp-of-a-library").write_text("new")
        assert names(tmp_path) == [partial.parent.name]
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "new"


def stop_by_error():
    raise ValueError("stop")


def stop_by_signal():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(6000):  # another thread may receive it; this one runs the handler when it is next scheduled
        time.sleep(0.01)
    raise AssertionError("the signal did not come within a minute")


@pytest.mark.parametrize(("stop", "raised"), [(stop_by_error, ValueError), (stop_by_signal, KeyboardInterrupt)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path, stop, raised, overwrite):
    if overwrite:
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "old")
        (tmp_path / "out.bin").write_text("old")
    before = names(tmp_path)
    with pytest.raises(raised), new_directory(tmp_path / "out", overwrite=overwrite) as partial:
        fill(partial)
        stop()
    with pytest.raises(raised), new_file(tmp_path / "out.bin", overwrite=overwrite) as partial:
        partial.write_text("new")
        stop()
    assert names(tmp_path) == before
    if overwrite:
        assert (tmp_path / "out" / "a.bin").read_text() == (tmp_path / "out.bin").read_text() == "old"


def test_overwrite_replaces_the_whole_and_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.bin").write_text("old")
    (tmp_path / "out.bin").write_text("old")
    with new_directory(tmp_path / "out", overwrite=True) as partial:
        fill(partial)
        assert names(tmp_path / "out") == ["stale.bin"]
    with new_file(tmp_path / "out.bin", overwrite=True) as partial:
        partial.write_text("new")
        assert (tmp_path / "out.bin").read_text() == "old"
    assert names(tmp_path) == ["out", "out.bin"]
    assert names(tmp_path / "out") == ["a.bin", "inner"]
    assert (tmp_path / "out.bin").read_text() == "new"
    with new_directory(tmp_path / "fresh", overwrite=True) as partial:
        fill(partial)
    assert names(tmp_path) == ["fresh", "out", "out.bin"]


def test_overwrite_does_not_replace_one_kind_by_the_other(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for name in ("file", "link"):
        with pytest.raises(InputError, match="not a folder"), new_directory(tmp_path / name, overwrite=True):
            pass
    with pytest.raises(InputError, match="not a file"), new_file(tmp_path / "folder", overwrite=True):
        pass
    assert names(tmp_path) == ["file", "folder", "link"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model folder, a text file, and symlinks to them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / "parts").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "to_model").symlink_to(tmp_path / "model")
    (tmp_path / "model_link").symlink_to("model")
    (tmp_path / "config_link").symlink_to("model/config.json")
    (tmp_path / "text_link").symlink_to("text.txt")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.link(tmp_path / "text.txt", tmp_path / "text_twin")
    return tmp_path


REFUSED = [
    # (output, inputs, overwrite, what the error says)
    ("model", [], False, "exists"),
    ("text.txt", [], False, "exists"),
    ("dangling", [], False, "exists"),
    ("model", ["model"], True, "is the input model"),
    ("model/", ["model"], False, "is the input"),
    ("model_link", ["model"], True, "is the input"),
    ("model", ["model_link"], True, "is the input model_link"),
    ("text_twin", ["text.txt"], True, "is the input"),
    ("text.txt", ["text_link"], True, "is the input"),
    ("model/out", ["model"], False, "inside the input model"),
    ("model/parts/out", ["model"], False, "inside"),
    ("model/no/such/out", ["model"], False, "inside"),
    ("model_link/out", ["model"], False, "inside"),
    ("model/out", ["other/to_model"], False, "inside the input other/to_model"),
    ("other/../model_link/parts/../out", ["model"], False, "inside"),
    ("other/to_model/../model/out", ["model"], False, "inside"),
    ("model", ["model/config.json"], True, "contains the input"),
    ("other", ["other/to_model"], True, "contains the input"),
    ("model", ["config_link"], True, "contains the input"),
    (".", [], True, "current folder"),
    ("..", [], True, "current folder"),
    ("/", [], True, "current folder"),
    ("", [], True, "current folder"),
    ("missing/out", [], False, "missing does not exist"),
    ("text.txt/out", [], False, "text.txt is not a folder"),
    ("dangling/out", [], False, "does not exist"),
    ("zero\0", [], False, "zero byte"),
    ("out", ["zero\0"], False, "cannot be examined"),
]


@pytest.mark.parametrize(("output", "inputs", "overwrite", "part"), REFUSED)
def test_an_output_that_would_harm_something_is_refused(model, output, inputs, overwrite, part):
    before = sorted(model.rglob("*"))
    with pytest.raises(InputError, match=re.escape(part)):
        check_output(output, inputs, overwrite)
    with pytest.raises(InputError, match=re.escape(part)), new_directory(output, inputs, overwrite):
        pass
    assert sorted(model.rglob("*")) == before


def test_the_home_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match="home folder"):
        check_output(tmp_path / "home", overwrite=True)


@pytest.mark.parametrize("output", ["out", "model-out", "other/to_model/../out", "other/new"])
def test_an_output_beside_the_inputs_is_accepted(model, output):
    inputs = ["model", "text.txt", "HuggingFaceTB/SmolLM2-135M", "model_link"]
    check_output(output, inputs)
    check_output("other", [*inputs, "missing"], overwrite=True)


def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(InputError, match="no permission"):
            check_output(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("make", [new_directory, new_file])
def test_what_the_file_system_refuses_becomes_a_sentence(make):
    with pytest.raises(RocrError, match=r"/proc/.*out"), make("/proc/self/out") as partial:
        partial.write_text("never")


@pytest.mark.parametrize("make", [new_directory, new_file])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, make):
    with pytest.raises(RocrError) as caught, make(tmp_path / "out") as partial:
        if make is new_directory:
            fill(partial)
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    assert str(caught.value) == (
        f"The output {tmp_path / 'out'} could not be written, and its parts are removed: No space left on device."
    )
    assert caught.value.exit_code == 1
    assert names(tmp_path) == []


def test_an_error_about_something_else_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), new_directory(tmp_path / "out"):
        (tmp_path / "out.txt").read_text()
    with pytest.raises(BrokenPipeError), new_directory(tmp_path / "out"):
        reading, writing = os.pipe()
        os.close(reading)
        os.write(writing, b"x")
    assert names(tmp_path) == []


def test_a_file_that_nobody_wrote_is_an_error(tmp_path):
    with pytest.raises(RocrError, match="Nothing was written"), new_file(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def take_by_file(path):
    path.write_text("theirs")


def take_by_folder(path):
    path.mkdir()
    (path / "theirs").touch()


@pytest.mark.parametrize("take", [take_by_file, take_by_folder, Path.mkdir, lambda path: path.symlink_to("gone")])
@pytest.mark.parametrize("make", [new_directory, new_file])
def test_a_name_that_is_taken_meanwhile_is_left_as_it_is(tmp_path, make, take):
    with pytest.raises(RocrError, match="Another process wrote the output"), make(tmp_path / "out") as partial:
        fill(partial) if make is new_directory else partial.write_text("ours")
        take(tmp_path / "out")
        before = [path.lstat().st_ino for path in (tmp_path / "out", *tmp_path.glob("out/*"))]
    assert names(tmp_path) == ["out"]
    assert [path.lstat().st_ino for path in (tmp_path / "out", *tmp_path.glob("out/*"))] == before


def test_a_file_system_without_hard_links_is_served_by_a_rename(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with new_file(tmp_path / "out") as partial:
        partial.write_text("new")
    assert names(tmp_path) == ["out"]
    with pytest.raises(RocrError, match="Another process wrote the output"), new_file(tmp_path / "other") as partial:
        partial.write_text("ours")
        (tmp_path / "other").write_text("theirs")
    assert (tmp_path / "other").read_text() == "theirs"


def test_all_is_on_disk_before_the_name_is_given(tmp_path, monkeypatch):
    order = []
    sync, rename = os.fsync, os.rename

    def watch_sync(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def watch_rename(source, target):
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "rename", watch_rename)
    with new_directory(tmp_path / "out") as partial:
        fill(partial)
        (partial / "link").symlink_to("/proc/version")
        os.mkfifo(partial / "pipe")  # nothing to sync; opening it would wait forever
    inner = f"{partial}/inner"
    assert sorted(order[:4]) == sorted([f"{partial}/a.bin", f"{inner}/b.bin", inner, str(partial)])
    assert order[3] == str(partial)
    assert order[4:] == ["rename", str(tmp_path)]
