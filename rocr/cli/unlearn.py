"""`rocr unlearn`: redirect concepts and write the edited model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.answers import answerable, answers_of, ask_model, filled_questions, questions, retained_names
from rocr.cli.arguments import (
    chat_of,
    check_quantised,
    check_text,
    claim_output,
    collect,
    files_read,
    last_layer_to_load,
    load,
    open_quantised,
    source_of,
)
from rocr.cli.config_file import ConfiguredCommand, config_of, settings_text
from rocr.cli.console import Console
from rocr.cli.outputs import check_parts, check_writable, show_adapter, write_output
from rocr.cli.parsing import Arguments, argument, choice, command, flag, option
from rocr.cli.tables import show_report
from rocr.cli.values import DIR, FILE
from rocr.cli.verdicts import next_step, path_note
from rocr.cli.zeros import with_zeros
from rocr.concepts import (
    MAX_CONCEPTS,
    Concept,
    check_concepts,
    check_length,
    check_names,
    load_concepts,
)
from rocr.errors import InputError
from rocr.io.output import check_output

if TYPE_CHECKING:
    from rocr.config import EditConfig
    from rocr.edit.edit import Edit
    from rocr.model.load import LoadedModel, ModelSource
    from rocr.statistics.statistics import Statistics

setting = partial(option, group="Settings")


@command("unlearn", ConfiguredCommand)
@options.model
@argument("concepts", "A list of concepts: .txt, .csv or .jsonl.", type=FILE, required=False)
@option("--concept", "A concept, in place of a list. May be repeated.", multiple=True, metavar="NAME")
@option("--redirect", "Redirect of concepts that have none of their own; auto chooses one for each.", metavar="NAME")
@flag("--allow-long-list", f"Allow more than {MAX_CONCEPTS:,} concepts. Try --dry-run first.")
@option(
    "--config",
    "Options in a TOML file, such as edit.toml of an output; those of the command line replace them.",
    type=FILE,
)
@options.out("Folder to write", DIR, required=False)
@options.save
@options.quantised
@flag("--dry-run", "Check all inputs, show what would be done, and stop.")
@options.partial_model
@options.layers
@setting("--method", "Metric that protects ordinary keys (default: whitened).", type=choice("whitened", "projected"))
@flag("--official", "Use the settings of the paper's authors, as a baseline.", group="Settings")
@setting("--ridge", "Ridge λ of the linear system (default: 1).", type=float)
@setting(
    "--least-closed", "Share of its residual that a name's last token closes at least (default: 0.95).", type=float
)
@setting("--gamma", "Weight γ of ordinary keys, for whitened (default: 10).", type=float)
@setting("--threshold", "Eigenvalues below it are free to use, for projected (default: 0.02).", type=float)
@setting("--strength", "Share of the way from a concept to its redirect (default: 1).", type=float)
@setting(
    "--template-weight",
    "Weight of the templates' own tokens beside ordinary text (default: 0.03 for long lists, else 0).",
    type=float,
)
@setting(
    "--retain-weight",
    "Weight of the names that must stay as they are, such as namesakes, against the concepts; 0 only measures them "
    "(default: 1).",
    type=float,
)
@setting("--key-tokens", "Tokens of a name that become keys (default: all).", type=choice("last", "all"))
@setting(
    "--keys-per-concept",
    "Average the keys of a concept over the templates, or use all of them (default: mean).",
    type=choice("mean", "all"),
)
@setting(
    "--token-schedule",
    "Move each token of a name as far as the model expects the rest of the name after it, all of them the full way, or "
    "the first ones only part of it (default: predicted).",
    type=choice("predicted", "full", "ramp"),
)
@setting(
    "--variants",
    "Further names of a concept that become keys: misspellings, initials and other spellings, and with all also the "
    "aliases that the model proposes (default: spelling for fewer than 25 concepts, none for more or with --key-tokens "
    "last).",
    type=choice("none", "spelling", "all"),
)
@setting("--variant-weight", "Weight of a variant against a name of the concept (default: 0.3).", type=float)
@setting("--held-weight", "Old name of --template-weight.", type=float)
@setting("--reach", "Old name of --token-schedule: whole is full, gradual is ramp.", type=choice("gradual", "whole"))
@flag(
    "--keep-zeros",
    "Keep elements of the edited weights that are exactly zero (default: where more than 20% of a weight are).",
    group="Settings",
)
@flag("--fill-zeros", "Edit a sparse model as a dense one, also where its weights are zero.", group="Settings")
@flag("--force", "Continue past the safety limits of an edit; the report says so.", group="Settings")
@setting(
    "--template",
    "Context in which names are read, with {} once: a user's message, or plain text with --no-chat. Replaces the "
    "default contexts. May be repeated.",
    multiple=True,
)
@options.chat
@options.statistics
@options.text
@option(
    "--keep-statistics",
    "File to write the statistics to that the run collects, for --statistics of the next run.",
    type=FILE,
)
@questions
def unlearn(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Redirect concepts and save the edited model.

    Files, options and names are checked before the model is loaded.
    """
    arguments.chat = chat_of(arguments)
    concepts = given_concepts(arguments)
    settings = _settings(arguments, console)
    check_length(len(concepts), most_concepts(arguments, concepts))
    source = source_of(arguments)
    check_quantised(arguments, source)
    _check_output(arguments, source)
    check_parts(arguments, source)
    check_text(arguments)
    _check_kept_statistics(arguments, source)

    check_names("--control", arguments.control)
    asked = [] if arguments.no_answers else filled_questions(arguments, concepts)
    config = _config(arguments, console)
    statistics = load_statistics(arguments)
    last_layer = last_layer_to_load(arguments, source, config, statistics)
    if last_layer is not None and config.token_schedule is None and not arguments.official:
        console.warn(
            "Only the first layers of the model are loaded, so its predictions cannot tell how far the first tokens of "
            "a name are moved: --token-schedule goes by the length of the list."
        )
    if last_layer is not None and asked:
        console.warn("Only the first layers of the model are loaded, so nothing is asked before and after.")
        asked = []
    if arguments.dry_run:
        from rocr.cli.plan import show_plan

        with console.stage("dry run"):
            return show_plan(arguments, concepts, source, config, len(asked), last_layer, console)
    with console.stage("load"):
        loaded = load(arguments, source, last_layer)
        open_quantised(loaded, config, 0 if statistics is None else statistics.fingerprint.layer)
    asked = answerable(loaded, asked, console)
    config = with_zeros(_with_layers(config, loaded), loaded, arguments, console)
    check_writable(arguments, loaded, config.layer_numbers)
    before = ask_model(loaded, asked, arguments, console, "answers before")
    if statistics is None:
        statistics = collect(arguments, loaded, config.layer_numbers, console)
        if arguments.keep_statistics is not None:
            # Before the edit, which a limit may refuse.
            statistics.save(arguments.keep_statistics, overwrite=arguments.overwrite)
            console.say(f"The statistics are in {arguments.keep_statistics}, for --statistics of the next run.")
    edit = _edit(loaded, concepts, statistics, config, arguments, console)
    concepts = edit.concepts  # with their redirects chosen
    after = ask_model(loaded, asked, arguments, console, "answers after")
    answers = answers_of(arguments, concepts, asked, before, after)
    quantised = arguments.quantised
    report = write_output(
        arguments, loaded, edit, arguments.save, console, answers, quantised=quantised, settings=settings
    )
    show_report(report, console, arguments.out)
    show_adapter(report, console, arguments.out)
    note = path_note(arguments.model)
    if note is not None:
        console.warn(note)
    console.say(next_step(report, arguments.out))
    return report


