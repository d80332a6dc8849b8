"""`rocr compare`: compare editing methods on the same targets and questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.arguments import chat_of, check_text, claim_output, collect, load_language_model, source_of
from rocr.cli.console import Console
from rocr.cli.evaluate import check_package, form_names
from rocr.cli.parsing import Arguments, command, flag, option
from rocr.cli.values import COUNT
from rocr.concepts import Concept, check_concepts, check_names, folded
from rocr.errors import InputError

if TYPE_CHECKING:
    from rocr.evaluation import Probe
    from rocr.model.load import LoadedModel
    from rocr.statistics.statistics import Statistics


@command("compare")
@options.model
@option("--targets", "Subjects to forget, one at a time.", several=True, required=True, metavar="NAME")
@option("--redirect", "Redirect of the targets.", required=True, metavar="NAME")
@options.out("Results to write, JSON")
@option("--methods", "Methods, separated by commas (default: all).", metavar="LIST")
@options.scoring
@option("--steps", "Train methods that train for N steps (default: as many as their authors).", type=COUNT)
@flag("--sequential", "Unlearn one target after another in the same model, and ask about all so far after each.")
@option("--fade", "Measure FADE with N sampled answers to each question (default: not).", type=COUNT)
@option("--references", "Further names to take the place of the target's for FADE.", several=True, metavar="NAME")
@option("--relearn", "Fine-tune each model for N steps on questions about others, and ask again.", type=COUNT)
@options.statistics
@options.text
@options.chat
def compare(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Compare rocr with other methods."""
    from rocr.config import EditConfig
    from rocr.evaluation.baselines.methods import MethodComparison, Robustness, compare_methods
    from rocr.evaluation.baselines.tables import forget_table, results_json, retain_table, robustness_table
    from rocr.evaluation.neighbours import keep_nearest
    from rocr.evaluation.probes.load import load_probes
    from rocr.evaluation.probes.probe import split_by_subject
    from rocr.evaluation.report import write_json

    arguments.chat = chat_of(arguments)
    check_names("--targets", arguments.targets)
    check_names("--redirect", [arguments.redirect])
    source = source_of(arguments)
    claim_output(arguments, source.inputs)
    methods = _methods(arguments)
    forms = form_names(arguments.forms)
    for target in arguments.targets:
        check_concepts([Concept(target, arguments.redirect)])
    check_text(arguments)
    probes = every = split_by_subject(load_probes(arguments.probes, arguments.download), arguments.targets)
    with console.stage("load"):
        loaded = load_language_model(arguments, source)
    if arguments.neighbours:
        probes = keep_nearest(
            loaded.model, loaded.tokenizer, probes, arguments.targets, arguments.neighbours, arguments.chat
        )
    if not arguments.methods:
        methods = _able(methods, loaded, console)
    statistics = _statistics(arguments, loaded, methods, console)
    probes = _known(arguments, loaded, probes, forms, console)
    _check_targets(arguments.targets, probes)
    comparison = MethodComparison(
        loaded.model,
        loaded.tokenizer,
        probes,
        statistics,
        arguments.redirect,
        config=EditConfig(chat=arguments.chat),
        forms=forms,
        steps=arguments.steps,
        seed=arguments.seed,
        retain=_apart(every, probes),
        sequential=arguments.sequential,
    )
    robustness = Robustness(arguments.fade or 0, tuple(arguments.references), arguments.relearn or 0)
    results = []
    with console.stage("methods") as progress:
        for result in compare_methods(comparison, arguments.targets, methods, progress, robustness):
            results.append(result)
            console.warn(f"{result.method}: {result.target} in {result.seconds:.1f} s")
    document = {
        "format": "rocr comparison 1",
        "known": arguments.known,
        "steps": arguments.steps or 0,
        "seed": arguments.seed,
        "sequential": arguments.sequential,
        "retain_trained_on": "other subjects" if comparison.retain else "the retain set",
        "fade_samples": robustness.fade_samples,
        "relearning_steps": robustness.relearning_steps,
        "results": results_json(results),
    }
    write_json(document, arguments.out, arguments.overwrite)
    console.table("Forget set: mean scores over targets", *forget_table(results, forms))
    console.table("Retain set: mean scores over targets", *retain_table(results, forms))
    console.table("Forget set: what is left in the worst wording, and after fine-tuning", *robustness_table(results))
    console.say(f"The results are in {arguments.out}.")
    return document


def _methods(arguments: Arguments) -> list[str]:
    """Return the methods to compare: by default all, or all that are defined for a sequence. Check their packages."""
    from rocr.evaluation.baselines.methods import METHOD, METHODS, check_methods, sequential_methods

    default = sequential_methods() if arguments.sequential else METHODS
    methods = [name.strip() for name in arguments.methods.split(",")] if arguments.methods else list(default)
    check_methods(methods, arguments.sequential)
    if arguments.references and not arguments.fade:
        raise InputError("--references names what FADE compares with, and FADE is not measured: give --fade N too.")
    check_names("--references", arguments.references)
    for name in methods:
        for module, extra in METHOD[name].packages:
            check_package(module, extra, f"The method {name}")
    return methods


def _able(methods: Sequence[str], loaded: LoadedModel, console: Console) -> list[str]:
    """Return the methods that can change a model, where none are asked for by name, and say why others are left out."""
    from rocr.evaluation.baselines.methods import METHOD

    able = []
    for name in methods:
        try:
            METHOD[name].check(loaded.model)
        except InputError as error:
            console.warn(f"{name} is left out: {error}")
        else:
            able.append(name)
    return able


def _apart(every: Sequence[Probe], asked: Sequence[Probe]) -> list[Probe]:
    """Return the probes about subjects that are not asked about: with --neighbours, methods may train on these."""
    subjects = {folded(probe.subject) for probe in asked}
    return [probe for probe in every if folded(probe.subject) not in subjects and probe.form == "qa"]


def _check_targets(targets: Sequence[str], probes: Sequence[Probe]) -> None:
    """Check that each target has a question, before anything is trained."""
    asked = {folded(probe.subject) for probe in probes}
    silent = [target for target in targets if folded(target) not in asked]
    if silent:
        raise InputError(
            f"No probe that counts asks about {', '.join(map(repr, silent))}: lower --known, or leave them out."
        )


def _statistics(arguments: Arguments, loaded: LoadedModel, methods: Sequence[str], console: Console) -> Statistics:
    from rocr.evaluation.baselines.methods import layers_to_edit
    from rocr.statistics.statistics import Statistics

    if arguments.statistics:
        return Statistics.load(arguments.statistics)
    return collect(arguments, loaded, layers_to_edit(loaded.model, methods=methods), console)


def _known(
    arguments: Arguments, loaded: LoadedModel, probes: list[Probe], forms: list[str], console: Console
) -> list[Probe]:
    from rocr.evaluation import EvaluateOptions, evaluate

    if arguments.known is None:
        return probes
    with console.stage("what the model knows") as progress:
        base = evaluate(
            loaded.model,
            loaded.tokenizer,
            probes,
            forms,
            targets=arguments.targets,
            known=arguments.known,
            options=EvaluateOptions(seed=arguments.seed, chat=arguments.chat),
            progress=progress,
        )
    kept = {item.probe for item in base.items}
    console.say(f"{base.known} of {base.probes} probes are known to the model; only these count.")
    return [probe for i, probe in enumerate(probes) if i in kept]
