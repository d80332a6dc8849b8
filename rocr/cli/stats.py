"""`rocr stats`: collect key statistics of ordinary text, which serve many edits of one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import (
    chat_of,
    chat_options,
    check_text,
    claim_output,
    layers_option,
    load,
    loads_partially,
    model_arguments,
    out_options,
    partial_options,
    source_of,
    text_options,
)
from rocr.cli.console import Console
from rocr.cli.interruption import SaidElsewhere
from rocr.cli.parsing import Arguments, command, option
from rocr.cli.process_group import own_device, process_group
from rocr.cli.values import number
from rocr.errors import InputError, RocrError
from rocr.texts import read_texts, text_digest

if TYPE_CHECKING:
    from rocr.collect import CollectOptions
    from rocr.models import ModelSource
    from rocr.ranks import Ranks


@command("stats")
@model_arguments
@out_options("File to write")
@layers_option
@option(
    "--length",
    type=number(int, 1, 2**20),
    default=512,
    metavar="N",
    help="Tokens of a sequence of --text (default: 512).",
)
@option(
    "--batch-tokens", type=number(int, 1, 2**24), default=8192, metavar="N", help="Tokens of a batch (default: 8192)."
)
@partial_options
@text_options
@chat_options
def stats(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Collect key statistics from text.

    An interrupted run continues if it is started again with the same arguments. With torchrun, each process reads a
    share of the text, and process 0 writes the file and reports errors.
    """
    arguments.chat = chat_of(arguments)
    arguments.device = own_device(arguments.device)
    with process_group(arguments.device) as ranks:
        console.speak_as(ranks.rank)
        try:
            return _run(arguments, console, ranks)
        except RocrError as error:
            if ranks.rank and error.told:
                raise SaidElsewhere(error.exit_code) from None
            raise


def _run(arguments: Arguments, console: Console, ranks: Ranks) -> dict[str, Any]:
    from rocr.collect import collect_statistics

    texts = arguments.text
    with ranks.together():
        source = source_of(arguments)
        if ranks.rank == 0:
            claim_output(arguments, source.inputs)
        check_text(arguments)
        options, checkpoint = _options(arguments, texts, ranks)
    with ranks.together(), console.stage("load"):
        loaded = load(arguments, source, _last_layer(arguments, source))
    if checkpoint is not None and checkpoint.exists():
        console.warn(f"Continuing from {checkpoint}.")
    with console.stage("statistics") as progress:
        documents = read_texts(texts) if texts else None
        statistics = collect_statistics(loaded.model, loaded.tokenizer, documents, arguments.layers, options, progress)
    with ranks.together():
        if ranks.rank == 0:
            statistics.save(arguments.out, overwrite=arguments.overwrite)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    layers = ", ".join(map(str, statistics.layers))
    console.say(f"{arguments.out}: {statistics.tokens:,} tokens at layers {layers}.")
    return {
        "out": arguments.out,
        "tokens": statistics.tokens,
        "layers": list(statistics.layers),
        "text": statistics.text,
        "fingerprint": statistics.fingerprint.to_json(),
        "provenance": None if statistics.provenance is None else statistics.provenance.to_json(),
        "processes": ranks.size,
        "seconds": console.seconds,
    }


def _options(arguments: Arguments, texts: tuple[str, ...], ranks: Ranks) -> tuple[CollectOptions, Path | None]:
    """Options of the collection, and the path of this process's checkpoint."""
    from rocr.collect import CollectOptions

    checkpoint = Path(f"{arguments.out}.checkpoint") if texts else None
    options = CollectOptions(
        tokens=arguments.tokens,
        length=arguments.length,
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        text_sha256=text_digest(texts) if texts else None,
        text_bytes=sum(Path(text).stat().st_size for text in texts) or None,
        checkpoint=checkpoint,
        chat=arguments.chat,
    )
    return options, ranks.checkpoint(checkpoint)


def _last_layer(arguments: Arguments, source: ModelSource) -> int | None:
    """Index of the last layer to load; None: the whole model."""
    if not loads_partially(arguments, source):
        return None
    if not arguments.text:
        raise InputError(
            "Only the first layers of the model are loaded, so it cannot write ordinary text itself: give --text, or "
            "--whole to load the whole model."
        )
    from rocr.config import EditConfig
    from rocr.layers import chosen_layers
    from rocr.partial import empty_model

    last = max(chosen_layers(EditConfig(layers=arguments.layers), empty_model(source, arguments.trust_remote_code)))
    return last if loads_partially(arguments, source, last) else None
