"""`rocr add`: add concepts to an edit, on the model that it was made for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.answers import answerable, answers_of, ask_model, filled_questions, questions, retained_names
from rocr.cli.arguments import (
    check_quantised,
    check_text,
    claim_output,
    collect,
    last_layer_to_load,
    load,
    open_quantised,
    source_of,
    start_running,
)
from rocr.cli.base import Edited, open_edited, restored_base
from rocr.cli.change import say_inexact
from rocr.cli.console import Console
from rocr.cli.outputs import check_parts, check_writable, show_adapter, write_output
from rocr.cli.parsing import Arguments, argument, command, flag, option
from rocr.cli.tables import show_report
from rocr.cli.unlearn import given_concepts, load_statistics, most_concepts
from rocr.cli.values import DIR, FILE
from rocr.cli.zeros import check_kept
from rocr.concepts import MAX_CONCEPTS, Concept, check_concepts, check_length, check_names
from rocr.errors import InputError

if TYPE_CHECKING:
    from rocr.edit.edit import Edit
    from rocr.model.load import LoadedModel, ModelSource
    from rocr.statistics.statistics import Statistics


@command("add")
@argument("edited", "An output folder of rocr, or an edit file.", type=FILE)
@argument("concepts", "A list of the concepts to add: .txt, .csv or .jsonl.", type=FILE, required=False)
@option("--concept", "A concept to add, in place of a list. May be repeated.", multiple=True, metavar="NAME")
@option("--redirect", "Redirect of concepts that have none of their own.", metavar="NAME")
@flag("--allow-long-list", f"Allow more than {MAX_CONCEPTS:,} concepts.")
@option("--model", "The model that an edit file was made for; that of a folder is restored.", type=FILE)
@options.out("Folder to write", DIR)
@options.save_again
@flag("--force", "Continue past the safety limits of an edit; the report says so.")
@options.loading_or_download
@options.statistics
@options.plain_text
@questions
def add(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Add concepts to an edit and save the model with the edit of all.

    The settings are those of the edit, and the statistics must be those that it was made with.
    """
    if arguments.model is None:  # else source_of does it
        start_running(arguments)
    edited = open_edited(arguments.edited)
    edit = edited.edit
    concepts = given_concepts(arguments)
    everything = [*edit.concepts, *concepts]
    check_length(len(everything), most_concepts(arguments, everything))
    check_concepts(everything)
    _check_model(arguments, edited)
    arguments.chat, arguments.seed, arguments.quantised = edit.config.chat, edit.config.seed, edited.quantised
    check_text(arguments)
    check_names("--control", arguments.control)

    from rocr.export.folder import holds_already

    asked = [] if arguments.no_answers else filled_questions(arguments, concepts)
    arguments.save = arguments.save or edited.parts
    statistics = load_statistics(arguments)
    with _base(arguments, edited, console) as source:
        check_parts(arguments, source)
        check_quantised(arguments, source)
        check_kept(edit, arguments.save)
        last_layer = _last_layer(arguments, source, edit, statistics)
        if last_layer is not None and asked:
            console.warn("Only the first layers of the model are loaded, so nothing is asked before and after.")
            asked = []
        with console.stage("load"):
            loaded = load(arguments, source, last_layer)
            open_quantised(loaded, edit.config, edit.fingerprint.layer)
        held = holds_already(loaded, edit)
        if held is not None:
            raise InputError(f"{held} of {arguments.model} holds this edit already: give the model without the edit.")
        check_writable(arguments, loaded, edit.layers)
        asked = answerable(loaded, asked, console)
        before = ask_model(loaded, asked, arguments, console, "answers before")
        if statistics is None:
            differs = edit.mismatch(loaded.model)
            if differs is not None:
                raise InputError(differs)
            statistics = collect(arguments, loaded, edit.layers, console)
        changed = _changed(loaded, edit, concepts, statistics, arguments, console)
        after = ask_model(loaded, asked, arguments, console, "answers after")
        answers = answers_of(arguments, concepts, asked, before, after)
        more = {"quantised": arguments.quantised, "added": [concept.name for concept in concepts]}
        report = write_output(arguments, loaded, changed, arguments.save, console, answers, **more)
    show_report(report, console, arguments.out)
    show_adapter(report, console, arguments.out)
    say_inexact(changed, console)
    return report


def _check_model(arguments: Arguments, edited: Edited) -> None:
    """Raise InputError unless --model is given with an edit file, and only with one."""
    if edited.folder is None and arguments.model is None:
        raise InputError(f"{edited.place} is an edit file: give the model that it was made for with --model.")
    if edited.folder is not None and arguments.model is not None:
        raise InputError(
            f"{edited.place} is a folder, whose own model is restored: leave out --model, or give its edit file."
        )


@contextmanager
def _base(arguments: Arguments, edited: Edited, console: Console) -> Iterator[ModelSource]:
    """The model without the edit: that of --model, or the one that the folder was made from."""
    if edited.folder is None:
        source = source_of(arguments)
        claim_output(arguments, (*source.inputs, edited.place))
        yield source
        return
    claim_output(arguments, (edited.place,))
    arguments.model = edited.place
    with restored_base(arguments, edited, console) as source:
        yield source


def _last_layer(arguments: Arguments, source: ModelSource, edit: Edit, statistics: Statistics | None) -> int | None:
    """The last layer to load of a large model; None if all are needed, for its predictions or for text of its own."""
    arguments.partial = False
    arguments.whole = edit.config.token_schedule == "predicted" or (statistics is None and not arguments.text)
    return last_layer_to_load(arguments, source, edit.config, statistics)


def _changed(
    loaded: LoadedModel,
    edit: Edit,
    concepts: list[Concept],
    statistics: Statistics,
    arguments: Arguments,
    console: Console,
) -> Edit:
    from rocr.edit.guards import Guards
    from rocr.edit.harm import MAX_ASKED
    from rocr.unlearn import add_concepts

    everything = [*edit.concepts, *concepts]
    # Without the records of the edited weights, which are of the files' dtype: the model is known to be unedited.
    edit = replace(edit, updates=[replace(update, applied=None) for update in edit.updates])
    guards = Guards(force=arguments.force, concepts=most_concepts(arguments, everything))
    retain, ask = retained_names(arguments, everything), 0 if arguments.no_answers else MAX_ASKED
    with console.stage("edit") as progress:
        changed = add_concepts(
            edit, concepts, loaded.model, loaded.tokenizer, statistics, progress, guards, retain, ask
        )
    for sentence in changed.report.limits_passed:
        console.warn(f"Forced: {sentence}")
    # The name of the model, and not of the folder in which it is restored.
    return replace(changed, fingerprint=replace(changed.fingerprint, name=edit.fingerprint.name))
