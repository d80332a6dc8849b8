"""`rocr info` of a list of concepts, and of a file that is named as one."""

import json

import pytest

CASES = {
    "list.txt": "Ada Byron | the countess -> Blaise Pascal\nRobert Downey\n",
    "list.csv": "name,redirect,aliases\nAda Byron,Blaise Pascal,the countess\nRobert Downey,,\n",
    "list.jsonl": '{"name": "Ada Byron", "redirect": "Blaise Pascal", "aliases": ["the countess"]}\n'
    '{"name": "Robert Downey"}\n',
}


@pytest.mark.parametrize("name", CASES)
def test_a_list_is_named_as_one(name, command, tmp_path):
    (tmp_path / name).write_text(CASES[name], encoding="utf-8")
    done = command("info", tmp_path / name, "--json")
    assert done.code == 0, done.errors
    assert json.loads(done.output) == {
        "format": "list of concepts",
        "concepts": 2,
        "aliases": 1,
        "redirects": 1,
        "without a redirect": 1,
    }


def test_a_list_with_flaws_is_refused_with_the_first_of_them(command, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("".join(f"Person {i} => Blaise Pascal\n" for i in range(9)), encoding="utf-8")
    done = command("info", path)
    assert done.code == 2
    lines = done.errors.splitlines()
    assert lines[0].endswith("list.txt is read as a list of concepts, by its name, but it is not a valid one:")
    assert lines[1].endswith("list.txt:1: has '=>' in place of '->'; write: name | alias | alias -> redirect")
    assert lines[-1] == "and 4 more lines" and len(lines) == 7
    assert "header" not in done.errors
