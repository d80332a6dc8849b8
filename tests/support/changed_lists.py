"""What `rocr add`, `rocr remove`, `rocr merge` and `rocr aliases` are run on in the tests of options."""

from tests.support.promises import run_command

NEW = ("--concept", "Grace Hopper", "--redirect", "Blaise Pascal")


def changed_lists(files, base):
    """Further arguments of each command, and the folders that commands are run on."""
    grace, two = base / "grace", base / "two"
    more = ("--statistics", files.statistics, "--force", "--no-answers")
    for arguments in (
        ("unlearn", files.model, *NEW, "--layers", "1,2", *more, "--out", grace),
        ("merge", files.edited, grace, "--out", two),
    ):
        done = run_command(*arguments)
        assert done.code == 0, done.errors
    (base / "names.txt").write_text("Ada Byron")
    bases = {"remove": ("Grace Hopper",), "merge": (grace,), "add": (*NEW, *more)}
    bases["aliases"] = (base / "names.txt", "--languages", "Greek")
    return bases, {"remove": two} | dict.fromkeys(("merge", "add", "revert", "verify", "info"), files.edited)
