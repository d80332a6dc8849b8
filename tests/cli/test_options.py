"""Every option of every command changes something: a table of them all, and a test that none is missing from it.

An entry is a function that runs the command without and with the option and compares, or the name of the test that
does: "test_file.py::test_name".
"""

import re
from pathlib import Path

import pytest

from rocr.cli.main import program
from tests.support.option_effects import (
    adds_what_was_before,
    answers_in_so_many_tokens,
    asks_another_question,
    asks_in_more_orders,
    asks_nothing,
    asks_suites,
    attacks,
    changes,
    compares_known_probes,
    cuts_the_adapter,
    keeps_known_probes,
    loads_as,
    loads_whole,
    measures,
    names_neighbours,
    overwrites,
    overwrites_page,
    plans,
    refuses,
    replaces,
    reverts_by_another_file,
    runs_so_many_tokens,
    says_that_nothing_is_loaded,
    shows_another_file,
    shuffles_options,
    shuffles_options_of_methods,
    takes_relatives,
    takes_statistics,
    verifies_by_another_file,
    writes_its_own_text,
    writes_parts,
    writes_where_it_is_told,
)
from tests.support.running_effects import (
    computes_with_threads,
    samples_answers,
    shows_library_warnings,
    shows_no_progress,
    trains_for_steps,
    tunes_for_steps,
    unlearns_in_a_sequence,
)

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
TESTS = Path(__file__).parents[1]
COMMON = {"--json", "--debug"}
"""Options of all commands: test_cli_errors.py holds --json and --debug."""
OFFLINE = "test_no_code_no_network.py"
MODEL = {
    "model": "test_cli.py::test_what_is_no_model_is_refused",
    "--dtype": loads_as,
    "--device": refuses("--device", "nonsense", words="nonsense"),
    "--download": f"{OFFLINE}::test_an_environment_that_says_offline_is_obeyed_also_where_the_network_was_asked_for",
    "--threads": computes_with_threads,
    "--quiet": shows_no_progress,
    "--verbose": shows_library_warnings,
    "--trust-remote-code": f"{OFFLINE}::test_code_beside_a_model_is_run_only_where_that_is_asked_for",
}
RENDERED = "test_rendered.py::test_every_command_that_renders_a_chat_takes_the_settings"
CHAT = dict.fromkeys(("--system", "--template-variable", "--date", "--no-chat"), RENDERED)
PARTIAL = {
    "--partial": "test_cli_partial.py::test_a_model_loaded_in_part_is_edited_to_the_same_bytes",
    "--whole": loads_whole,
}
SAVE = {
    "--save": writes_parts,
    "--lora-rank": cuts_the_adapter,
    "--gguf-type": "test_gguf_commands.py::test_the_type_of_the_edited_tensors_is_chosen",
}
OUT = {"--out": writes_where_it_is_told, "--overwrite": overwrites}
PROJECTED = ("--method", "projected", "--threshold", 0.1)
ADDED = "test_lists.py::test_add_gives_one_edit_of_both"
ALIASES = "test_aliases.py"
RUNNING = {name: MODEL[name] for name in ("--threads", "--quiet", "--verbose")}
ASK, TALK = "test_ask.py", "test_chat_command.py"
ASKED = {
    "--device": f"{ASK}::test_what_cannot_be_asked_is_refused",
    "--download": MODEL["--download"],
    "--trust-remote-code": MODEL["--trust-remote-code"],
    **dict.fromkeys(CHAT, f"{ASK}::test_the_settings_of_the_chat_are_those_of_the_edit_unless_some_are_given"),
    "--model": f"{ASK}::test_an_edit_alone_is_asked_with_the_model_that_it_was_made_for",
    "--answer-tokens": f"{ASK}::test_answers_are_a_table_and_have_so_many_tokens",
}
CHANGED = {
    **RUNNING,
    **OUT,
    **SAVE,
    "edited": "test_lists.py::test_of_edit_files_an_edit_file_is_made",
    "--dtype": loads_as,
    "--device": MODEL["--device"],
    "--trust-remote-code": MODEL["--trust-remote-code"],
}
EFFECTS = {
    "unlearn": {
        **MODEL,
        **PARTIAL,
        **OUT,
        **CHAT,
        "concepts": "test_cli_bulk.py::test_collisions_and_harm_are_shown_in_short_and_written_down",
        "--config": "test_config_file.py::test_every_option_is_read_from_a_file_and_written_for_the_next_run",
        "--concept": replaces("--concept", "Robert Downey"),
        "--allow-long-list": "test_cli_errors.py::test_the_limit_that_a_command_allows_is_that_of_the_edit",
        "--redirect": replaces("--redirect", "a gardener"),
        **SAVE,
        "--quantised": "test_quantised.py::test_an_edited_fp8_model_loads_and_has_the_redirect",
        "--dry-run": plans,
        "--layers": replaces("--layers", "1,3"),
        "--method": changes(*PROJECTED),
        "--template": changes("--template", "It is about {}."),
        "--official": changes("--official", "--threshold", 0.1),
        "--ridge": changes("--ridge", 5),
        "--least-closed": changes("--least-closed", 0, base=("--ridge", 5)),
        "--gamma": changes("--gamma", 2),
        "--threshold": changes("--threshold", 0.5, base=PROJECTED),
        "--strength": changes("--strength", 0.5),
        "--template-weight": changes("--template-weight", 0.5),
        "--retain-weight": changes("--retain-weight", 0, base=("--control", "Lady Quux")),
        "--variants": changes("--variants", "none"),
        "--variant-weight": changes("--variant-weight", 3, base=("--variants", "spelling")),
        "--held-weight": changes("--held-weight", 0.5),
        "--keep-zeros": "test_sparse.py::test_the_options",
        "--fill-zeros": "test_sparse.py::test_the_options",
        "--key-tokens": changes("--key-tokens", "last"),
        "--keys-per-concept": changes("--keys-per-concept", "all"),
        "--token-schedule": changes("--token-schedule", "ramp"),
        "--reach": changes("--reach", "gradual"),
        "--force": "test_guards_passed.py::test_a_limit_passed_by_a_command",
        "--statistics": takes_statistics,
        "--keep-statistics": "test_keep_statistics.py::test_the_next_run_takes_them_and_gives_the_same_weights",
        "--text": replaces("--text", "@text"),
        "--tokens": replaces("--tokens", 300),
        "--seed": writes_its_own_text,
        "--ask": asks_another_question,
        "--control": names_neighbours,
        "--answer-tokens": answers_in_so_many_tokens,
        "--no-answers": asks_nothing,
    },
    "stats": {
        **MODEL,
        **PARTIAL,
        **OUT,
        **CHAT,
        "--layers": replaces("--layers", "1,3"),
        "--text": replaces("--text", "@text"),
        "--tokens": replaces("--tokens", 300),
        "--seed": writes_its_own_text,
        "--length": changes("--length", 16),
        "--batch-tokens": runs_so_many_tokens,
    },
    "eval": {
        **MODEL,
        **OUT,
        **CHAT,
        "--probes": replaces("--probes", "@fewer"),
        "--edit": adds_what_was_before,
        "--forms": replaces("--forms", "fb"),
        "--targets": replaces("--targets", "Blaise Pascal"),
        "--neighbours": changes("--neighbours", 1),
        "--known": keeps_known_probes,
        "--orders": asks_in_more_orders,
        "--seed": shuffles_options,
        "--generate": measures("n-gram entropy", "--generate"),
        "--text": measures("perplexity", "--text", "@long_text"),
        "--utility": measures("utility", "--utility", "@utility"),
        "--suites": asks_suites(3),
        "--suite-folder": asks_suites(4),
        "--suite-limit": asks_suites(5),
        "--attacks": attacks,
        "--fail-if": "test_conditions.py::test_the_command_fails_with_the_conditions_that_hold",
        "--html": overwrites_page,
    },
    "redirects": {
        **MODEL,
        **OUT,
        **CHAT,
        "--probes": replaces("--probes", "@fewer"),
        "--targets": changes("--targets", "Ada Byron"),
        "--among": replaces("--among", "a gardener", "rain"),
    },
    "aliases": {
        **MODEL,
        **CHAT,
        "concepts": f"{ALIASES}::test_a_list_without_redirects_stays_without_unless_one_is_given",
        "--dtype": f"{ALIASES}::test_the_model_is_loaded_in_a_dtype",
        "--out": f"{ALIASES}::test_what_the_model_says_of_the_concept_is_taken_and_the_rest_left",
        "--overwrite": f"{ALIASES}::test_an_existing_list_is_replaced_where_that_is_asked_for",
        "--languages": f"{ALIASES}::test_languages_and_the_limit_are_chosen",
        "--least": f"{ALIASES}::test_languages_and_the_limit_are_chosen",
        "--related": f"{ALIASES}::test_related_things_become_concepts_whose_redirect_is_chosen",
        "--redirect": f"{ALIASES}::test_a_list_without_redirects_stays_without_unless_one_is_given",
    },
    "compare": {
        **MODEL,
        **OUT,
        **CHAT,
        "--text": replaces("--text", "@text"),
        "--tokens": replaces("--tokens", 100),
        "--seed": shuffles_options_of_methods,
        "--probes": replaces("--probes", "@fewer"),
        "--targets": replaces("--targets", "Blaise Pascal"),
        "--redirect": replaces("--redirect", "the rain"),
        "--statistics": takes_statistics,
        "--methods": replaces("--methods", "original,in-context"),
        "--forms": replaces("--forms", "fb"),
        "--known": compares_known_probes,
        "--neighbours": changes("--neighbours", 1),
        "--steps": trains_for_steps,
        "--sequential": unlearns_in_a_sequence,
        "--fade": samples_answers,
        "--references": samples_answers,
        "--relearn": tunes_for_steps,
    },
    "ask": {
        **ASKED,
        **RUNNING,
        "folder": f"{ASK}::test_both_answer_as_they_do_alone",
        "questions": f"{ASK}::test_both_answer_as_they_do_alone",
        "--show": f"{ASK}::test_one_side_is_asked_alone",
    },
    "chat": {
        **ASKED,
        **dict.fromkeys(RUNNING, f"{TALK}::test_the_options_of_running_and_asking_are_those_of_ask"),
        "folder": f"{TALK}::test_lines_are_questions_and_commands",
        "--show": f"{TALK}::test_the_side_that_is_shown_first_is_chosen",
    },
    "apply": {
        "--quantised": "test_quantised.py::test_a_quantised_output_is_verified_and_reverted_byte_for_byte",
        **MODEL,
        **OUT,
        **SAVE,
        "edit": "test_cli.py::test_damaged_edit_file",
        "--allow-fingerprint-mismatch": takes_relatives,
    },
    "revert": {
        **MODEL,
        **OUT,
        "--dtype": says_that_nothing_is_loaded("--dtype", "bfloat16"),
        "--device": says_that_nothing_is_loaded("--device", "nonsense"),
        "--edit": reverts_by_another_file,
    },
    "remove": {
        **CHANGED,
        "names": "test_lists.py::test_remove_gives_the_edit_of_the_rest",
    },
    "merge": CHANGED,
    "add": {
        **CHANGED,
        "--download": MODEL["--download"],
        "--dtype": refuses("--dtype", "bfloat16", words="bfloat16"),
        "concepts": ADDED,
        "--concept": replaces("--concept", "Robert Downey"),
        "--redirect": replaces("--redirect", "a gardener"),
        "--model": ADDED,
        "--allow-long-list": "test_lists.py::test_a_list_that_grows_beyond_the_limit_is_refused_unless_allowed",
        "--force": "test_lists.py::test_limits_of_the_edit_of_all_are_passed_by_force_only",
        "--statistics": "test_lists.py::test_what_cannot_be_added_is_refused",
        "--text": "test_lists.py::test_the_text_of_the_edit_stands_for_its_statistics",
        "--tokens": "test_lists.py::test_the_text_of_the_edit_stands_for_its_statistics",
        "--ask": asks_another_question,
        "--control": names_neighbours,
        "--answer-tokens": answers_in_so_many_tokens,
        "--no-answers": asks_nothing,
    },
    "info": {
        "file": shows_another_file,
        "--plot": "test_info_plot.py::test_an_edit_is_drawn_without_its_model",
    },
    "verify": {
        "folder": "test_verify.py::test_a_file_that_is_not_as_it_was_is_named",
        "--edit": verifies_by_another_file,
    },
    "doctor": {},
    "demo": {
        **dict.fromkeys(
            ("--out", "--overwrite", *RUNNING), "test_demo.py::test_it_is_an_unlearn_of_the_list_of_the_package"
        ),
        "--download": "test_demo.py::test_a_download_that_fails_is_said_in_one_sentence",
    },
}
PLANNED = "test_plan_command.py::test_a_plan_is_a_dry_run"
"""A plan has the options of `unlearn` and runs its function, which the entries of `unlearn` hold."""
EFFECTS["plan"] = dict.fromkeys(EFFECTS["unlearn"].keys() - {"--dry-run", "--overwrite", "--keep-statistics"}, PLANNED)


