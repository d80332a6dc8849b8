"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.io.dtypes import SUPPORTED_DTYPES, torch_dtype
from rocr.io.json_values import parse_json
from rocr.io.locks import locked
from rocr.io.output import check_output
from rocr.statistics.corpus import check_texts

if TYPE_CHECKING:
    from rocr.config import ChatSettings
    from rocr.model.load import LoadedModel, ModelSource

SAVED = ("model", "lora", "edit", "originals")
MAX_LAYER = 9_999


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and how it is loaded."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file, or the id of a model on a hub"
    )
    parser.add_argument(
        "--dtype",
        choices=SUPPORTED_DTYPES,
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


def loads_partially(arguments: argparse.Namespace, source: ModelSource, last_layer: int = 0) -> bool:
    """Whether only the beginning of MODEL, up to a decoder layer, is loaded.

    Raises:
        InputError: that was asked for, but cannot be done.
    """
    if arguments.whole:
        return False
    from rocr.model.load_partial import can_load_partially, is_large

    if not arguments.partial and (arguments.dtype or arguments.device == "auto" or not is_large(source)):
        return False
    if arguments.dtype or arguments.device == "auto":
        raise InputError("--partial keeps the weights as they are stored: leave out --dtype, and --device auto.")
    possible = can_load_partially(source, last_layer)
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
    parser.add_argument("--tokens", type=TOKENS, metavar="N", help="read at most N tokens of text")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of all that is drawn at random (default: 0)")


def check_text(arguments: argparse.Namespace) -> None:
    """Hold the text of statistics to its rules before a model is loaded.

    Raises:
        InputError: a file cannot be read, or without files the model would have to write too much; or statistics are
            given, so that no text is read.
    """
    if getattr(arguments, "statistics", None) is not None:
        if arguments.text is not None or arguments.tokens is not None:
            raise InputError("--statistics takes the place of text: leave out --text and --tokens.")
    elif arguments.text is not None:
        check_texts(arguments.text)
    else:
        from rocr.statistics.collect import check_sampled

        check_sampled(arguments.tokens)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A type of argument: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{_short(text)} is not a whole number from {least:,} to {most:,}")
        return number

    return parse


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Add what chat templates are given."""
    group = parser.add_argument_group("chat template")
    group.add_argument("--system", metavar="TEXT", help="the system message (default: the template's own, if any)")
    group.add_argument(
        "--template-variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the template, such as enable_thinking=false: JSON, or else a text; may be repeated",
    )
    group.add_argument(
        "--date", metavar="YYYY-MM-DD", help="the day that the template is told it is (default: 2024-07-26)"
    )
    group.add_argument("--no-chat", action="store_true", help="use no chat template: messages are read as they are")


def chat_of(arguments: argparse.Namespace) -> ChatSettings:
    """What chat templates are given, as the arguments say.

    Raises:
        InputError: a variable is not NAME=VALUE or stands twice, or a value cannot be given to a template.
    """
    from rocr.config import ChatSettings

    variables: dict[str, Any] = {}
    for given in arguments.template_variable:
        name, sign, value = given.partition("=")
        if not sign or name in variables:
            flaw = "stands twice" if sign else "is not NAME=VALUE"
            raise InputError(f"--template-variable {given[:100]!r} {flaw}.")
        try:
            variables[name] = parse_json(value)
        except ValueError:
            variables[name] = value
    return ChatSettings(arguments.system, variables, arguments.date, not arguments.no_chat)


def share(text: str) -> float:
    """A type of argument: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a number from 0 to 1")
    return number


COUNT = whole_number(1, 1_000_000)
TOKENS = whole_number(1, 10**12)
SEED = whole_number(0, 2**63 - 1)


def layer_list(text: str) -> tuple[int, ...]:
    """Layers such as "4,5,6" or "4-6"."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{_short(text)} is not a list of layers such as 4,5,6 or 4-6")
        last = last or first
        if max(len(first), len(last)) > len(str(MAX_LAYER)) or int(first) > int(last):
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not a list of layers from 0 to {MAX_LAYER:,}, each range in ascending order"
            )
        layers += range(int(first), int(last) + 1)
        if len(set(layers)) < len(layers):
            raise argparse.ArgumentTypeError(f"{_short(text)} names a layer twice")
    return tuple(layers)


def _short(text: str) -> str:
    """What was given, as far as a message needs it."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def source_of(arguments: argparse.Namespace) -> ModelSource:
    """Where MODEL is; checked before anything is loaded."""
    from rocr.model.load import find_model

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

    from rocr.model.load import load_model

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    _check_device(arguments.device)
    if last_layer is not None:
        from rocr.model.load_partial import load_partial

        return load_partial(source, last_layer, arguments.device, arguments.trust_remote_code)
    dtype = torch_dtype(arguments.dtype) if arguments.dtype else None
    return load_model(source, dtype, arguments.device, arguments.trust_remote_code)


def _check_device(device: str | None) -> None:
    """Refuse a device that is not here, or holds no numbers, before weights are read."""
    if device in (None, "auto"):
        return
    import torch

    advice = 'Give one such as "cuda:0", or leave --device out.'
    with calling(f"The device {_short(device)}", advice):
        torch.empty(1, device=device)
    if torch.device(device).type == "meta":
        raise InputError(f"The device 'meta' holds no weights. {advice}")


def check_save(text: str) -> tuple[str, ...]:
    """What to write, such as "model,edit"."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [part for part in parts if part not in SAVED]
    if unknown or not parts:
        raise InputError(f"--save takes {', '.join(SAVED)}, not {', '.join(unknown) or 'nothing'}.")
    if "originals" in parts and "model" not in parts:
        raise InputError("--save originals keeps the first bytes of a model that is written: add model.")
    return parts
