"""What the shared options mean: the model, text, chat settings and the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.console import Console
from rocr.cli.library_warnings import library_messages
from rocr.cli.parsing import Arguments
from rocr.cli.values import short
from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.io.json_values import parse_json
from rocr.io.locks import locked
from rocr.io.output import check_output
from rocr.statistics.corpus import check_texts, read_texts, text_digest

if TYPE_CHECKING:
    from torch import nn

    from rocr.chat_settings import ChatSettings
    from rocr.config import EditConfig
    from rocr.edit.edit import Edit
    from rocr.model.load import LoadedModel, ModelSource
    from rocr.statistics.collect import CollectOptions
    from rocr.statistics.statistics import Statistics


def loads_partially(arguments: Arguments, source: ModelSource, last_layer: int = 0) -> bool:
    """Whether to load only the first layers of the model, up to and including `last_layer`.

    Raises:
        InputError: --partial is given, and the model or the other arguments do not allow it.
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
            f"{source.name} cannot be loaded in part: that needs a folder of safetensors files from whose tensors rocr "
            "can make each parameter of the first layers, and a quantisation that it knows."
        )
    return possible


def last_layer_to_load(
    arguments: Arguments, source: ModelSource, config: EditConfig, statistics: Statistics | None = None
) -> int | None:
    """Index of the last layer to load; None: the whole model.

    Raises:
        InputError: as for `loads_partially`; or neither text nor statistics are given, and a model that is loaded in
            part cannot write text.
    """
    if not loads_partially(arguments, source):
        return None
    if statistics is None and not arguments.text:
        given = "--text or --statistics" if hasattr(arguments, "statistics") else "--text"
        raise InputError(
            "Only the first layers of the model are loaded, so it cannot write ordinary text itself: give "
            f"{given}, or --whole to load the whole model."
        )
    from rocr.model.architecture import find_architecture
    from rocr.model.layers import chosen_layers
    from rocr.model.load_partial import empty_model

    layers = chosen_layers(config, find_architecture(empty_model(source, arguments.trust_remote_code)))
    last = max(layers) if statistics is None else max(*layers, statistics.fingerprint.layer)
    return last if loads_partially(arguments, source, last) else None


def check_text(arguments: Arguments) -> None:
    """Check the text for statistics before a model is loaded.

    Raises:
        InputError: a file cannot be read; more tokens are asked for than the model can write itself; or both
            --statistics and text are given.
    """
    if getattr(arguments, "statistics", None) is not None:
        if arguments.text or arguments.tokens is not None:
            raise InputError("--statistics takes the place of text: leave out --text and --tokens.")
    elif arguments.text:
        check_texts(arguments.text)
    else:
        from rocr.statistics.collect import check_sampled

        check_sampled(arguments.tokens)


def collect_options(arguments: Arguments, **more: Any) -> CollectOptions:
    """How --text is read for statistics.

    Args:
        arguments: of the command.
        more: further fields of the options.
    """
    from rocr.statistics.collect import CollectOptions

    return CollectOptions(
        tokens=arguments.tokens,
        seed=arguments.seed,
        text_sha256=text_digest(arguments.text) if arguments.text else None,
        text_bytes=sum(Path(text).stat().st_size for text in arguments.text) or None,
        chat=arguments.chat,
        **more,
    )


def collect(
    arguments: Arguments,
    loaded: LoadedModel,
    layers: Sequence[int] | None,
    console: Console,
    options: CollectOptions | None = None,
) -> Statistics:
    """Collect statistics from --text, or from text that the model writes itself."""
    from rocr.statistics.collect import collect_statistics

    texts = read_texts(arguments.text) if arguments.text else None
    options = options or collect_options(arguments)
    with console.stage("statistics") as progress:
        return collect_statistics(loaded.model, loaded.tokenizer, texts, layers, options, progress)


def chat_of(arguments: Arguments) -> ChatSettings:
    """The settings of chat templates.

    Raises:
        InputError: a variable is not NAME=VALUE or is repeated, or a value is not allowed in a template.
    """
    from rocr.chat_settings import ChatSettings

    variables: dict[str, Any] = {}
    for given in arguments.template_variable:
        name, sign, value = given.partition("=")
        if not sign or name in variables:
            flaw = "is given twice" if sign else "is not NAME=VALUE"
            raise InputError(f"--template-variable {given[:100]!r} {flaw}.")
        try:
            variables[name] = parse_json(value)
        except ValueError:
            variables[name] = value
    return ChatSettings(arguments.system, variables, arguments.date, not arguments.no_chat)