def test_no_option_is_missing_from_the_table():
    assert EFFECTS.keys() == program.commands.keys()
    for name, command in program.commands.items():
        names = {parameter.opts[0] for parameter in command.params}
        assert names - COMMON == EFFECTS[name].keys(), name


def test_the_tests_that_the_table_names_are_there():
    named = {effect for effects in EFFECTS.values() for effect in effects.values() if isinstance(effect, str)}
    for name in named:
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test}\(", next(TESTS.rglob(file)).read_text(encoding="utf-8"), re.MULTILINE), name


# Of `compare`, which trains and asks for each run, the options that it alone has; those shared with others are slow.
ALWAYS = {f"compare {option}" for option in ("--methods", "--statistics", "--redirect", "--sequential", "--references")}
# What loads a model and writes an output is one function for all commands; of the commands beside `unlearn`, `apply`
# and `revert`, the options of that function are slow.
SHARED = {f"{command} {option}" for command in ("stats", "eval", "redirects") for option in ("--dtype", "--overwrite")}


def is_always(command, option):
    name = f"{command} {option}"
    return name in ALWAYS or (command != "compare" and name not in SHARED)


CHECKED = [
    pytest.param(
        command,
        effect,
        id=f"{command} {option}",
        marks=() if is_always(command, option) else pytest.mark.slow,
    )
    for command, effects in EFFECTS.items()
    for option, effect in effects.items()
    if not isinstance(effect, str)
]


@pytest.mark.parametrize(("command", "effect"), CHECKED)
def test_an_option_has_an_effect(command, effect, run):
    effect(command, run)
