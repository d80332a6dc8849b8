"""`rocr stats`: statistics of ordinary text, for many edits of one model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import (
    add_model,
    add_partial,
    add_text,
    claim_output,
    layer_list,
    load,
    loads_partially,
    positive,
    source_of,
)
from rocr.cli.console import Console
from rocr.errors import InputError
from rocr.texts import check_texts, read_texts, text_digest

if TYPE_CHECKING:
    from rocr.models import ModelSource


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser("stats", parents=[common], help="collect key statistics from text")
    add_model(parser)
    add_partial(parser)
    add_text(parser)
    parser.add_argument("--layers", type=layer_list, help="such as 4,5,6 (default: chosen from the depth)")
    parser.add_argument("--length", type=positive, default=512, metavar="N", help="tokens of a sequence (default: 512)")
    parser.add_argument(
        "--batch-tokens", type=positive, default=8192, metavar="N", help="tokens run at once (default: 8192)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Collect statistics, going on where an interrupted run with the same arguments stopped."""
    source = source_of(arguments)
    claim_output(arguments, source.inputs)
    texts = list(arguments.text or ())
    check_texts(texts)

    from rocr.collect import CollectOptions, collect_statistics

    checkpoint = Path(f"{arguments.out}.checkpoint") if texts else None
    options = CollectOptions(
        tokens=arguments.tokens,
        length=arguments.length,
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        text_sha256=text_digest(texts) if texts else None,
        text_bytes=sum(Path(text).stat().st_size for text in texts) or None,
        checkpoint=checkpoint,
    )
    with console.stage("load"):
        loaded = load(arguments, source, _last_layer(arguments, source))
    if checkpoint is not None and checkpoint.exists():
        console.warn(f"Going on from {checkpoint}.")
    with console.stage("statistics") as progress:
        documents = read_texts(texts) if texts else None
        statistics = collect_statistics(loaded.model, loaded.tokenizer, documents, arguments.layers, options, progress)
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
        "seconds": console.seconds,
    }


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
    from rocr.partial import empty_model
    from rocr.pipeline import chosen_layers

    return max(chosen_layers(EditConfig(layers=arguments.layers), empty_model(source, arguments.trust_remote_code)))
