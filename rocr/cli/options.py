"""Options that several commands share; `rocr.cli.arguments` has what they mean."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from rocr.cli.parsing import Decorator, argument, choice, flag, option, together
from rocr.cli.values import COUNT, FILE, GGUF_KINDS, SEED, SHARE, THREADS, TOKENS, PathType, layer_list, save_parts
from rocr.io.dtypes import SUPPORTED_DTYPES

PROBES = Path(__file__).parent.parent / "data" / "probes.jsonl"
LOADING, CHAT, TEXT = "Loading the model", "Chat template", "Statistics of ordinary text"
RUNNING = "Running"

running = together(
    option("--threads", "Compute with N threads of the CPU (default: torch's choice).", type=THREADS, group=RUNNING),
    flag("--quiet", "Show no progress.", short="-q", group=RUNNING),
    flag("--verbose", "Show warnings of libraries.", short="-v", group=RUNNING),
)

_device = option(
    "--device",
    'Such as "cuda:0", or "auto" to spread the layers (default: cpu).',
    metavar="DEVICE",
    group=LOADING,
)
_placing = together(
    option(
        "--dtype",
        "Load the weights in this dtype (default: as stored; float32 for .gguf). Output files keep their own dtype.",
        type=click.Choice(SUPPORTED_DTYPES),
        group=LOADING,
    ),
    _device,
)
_code = flag("--trust-remote-code", "Run code that comes with the model.", group=LOADING)
_download = flag("--download", "Allow network access, for a model on a hub.", group=LOADING)
loading = together(_placing, _code, running)
loading_or_download = together(_placing, _download, _code, running)
loading_as_stored = together(_device, _download, _code, running)

model = together(
    argument("model", "A Hugging Face folder, a .gguf file, or the id of a model on a hub.", type=FILE),
    loading_or_download,
)

partial_model = together(
    flag(
        "--partial",
        "Load only the embedding and the layers that are needed; nothing is asked then (default: if the model needs "
        "more than half of the free memory).",
        group=LOADING,
    ),
    flag("--whole", "Load the whole model.", group=LOADING),
)

_PARTS = (
    "Parts to write: model, gguf, lora, gguf-lora, edit, originals. gguf is a copy of a .gguf model, gguf-lora an "
    "adapter for llama.cpp; originals are the original bytes, for `rocr revert`"
)
_adapters = together(
    option("--lora-rank", "Truncate adapters to rank N, such as 16, the default limit of vLLM.", type=COUNT),
    option(
        "--gguf-type",
        "Type of the edited tensors in a .gguf output (default: their own if it is one of these, else f16).",
        type=choice(*GGUF_KINDS),
    ),
)

_save = partial(option, "--save", type=save_parts, metavar="PARTS")
save = together(_save(help=f"{_PARTS}.", default="model,edit"), _adapters)
save_again = together(_save(help=f"{_PARTS} (default: those of the folder EDITED; else model and edit)."), _adapters)

_STORED_AGAIN = (
    "How edited weights of a quantised model are written: plain, unquantised (default), or keep, in the same scheme"
)
quantised = option(
    "--quantised",
    f"{_STORED_AGAIN}; or adapter, to write an adapter (lora) and no model.",
    type=choice("plain", "keep", "adapter"),
)
stored_again = option("--quantised", f"{_STORED_AGAIN}.", type=choice("plain", "keep"))

layers = option("--layers", "Such as 4,5,6 or 4-6 (default: chosen from the depth).", type=layer_list, metavar="LIST")

seed = option("--seed", "Seed of all random choices.", type=SEED, default=0)

statistics = option("--statistics", "Statistics made by `rocr stats`.", type=FILE, group=TEXT)

plain_text = together(
    option(
        "--text",
        ".txt, .jsonl or .parquet files (default: text that the model, loaded whole, writes itself).",
        type=FILE,
        several=True,
        group=TEXT,
    ),
    option("--tokens", "Read at most N tokens of text.", type=TOKENS, group=TEXT),
)

text = together(plain_text, seed)

_chat = partial(option, group=CHAT)
chat = together(
    _chat("--system", "System message (default: the template's own, if any)."),
    _chat(
        "--template-variable",
        "Variable of the template, such as enable_thinking=false; a value that is not JSON is a string. May be "
        "repeated.",
        multiple=True,
        metavar="NAME=VALUE",
    ),
    _chat("--date", "Current date for the template (default: 2024-07-26).", metavar="YYYY-MM-DD"),
    flag("--no-chat", "Use no chat template; prompts are read as plain text.", group=CHAT),
)

probes = option(
    "--probes",
    "Questions: a .jsonl file, a folder of RWKU or ORT, hf:OWNER/NAME, or namesakes: 159 questions about people and "
    "things that share a word with a famous name.",
    type=FILE,
    default=str(PROBES),
    show_default="420 questions about 50 people and 20 things",
)

scoring = together(
    probes,
    option("--forms", "Forms of the questions, separated by commas.", default="qa,fb,mcp,subtoken", metavar="LIST"),
    option("--known", "Count only probes with a score of at least P before an edit.", type=SHARE, metavar="P"),
    option(
        "--neighbours",
        "Keep only the N subjects nearest to each target in the model: the hardest retain set.",
        type=COUNT,
    ),
)


def out(what: str, kind: PathType = FILE, required: bool = True) -> Decorator:
    """--out and --overwrite.

    Args:
        what: what is written, such as "Report to write, JSON".
        kind: FILE or DIR.
        required: whether the command cannot do without.
    """
    return together(
        option("--out", f"{what}; it must not exist.", type=kind, required=required),
        flag("--overwrite", "Replace the output if it exists."),
    )