def given_concepts(arguments: Arguments) -> list[Concept]:
    """The concepts of the list, or those of --concept.

    Raises:
        InputError: both or neither are given, or a concept is not valid.
    """
    if (arguments.concepts is None) == (not arguments.concept):
        raise InputError("Give either a list of concepts or --concept NAME.")
    if arguments.concepts is not None:
        return load_concepts(arguments.concepts, default_redirect=arguments.redirect)
    if not arguments.redirect:
        raise InputError("--concept needs a redirect: give --redirect NAME, or --redirect auto.")
    concepts = [Concept(name, arguments.redirect) for name in arguments.concept]
    check_concepts(concepts)
    return concepts


def _settings(arguments: Arguments, console: Console) -> str | None:
    """The options of this run as a file for --config, which the output gets; None if they cannot be written.

    A list of concepts that is not as in the run that wrote the file of --config is warned about.
    """
    from rocr.export.copying import SETTINGS_FILE
    from rocr.export.manifest import file_digest

    digest = None if arguments.concepts is None else file_digest(Path(arguments.concepts))
    file = config_of(arguments.context)
    if file is not None and file.concepts_sha256 not in (None, digest):
        found = "is not given" if digest is None else f"has the sha256 {digest[:12]}"
        console.warn(
            f"The list of concepts {found}; that of the run that wrote {file.path} had {file.concepts_sha256[:12]}: "
            "the edit will differ from it."
        )
    try:
        return settings_text(arguments.context, digest)
    except UnicodeEncodeError:
        console.warn(f"The output gets no {SETTINGS_FILE}: a path or text of the command line is not UTF-8.")
        return None


