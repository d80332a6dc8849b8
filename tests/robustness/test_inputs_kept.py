"""No command replaces, with --overwrite, what it reads: neither the model nor lists, text, statistics or edits."""

import shutil

import pytest


def unlearn(inputs):
    return "unlearn", inputs.model, inputs / "list.txt"


COMMANDS = {
    "the text of statistics": lambda f: ("stats", f.model, "--text", f / "text.txt", "--out", f / "text.txt"),
    "a folder around the text": lambda f: ("stats", f.model, "--text", f / "text.txt", "--out", f),
    "the statistics": lambda f: (*unlearn(f), "--statistics", f / "statistics", "--out", f / "statistics"),
    "a folder around the statistics": lambda f: (*unlearn(f), "--statistics", f / "statistics", "--out", f),
    "the list": lambda f: (*unlearn(f), "--text", f.text, "--out", f / "list.txt"),
    "a folder around the list": lambda f: (*unlearn(f), "--text", f.text, "--out", f),
    "a link to a folder around the list": lambda f: (*unlearn(f), "--text", f.text, "--out", f.link / "in"),
    "the edit": lambda f: ("apply", f.model, f / "edit", "--out", f / "edit"),
    "a folder around the edit": lambda f: ("apply", f.model, f / "edit", "--out", f),
    "an edit whose list changes": lambda f: ("remove", f / "edit", "Ada Byron", "--out", f / "edit"),
    "a folder around such an edit": lambda f: ("remove", f / "edit", "Ada Byron", "--out", f),
    "the second of two edits": lambda f: ("merge", f.edited, f / "edit", "--out", f / "edit"),
    "the list that is added": lambda f: (
        *("add", f.edited, f / "more.txt", "--statistics", f / "statistics", "--out", f / "more.txt"),
    ),
    "the statistics that are added with": lambda f: (
        *("add", f.edited, f / "more.txt", "--statistics", f / "statistics", "--out", f / "statistics"),
    ),
    "an output folder": lambda f: ("merge", f / "edit", f.edited, "--out", f.edited),
    "a folder in an output folder": lambda f: ("remove", f.edited, "Ada Byron", "--out", f.edited / "out"),
    "the probes": lambda f: ("eval", f.model, "--probes", f / "probes.jsonl", "--out", f / "probes.jsonl"),
    "the model": lambda f: (*unlearn(f), "--text", f.text, "--out", f.model),
    "a folder in the model": lambda f: (*unlearn(f), "--text", f.text, "--out", f.model / "out"),
    "a report in the model": lambda f: ("eval", f.model, "--probes", f / "probes.jsonl", "--out", f.model / "a.json"),
    "a page in the model": lambda f: (
        *("eval", f.model, "--probes", f / "probes.jsonl", "--out", f.link / "a.json", "--html", f.model / "a.html"),
    ),
    "the probes of a comparison": lambda f: (
        *("compare", f.model, "--probes", f / "probes.jsonl", "--targets", "Ada", "--redirect", "a gardener"),
        *("--out", f / "probes.jsonl"),
    ),
}  # fmt: skip


class Inputs:
    """A folder of inputs: `inputs / name` is a path in it."""

    def __init__(self, folder, files):
        (folder / "outer" / "in").mkdir(parents=True)
        self.folder, self.link, self.model, self.text = (
            folder / "outer" / "in",
            folder / "link",
            files.model,
            files.text,
        )
        self.link.symlink_to("outer")
        for name, path in (("text.txt", files.text), ("statistics", files.statistics), ("edit", files.edit)):
            shutil.copy(path, self.folder / name)
        (self.folder / "list.txt").write_text("Ada Byron -> Blaise Pascal")
        (self.folder / "more.txt").write_text("Grace Hopper -> Blaise Pascal")
        self.edited = files.edited
        (self.folder / "probes.jsonl").write_text('{"subject": "Ada", "query": "Who?", "answer": "Byron"}')

    def __truediv__(self, name):
        return self.folder / name

    def __fspath__(self):
        return str(self.folder)

    __str__ = __fspath__


@pytest.mark.parametrize("what", COMMANDS)
def test_what_is_read_is_never_replaced(what, files, tmp_path, command, digests):
    arguments = COMMANDS[what](Inputs(tmp_path, files))
    before, model, edited = digests(tmp_path), digests(files.model), digests(files.edited)
    done = command(*arguments, "--overwrite")
    assert done.code == 2, done.errors
    assert "input" in done.errors
    assert digests(tmp_path) == before
    assert digests(files.model) == model
    assert digests(files.edited) == edited
