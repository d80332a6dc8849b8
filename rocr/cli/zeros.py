"""Whether an edit keeps the zeros of a sparse model, settled before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments
from rocr.errors import InputError

if TYPE_CHECKING:
    from rocr.config import EditConfig
    from rocr.edit.edit import Edit
    from rocr.model.block import Block
    from rocr.model.load import LoadedModel

ADAPTERS = ("lora", "gguf-lora")


def with_zeros(config: EditConfig, loaded: LoadedModel, arguments: Arguments, console: Console) -> EditConfig:
    """The settings, with the zeros of quantised weights left alone, which are values of the quantisation as others.

    Raises:
        InputError: --keep-zeros is given for a quantised model, or an adapter is to be written of an edit that keeps
            zeros.
    """
    from rocr.edit.support import SPARSE, share_of_zeros
    from rocr.model.blocks import layer_blocks

    if config.keep_zeros is False:
        return config
    layers = [layer_blocks(loaded.architecture, layer) for layer in config.layer_numbers]
    largest = max(share_of_zeros(layer, range(len(layer.blocks))) for layer in layers)
    if largest <= (0.0 if config.keep_zeros else SPARSE):
        return config
    if _are_quantised(loaded, [block for layer in layers for block in layer.blocks]):
        if config.keep_zeros:
            raise InputError(
                "--keep-zeros is for weights that were pruned, but those of this model are quantised: a zero is a "
                "value of the quantisation there. Leave it out."
            )
        console.warn(
            f"{largest:.0%} of the quantised weights are zeros, as values of the quantisation: they are not kept."
        )
        return dataclasses.replace(config, keep_zeros=False)
    _check_parts(arguments.save, f"{largest:.0%} of the weights are zeros, which the edit keeps")
    return config


def check_kept(edit: Edit, parts: Sequence[str]) -> None:
    """Raise InputError if an adapter is to be written of an edit that keeps zeros."""
    if any(update.factors.support is not None for update in edit.updates):
        _check_parts(parts, "The edit keeps the zeros of a sparse model")


def _check_parts(parts: Sequence[str], reason: str) -> None:
    adapters = [part for part in ADAPTERS if part in parts]
    if adapters:
        raise InputError(
            f"{reason}, but an adapter adds a product of low rank, which would fill them: leave {adapters[0]} out of "
            "--save, or give --fill-zeros when the edit is made."
        )


def _are_quantised(loaded: LoadedModel, blocks: Sequence[Block]) -> bool:
    from rocr.export.gguf import edited_kinds
    from rocr.model.gguf_layout import PLAIN_KINDS
    from rocr.model.quantised.checkpoint import find_quantisation
    from rocr.model.stored_weights import find_weights

    if loaded.source.gguf is not None:
        return not edited_kinds(loaded.source, blocks, loaded.architecture.depth) <= set(PLAIN_KINDS)
    files = find_weights(loaded.source)
    return files is not None and find_quantisation(files.folder) is not None
