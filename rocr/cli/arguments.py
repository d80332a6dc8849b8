"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rocr.boundary import calling
from rocr.cli.parsing import PATH, Arguments, Decorator, argument, option, together
from rocr.cli.values import COUNT, SEED, SHARE, TOKENS, layer_list, short
from rocr.errors import InputError
from rocr.json_values import parse_json
from rocr.locks import locked
from rocr.output import check_output
from rocr.texts import check_texts

if TYPE_CHECKING:
    from rocr.chat import ChatSettings
    from rocr.edit import Edit
    from rocr.models import LoadedModel, ModelSource

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_PROBES = Path(__file__).parent.parent / "data" / "probes.jsonl"
LOADING, CHAT, TEXT = "Loading the model", "Chat template", "Statistics of ordinary text"

model_arguments = together(
    argument("model", type=PATH, help="A Hugging Face folder, a .gguf file, or the id of a model on a hub."),
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        group=LOADING,
        help="Load the weights in this dtype (default: as stored; float32 for .gguf). Output files keep the dtype "
        "that they have.",
    ),
    option(
        "--device",
        metavar="DEVICE",
        group=LOADING,
        help='Such as "cuda:0", or "auto" to spread the layers (default: cpu).',
    ),
    option("--download", is_flag=True, group=LOADING, help="Allow network access, for a model on a hub."),
    option("--trust-remote-code", is_flag=True, group=LOADING, help="Run code that comes with the model."),
)

partial_options = together(
    option(
        "--partial",
        is_flag=True,
        group=LOADING,
        help="Load only the embedding and the layers that are needed; no questions can be asked then (default: if the "
        "model needs more than half of the free memory).",
    ),
    option("--whole", is_flag=True, group=LOADING, help="Load the whole model."),
)

layers_option = option(
    "--layers", type=layer_list, metavar="LIST", help="Such as 4,5,6 or 4-6 (default: chosen from the depth)."
)

text_options = together(
    option(
        "--text",
        type=PATH,
        several=True,
        metavar="FILE",
        group=TEXT,
        help=".txt, .jsonl or .parquet files (default: text that the model writes itself).",
    ),
    option("--tokens", type=TOKENS, metavar="N", group=TEXT, help="Read at most N tokens of text."),
    option("--seed", type=SEED, default=0, metavar="N", help="Seed of all random choices (default: 0)."),
)

chat_options = together(
    option("--system", metavar="TEXT", group=CHAT, help="System message (default: the template's own, if any)."),
    option(
        "--template-variable",
        multiple=True,
        metavar="NAME=VALUE",
        group=CHAT,
        help="Variable of the template, such as enable_thinking=false; a value that is not JSON is a string. "
        "May be repeated.",
    ),
    option("--date", metavar="YYYY-MM-DD", group=CHAT, help="Current date for the template (default: 2024-07-26)."),
    option("--no-chat", is_flag=True, group=CHAT, help="Use no chat template; prompts are read as plain text."),
)

probes_option = option(
    "--probes",
    type=PATH,
    default=str(DEFAULT_PROBES),
    metavar="FILE",
    help="Questions: a .jsonl file, a folder of RWKU or ORT, or hf:OWNER/NAME (default: 300 questions about 50 people, "
    "which come with rocr).",
)

scoring_options = together(
    probes_option,
    option(
        "--forms",
        default="qa,fb,mcp,subtoken",
        metavar="LIST",
        help="Forms of the questions, separated by commas (default: qa,fb,mcp,subtoken).",
    ),
    option(
        "--known", type=SHARE, metavar="P", help="Count only probes that the model scores at least P on, from 0 to 1."
    ),
    option(
        "--neighbours",
        type=COUNT,
        metavar="N",
        help="Keep only the N subjects nearest to each target in the model: the hardest retain set.",
    ),
)


def out_options(what: str, metavar: str = "FILE", required: bool = True) -> Decorator:
    """--out and --overwrite.

    Args:
        what: what is written, such as "Report to write, JSON".
        metavar: FILE or DIR.
        required: whether the command cannot do without.
    """
    return together(
        option("--out", type=PATH, required=required, metavar=metavar, help=f"{what}; it must not exist."),
        option("--overwrite", is_flag=True, help="Replace the output if it exists."),
    )


def loads_partially(arguments: Arguments, source: ModelSource, last_layer: int = 0) -> bool:
    """Whether to load only the beginning of the model, up to and including `last_layer`.

    Raises:
        InputError: --partial is given, and the model or the other arguments do not allow it.
    """
    if arguments.whole and arguments.partial:
        raise InputError("--partial and --whole exclude each other: leave out one of them.")
    if arguments.whole:
        return False
    from rocr.partial import can_load_partially, is_large

    if not arguments.partial and (arguments.dtype or arguments.device == "auto" or not is_large(source)):
        return False
    if arguments.dtype or arguments.device == "auto":
        raise InputError("--partial keeps the weights as they are stored: leave out --dtype, and --device auto.")
    possible = can_load_partially(source, last_layer)
    if arguments.partial and not possible:
        raise InputError(
            f"{source.name} cannot be loaded in part: that needs a folder of safetensors files whose tensors have the "
            "names of the model's own parameters."
        )
    return possible


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
        from rocr.collect import check_sampled

        check_sampled(arguments.tokens)


def chat_of(arguments: Arguments) -> ChatSettings:
    """The settings of chat templates.

    Raises:
        InputError: a variable is not NAME=VALUE or is repeated, or a value is not allowed in a template.
    """
    from rocr.chat import ChatSettings

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
    from rocr.models import find_model

    return find_model(arguments.model, download=arguments.download)


def edit_and_source(arguments: Arguments, place: str | Path) -> tuple[Edit, ModelSource]:
    """Read an edit file and locate its model, after a check that the output can be written."""
    source = source_of(arguments)
    if not Path(place).is_file():
        raise InputError(f"There is no edit file at {place}.")
    claim_output(arguments, (*source.inputs, place))

    from rocr.copying import check_carried
    from rocr.edit import Edit

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


def load(arguments: Arguments, source: ModelSource, last_layer: int | None = None) -> LoadedModel:
    """Load the model with the dtype and device of the arguments.

    Args:
        arguments: of the command.
        source: where the model is.
        last_layer: load only the embedding and the layers up to this one; None: the whole model.
    """
    import transformers

    from rocr.models import DTYPES as TORCH_DTYPES
    from rocr.models import load_model

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    _check_device(arguments.device)
    if last_layer is not None:
        from rocr.partial import load_partial

        return load_partial(source, last_layer, arguments.device, arguments.trust_remote_code)
    dtype = TORCH_DTYPES[arguments.dtype] if arguments.dtype else None
    return load_model(source, dtype, arguments.device, arguments.trust_remote_code)


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