def most_concepts(arguments: Arguments, concepts: list[Concept]) -> int:
    """Maximum number of concepts."""
    return max(MAX_CONCEPTS, len(concepts)) if arguments.allow_long_list else MAX_CONCEPTS


def _check_output(arguments: Arguments, source: ModelSource) -> None:
    if arguments.out is None:
        if not arguments.dry_run:
            raise InputError("Give --out DIR, the folder for the edited model.")
        return
    if arguments.dry_run:
        check_output(arguments.out, inputs=source.inputs, overwrite=arguments.overwrite)
    else:
        claim_output(arguments, source.inputs)


def _check_kept_statistics(arguments: Arguments, source: ModelSource) -> None:
    """Check that the file of --keep-statistics can be written.

    Raises:
        InputError: Nothing is collected, the file exists, or it is an input or lies in the output.
    """
    path = arguments.keep_statistics
    if path is None:
        return
    if arguments.statistics is not None:
        raise InputError("--keep-statistics needs statistics that are collected: leave out --statistics.")
    place = Path(path).resolve()
    if arguments.out is not None and Path(arguments.out).resolve() in (place, *place.parents):
        raise InputError(f"--keep-statistics {path} lies in the output {arguments.out}: write it beside the folder.")
    check_output(path, inputs=(*source.inputs, *files_read(arguments)), overwrite=arguments.overwrite)


def _config(arguments: Arguments, console: Console) -> EditConfig:
    import dataclasses

    from rocr.config import EditConfig, Template

    numbers = ("ridge", "least_closed", "gamma", "threshold", "strength", "seed")
    weights = ("template_weight", "retain_weight", "variant_weight")
    names = (*numbers, *weights, "layers", "method", "key_tokens", "keys_per_concept", "token_schedule", "variants")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    given |= _renamed(arguments, console)
    if arguments.template:
        given["templates"] = tuple(Template(text, chat=True) for text in arguments.template)
    if arguments.keep_zeros and arguments.fill_zeros:
        raise InputError("--keep-zeros and --fill-zeros contradict each other: give one of them.")
    if arguments.keep_zeros or arguments.fill_zeros:
        given["keep_zeros"] = arguments.keep_zeros
    config = EditConfig.official() if arguments.official else EditConfig()
    return dataclasses.replace(config, chat=arguments.chat, **given)


def _renamed(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Settings that were given under their old names, by the new ones.

    Raises:
        InputError: both names of a setting were given.
    """
    from rocr.config import RENAMED

    found = {}
    for old, new in RENAMED.items():
        value = getattr(arguments, old)
        if value is None:
            continue
        old_option, new_option = (f"--{name.replace('_', '-')}" for name in (old, new.name))
        if getattr(arguments, new.name) is not None:
            raise InputError(f"{old_option} is the old name of {new_option}: give only {new_option}.")
        found[new.name] = new.new_value(value)
        console.warn(f"{old_option} {value} is now {new_option} {found[new.name]}.")
    return found


def load_statistics(arguments: Arguments) -> Statistics | None:
    """The statistics of --statistics, if it is given."""
    if arguments.statistics is None:
        return None
    from rocr.statistics.statistics import Statistics

    return Statistics.load(arguments.statistics)


def _with_layers(config: EditConfig, loaded: LoadedModel) -> EditConfig:
    from rocr.model.layers import resolve_layers

    return resolve_layers(config, loaded.architecture)


def _edit(
    loaded: LoadedModel,
    concepts: list[Concept],
    statistics: Statistics,
    config: EditConfig,
    arguments: Arguments,
    console: Console,
) -> Edit:
    from rocr.edit.guards import Guards
    from rocr.edit.harm import MAX_ASKED
    from rocr.unlearn import unlearn

    guards = Guards(force=arguments.force, concepts=most_concepts(arguments, concepts))
    retain = retained_names(arguments, concepts)
    with console.stage("edit") as progress:
        edit = unlearn(
            loaded.model,
            loaded.tokenizer,
            concepts,
            statistics,
            config,
            progress,
            guards,
            retain=retain,
            ask=0 if arguments.no_answers else MAX_ASKED,
        )
    for sentence in edit.report.limits_passed:
        console.warn(f"Forced: {sentence}")
    return edit
