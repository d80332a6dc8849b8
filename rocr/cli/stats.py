"""`rocr stats`: collect key statistics of ordinary text, which serve many edits of one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.arguments import (
    chat_of,
    check_text,
    claim_output,
    collect,
    collect_options,
    last_layer_to_load,
    load,
    open_quantised,
    source_of,
)
from rocr.cli.console import Console
from rocr.cli.interruption import Interrupted, SaidElsewhere
from rocr.cli.parsing import Arguments, command, option
from rocr.cli.process_group import own_device, process_group
from rocr.cli.values import Number
from rocr.errors import RocrError

if TYPE_CHECKING:
    from rocr.statistics.distributed import Distributed


@command("stats")
@options.model
@options.out("File to write")
@options.layers
@option("--length", "Tokens of a sequence of --text.", type=Number(1, 2**20), default=512)
@option("--batch-tokens", "Tokens of a batch.", type=Number(1, 2**24), default=8192)
@options.partial_model
@options.text
@options.chat
def stats(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Collect key statistics from text.

    An interrupted run continues if it is started again with the same arguments. With torchrun, each process reads a
    share of the text, and process 0 writes the file and reports errors.
    """
    arguments.chat = chat_of(arguments)
    arguments.device = own_device(arguments.device)
    with process_group(arguments.device) as distributed:
        console.speak_as(distributed.rank)
        try:
            return _run(arguments, console, distributed)
        except RocrError as error:
            if distributed.rank and error.is_broadcast:
                raise SaidElsewhere(error.exit_code) from None
            raise


def _run(arguments: Arguments, console: Console, distributed: Distributed) -> dict[str, Any]:
    from rocr.config import EditConfig

    # Only text from files is read again from where a run stopped.
    checkpoint = Path(f"{arguments.out}.checkpoint") if arguments.text else None
    with distributed.collective():
        source = source_of(arguments)
        if distributed.rank == 0:
            claim_output(arguments, source.inputs)
        check_text(arguments)
        reading = collect_options(
            arguments, length=arguments.length, batch_tokens=arguments.batch_tokens, checkpoint=checkpoint
        )
        own = distributed.checkpoint(checkpoint)
    with distributed.collective(), console.stage("load"):
        config = EditConfig(layers=arguments.layers)
        loaded = load(arguments, source, last_layer_to_load(arguments, source, config))
        open_quantised(loaded, config)
    if own is not None and own.exists():
        console.warn(f"Continuing from {own}.")
    try:
        statistics = collect(arguments, loaded, arguments.layers, console, reading)
    except Interrupted:
        if own is not None and own.exists():
            console.warn(f"The same command continues from {own}.")
        raise
    with distributed.collective():
        if distributed.rank == 0:
            statistics.save(arguments.out, overwrite=arguments.overwrite)
    if own is not None:
        own.unlink(missing_ok=True)
    layers = ", ".join(map(str, statistics.layers))
    console.say(f"{arguments.out}: {statistics.tokens:,} tokens at layers {layers}.")
    return {
        "out": arguments.out,
        "tokens": statistics.tokens,
        "layers": list(statistics.layers),
        "text": statistics.text,
        "fingerprint": statistics.fingerprint.to_json(),
        "provenance": None if statistics.provenance is None else statistics.provenance.to_json(),
        "processes": distributed.size,
        "seconds": console.seconds,
    }
