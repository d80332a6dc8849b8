"""`rocr stats`: statistics of ordinary text, for many edits of one model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import (
    add_chat,
    add_model,
    add_partial,
    add_text,
    chat_of,
    check_text,
    claim_output,
    layer_list,
    load,
    loads_partially,
    source_of,
    whole_number,
)
from rocr.cli.console import Console
from rocr.cli.interruption import SaidElsewhere
from rocr.cli.process_group import own_device, process_group
from rocr.errors import InputError, RocrError
from rocr.statistics.corpus import read_texts, text_digest

if TYPE_CHECKING:
    from rocr.model.load import ModelSource
    from rocr.statistics.collect import CollectOptions
    from rocr.statistics.distributed import Ranks


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser("stats", parents=[common], help="collect key statistics from text")
    add_model(parser)
    add_partial(parser)
    add_text(parser)
    add_chat(parser)
    parser.add_argument("--layers", type=layer_list, help="such as 4,5,6 (default: chosen from the depth)")
    parser.add_argument(
        "--length",
        type=whole_number(1, 2**20),
        default=512,
        metavar="N",
        help="tokens of a sequence of --text (default: 512)",
    )
    parser.add_argument(
        "--batch-tokens",
        type=whole_number(1, 2**24),
        default=8192,
        metavar="N",
        help="tokens run at once (default: 8192)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Collect statistics, going on where an interrupted run with the same arguments stopped.

    Of the processes that torchrun started, each takes a share; process 0 writes, and says what is wrong.
    """
    arguments.chat = chat_of(arguments)
    arguments.device = own_device(arguments.device)
    with process_group(arguments.device) as ranks:
        console.speak_as(ranks.rank)
        try:
            return _run(arguments, console, ranks)
        except RocrError as error:
            if ranks.rank and error.is_broadcast:
                raise SaidElsewhere(error.exit_code) from None
            raise


def _run(arguments: argparse.Namespace, console: Console, ranks: Ranks) -> dict[str, Any]:
    from rocr.statistics.collect import collect_statistics

    texts = list(arguments.text or ())
    with ranks.together():
        source = source_of(arguments)
        if ranks.rank == 0:
            claim_output(arguments, source.inputs)
        check_text(arguments)
        options, checkpoint = _options(arguments, texts, ranks)
    with ranks.together(), console.stage("load"):
        loaded = load(arguments, source, _last_layer(arguments, source))
    if checkpoint is not None and checkpoint.exists():
        console.warn(f"Going on from {checkpoint}.")
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


def _options(arguments: argparse.Namespace, texts: list[str], ranks: Ranks) -> tuple[CollectOptions, Path | None]:
    """How the text is read, and the file of this process's own checkpoint."""
    from rocr.statistics.collect import CollectOptions

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


def _last_layer(arguments: argparse.Namespace, source: ModelSource) -> int | None:
    """The last layer to load; None: the whole model."""
    if not loads_partially(arguments, source):
        return None
    if not arguments.text:
        raise InputError(
            "Only the beginning of the model is loaded, so it cannot write ordinary text itself: give --text, or load "
            "the --whole model."
        )
    from rocr.config import EditConfig
    from rocr.model.architecture import find_architecture
    from rocr.model.layers import chosen_layers
    from rocr.model.load_partial import empty_model

    architecture = find_architecture(empty_model(source, arguments.trust_remote_code))
    last = max(chosen_layers(EditConfig(layers=arguments.layers), architecture))
    return last if loads_partially(arguments, source, last) else None
