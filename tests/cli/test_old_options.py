"""Options of rocr 0.1 that have new names."""

import json

import pytest


@pytest.mark.parametrize(
    ("old", "new", "setting", "value"),
    [
        (("--reach", "gradual"), "--token-schedule ramp", "token_schedule", "ramp"),
        (("--reach", "whole"), "--token-schedule full", "token_schedule", "full"),
        (("--held-weight", "0.5"), "--template-weight 0.5", "template_weight", 0.5),
    ],
)
def test_an_old_name_sets_the_new_setting_and_warns(old, new, setting, value, files, concept, command, tmp_path):
    out = tmp_path / "out"
    arguments = ("unlearn", files.model, *concept, "--statistics", files.statistics, "--out", out, *old)
    done = command(*arguments)
    assert done.code == 0, done.errors
    assert json.loads((out / "report.json").read_text())["config"][setting] == value
    assert f"{' '.join(old)} is now {new}." in done.errors


def test_both_names_of_a_setting_are_refused(files, concept, refused, tmp_path):
    given = ("--reach", "gradual", "--token-schedule", "ramp", "--out", tmp_path / "out")
    done = refused("unlearn", files.model, *concept, "--statistics", files.statistics, *given)
    assert "--reach is the old name of --token-schedule: give only --token-schedule." in done.errors