def source_of(arguments: Arguments) -> ModelSource:
    """Locate and check the model; nothing is loaded."""
    if getattr(arguments, "whole", False) and arguments.partial:
        raise InputError("--partial and --whole exclude each other: leave out one of them.")
    start_running(arguments)
    from rocr.model.load import find_model

    return find_model(arguments.model, download=arguments.download)


def start_running(arguments: Arguments) -> None:
    """Let --threads and --verbose have effect until the command ends."""
    if arguments.threads is not None:
        arguments.context.with_resource(_threads(arguments.threads))
    arguments.context.with_resource(library_messages(arguments.verbose))


def check_quantised(arguments: Arguments, source: ModelSource) -> None:
    """Check --quantised against the model, and replace the model among the parts to save by an adapter if it says so.

    Raises:
        InputError: --quantised is given and the model is not quantised, or its scheme is not known.
    """
    if arguments.quantised is None:
        return
    from rocr.model.quantised.checkpoint import find_quantisation
    from rocr.model.stored_weights import find_weights

    files = find_weights(source)
    if files is None or find_quantisation(files.folder) is None:
        raise InputError(
            f"--quantised is for models in safetensors files with a quantization_config that rocr knows; {source.name} "
            "is none. Leave it out; a .gguf file has --save gguf, --gguf-type and --save gguf-lora instead."
        )
    if arguments.quantised == "adapter":
        kept = [part for part in arguments.save if part not in ("model", "lora", "originals")]
        arguments.save = ("lora", *kept)


def edit_and_source(arguments: Arguments, place: str | Path) -> tuple[Edit, ModelSource]:
    """Read an edit file and locate its model, after a check that the output can be written."""
    source = source_of(arguments)
    if not Path(place).is_file():
        raise InputError(f"There is no edit file at {place}.")
    claim_output(arguments, (*source.inputs, place))

    from rocr.edit.edit import Edit
    from rocr.export.copying import check_carried

    check_carried(source)
    return Edit.load(place), source


def claim_output(arguments: Arguments, inputs: Iterable[str | Path]) -> None:
    """Check that --out can be written without harm to the inputs, and lock it until the command ends."""
    check_output(arguments.out, inputs=(*inputs, *files_read(arguments)), overwrite=arguments.overwrite)
    arguments.context.with_resource(locked(arguments.out))


def files_read(arguments: Arguments) -> list[str]:
    """Every file that the arguments name as an input, besides the model."""
    names = ("text", "concepts", "statistics", "edit", "probes", "utility")
    given = [getattr(arguments, name, None) or [] for name in names]
    return [path for paths in given for path in ([paths] if isinstance(paths, str) else paths)]


def load(
    arguments: Arguments, source: ModelSource, last_layer: int | None = None, empty: nn.Module | None = None
) -> LoadedModel:
    """Load the model with the dtype and device of the arguments.

    Args:
        arguments: of the command.
        source: where the model is.
        last_layer: load only the embedding and the layers up to this one; None: the whole model.
        empty: the model without its weights, from `partial_model`, if it was built already.
    """
    from rocr.io.dtypes import torch_dtype
    from rocr.model.load import load_model

    _check_device(arguments.device)
    if last_layer is not None:
        from rocr.model.load_partial import load_partial

        return load_partial(source, last_layer, arguments.device, arguments.trust_remote_code, empty=empty)
    dtype = torch_dtype(arguments.dtype) if arguments.dtype else None
    return load_model(source, dtype, arguments.device, arguments.trust_remote_code)


def load_language_model(arguments: Arguments, source: ModelSource) -> LoadedModel:
    """Load a model that is asked questions.

    Raises:
        InputError: the model is a text encoder or an encoder-decoder.
    """
    from rocr.model.causality import check_writes_text

    loaded = load(arguments, source)
    check_writes_text(loaded.model, f"rocr {arguments.context.info_name}")
    return loaded


def open_quantised(loaded: LoadedModel, config: EditConfig, last_layer: int = 0) -> None:
    """Make the down-projections of a quantised model dense, up to the last edited layer and to `last_layer`."""
    from rocr.model.layers import wanted_layers
    from rocr.model.quantised.opening import open_down_projections

    open_down_projections(loaded, max(*wanted_layers(config, loaded.architecture), last_layer))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """A context in which torch computes with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_device(device: str | None) -> None:
    """Refuse a device that does not exist or cannot hold weights, before the weights are read."""
    if device in (None, "auto"):
        return
    import torch

    advice = 'Give one such as "cuda:0", or leave --device out.'
    with calling(f"The device {short(device)}", advice):
        torch.empty(1, device=device)
    if torch.device(device).type == "meta":
        raise InputError(f"The device 'meta' holds no weights. {advice}")
