"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rocr.errors import InputError
from rocr.locks import locked
from rocr.output import check_output

if TYPE_CHECKING:
    from rocr.models import LoadedModel, ModelSource

DTYPES = ("float32", "bfloat16", "float16")
SAVED = ("model", "lora", "edit", "originals")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and how it is loaded."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file, or the id of a model on a hub"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="load the weights as this (default: as stored; float32 for .gguf); output files keep their own dtype",
    )
    parser.add_argument("--device", help='such as "cuda:0", or "auto" to spread the layers (default: cpu)')
    parser.add_argument("--download", action="store_true", help="allow the network, for a model on a hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_partial(parser: argparse.ArgumentParser) -> None:
    """Add how much of the model is loaded."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--partial",
        action="store_true",
        help="load the embedding and the layers that are needed only (default: where the model takes more than half "
        "of the free memory); nothing can be asked then",
    )
    group.add_argument("--whole", action="store_true", help="load the whole model")


def loads_partially(arguments: argparse.Namespace, source: ModelSource) -> bool:
    """Whether only the beginning of MODEL is loaded.

    Raises:
        InputError: that was asked for, but cannot be done.
    """
    if arguments.whole:
        return False
    from rocr.partial import can_load_partially, is_large

    if not arguments.partial and (arguments.dtype or arguments.device == "auto" or not is_large(source)):
        return False
    if arguments.dtype or arguments.device == "auto":
        raise InputError("--partial keeps the weights as they are stored: leave out --dtype, and --device auto.")
    possible = can_load_partially(source)
    if arguments.partial and not possible:
        raise InputError(
            f"{source.name} cannot be loaded in part: that needs a folder of safetensors files whose tensors bear the "
            "names of the model's own."
        )
    return possible


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add the text of statistics and how much of it is read."""
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help=".txt, .jsonl or .parquet; without: text by the model itself"
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="read at most N tokens of text")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (default: 0)")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def layer_list(text: str) -> tuple[int, ...]:
    """Layers such as "4,5,6" or "4-6"."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 4,5,6 or 4-6")
        layers += range(int(first), int(last or first) + 1)
    if not layers:
        raise argparse.ArgumentTypeError(f"{text!r} names no layer")
    return tuple(layers)


def source_of(arguments: argparse.Namespace) -> ModelSource:
    """Where MODEL is; checked before anything is loaded."""
    from rocr.models import find_model

    return find_model(arguments.model, download=arguments.download)


def claim_output(arguments: argparse.Namespace, inputs: Iterable[str | Path]) -> None:
    """Make sure that --out can be written without harm to what is read, and that no other run writes it meanwhile."""
    check_output(arguments.out, inputs=(*inputs, *files_read(arguments)), overwrite=arguments.overwrite)
    arguments.until_the_end.enter_context(locked(arguments.out))


def files_read(arguments: argparse.Namespace) -> list[str]:
    """Every file that the arguments name to be read, besides the model."""
    names = ("text", "concepts", "statistics", "edit", "probes", "utility")
    given = [getattr(arguments, name, None) or [] for name in names]
    return [path for paths in given for path in ([paths] if isinstance(paths, str) else paths)]


def load(arguments: argparse.Namespace, source: ModelSource, last_layer: int | None = None) -> LoadedModel:
    """Load MODEL as the arguments say; where a last layer is given, only what comes up to it."""
    import transformers

    from rocr.models import DTYPES as TORCH_DTYPES
    from rocr.models import load_model

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if last_layer is not None:
        from rocr.partial import load_partial

        return load_partial(source, last_layer, arguments.device, arguments.trust_remote_code)
    dtype = TORCH_DTYPES[arguments.dtype] if arguments.dtype else None
    return load_model(source, dtype, arguments.device, arguments.trust_remote_code)


def check_save(text: str) -> tuple[str, ...]:
    """What to write, such as "model,edit"."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [part for part in parts if part not in SAVED]
    if unknown or not parts:
        raise InputError(f"--save takes {', '.join(SAVED)}, not {', '.join(unknown) or 'nothing'}.")
    if "originals" in parts and "model" not in parts:
        raise InputError("--save originals keeps the first bytes of a model that is written: add model.")
    return parts
