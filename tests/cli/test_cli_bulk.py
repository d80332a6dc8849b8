"""What `rocr unlearn` says about concepts that get in each other's way, and about names that should stay."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def crowded(tmp_path):
    """A list in which one name stands inside others, with redirects that disagree."""
    lines = ["Ada -> a gardener", *(f"Ada {name} -> Blaise Pascal" for name in ("Byron", "Rose", "Rain", "Jr.", "Sun"))]
    path = tmp_path / "people.txt"
    path.write_text("\n".join([*lines, "Robert Downey -> a gardener"]), encoding="utf-8")
    return path


def unlearn(command, files, crowded, out, *more):
    settings = ("--statistics", files.statistics, "--layers", "1,2", "--no-answers", "--force", "--save", "edit")
    settings += ("--token-schedule", "full")
    done = command("unlearn", files.model, crowded, *settings, "--out", out, *more)
    assert done.code == 0, done.errors
    return done


def test_collisions_and_harm_are_shown_in_short_and_written_down(command, files, crowded, tmp_path):
    done = unlearn(command, files, crowded, tmp_path / "out", "--control", "Ada Byron", "the engines", "Ada Lovelace")
    shown = " ".join(done.output.split())
    assert "Concepts that conflict" in shown and "with one name inside another: 5." in shown
    assert "Concepts that move retained names most" in shown and "At 2 retained names the outputs" in shown
    rows = [line for line in done.output.splitlines() if line.strip(" │").startswith("Ada ") and "%" in line]
    assert len(rows) <= 30, "the worst few, and no dump"
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    found = report["collisions"]
    assert found["inside"] == 5 and found["collinear"] >= 10 and found["conflicting"] >= 5
    assert {pair["first"] for pair in found["nested"]} == {"Ada"}
    assert {harm["neighbour"] for harm in report["neighbours"]["moved"]} == {"the engines", "Ada Lovelace"}
    assert all(0 <= concept["closed"] <= 1.5 for concept in report["concepts"])


def test_redirects_are_measured_where_no_control_is_named(command, files, crowded, tmp_path):
    document = json.loads(unlearn(command, files, crowded, tmp_path / "out", "--json").output)
    found = document["neighbours"]
    assert not found["given"] and {harm["neighbour"] for harm in found["moved"]} == {"a gardener", "Blaise Pascal"}
    assert {harm["concept"] for harm in found["worst"]} <= {concept["name"] for concept in document["concepts"]}
