"""The model card of an output folder (README.md), made from its report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rocr.edit.lora import GGUF_SUFFIX, loading_call
from rocr.export.copying import (
    CARD_FILE,
    EDIT_FILE,
    ORIGINALS_FOLDER,
    REPLACED_FILE,
    REPORT_FILE,
    SETTINGS_FILE,
    SUMS_FILE,
)
from rocr.io.visible import visible
from rocr.model.source import ADAPTER_GGUF, ModelSource

SHOWN_CONCEPTS = 20
MAX_CARD_BYTES = 2**20
_INHERITED = ("license", "license_name", "license_link")
UNDO_FILES = (("edit", EDIT_FILE), ("originals", f"{ORIGINALS_FOLDER}/"))
"""Parts of an output, and their files from which the edit can be reverted."""
LIBRARIES = (("model", "transformers"), ("gguf", "gguf"), ("lora", "peft"), ("gguf-lora", "gguf"))
"""Parts of an output, and the library that loads them, the first one first."""
ADAPTERS = (
    ("lora", "`lora/` is a PEFT adapter of the base model."),
    ("gguf-lora", f"`{ADAPTER_GGUF}` is an adapter of the base model for llama.cpp."),
)
"""Parts of an output that are adapters, and what the card says of them."""
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#$~])")

NOT_PROOF = """## What this is not

It is not proof of erasure. The figures above were measured once, on this model, with these settings. They do not show
that other questions, probes of hidden states, or further training cannot recover the concepts. The update has low rank
and changes a few layers only, and the base model still has the concepts."""


def write_card(report: Mapping[str, Any], source: ModelSource, parts: Sequence[str], folder: Path) -> None:
    """Write the card of an output; see `build_card`."""
    has_settings = (folder / SETTINGS_FILE).is_file()
    (folder / CARD_FILE).write_text(build_card(report, source, parts, has_settings), encoding="utf-8")


def build_card(report: Mapping[str, Any], source: ModelSource, parts: Sequence[str], has_settings: bool = False) -> str:
    """Return a model card: the metadata of the hub in YAML, and Markdown. It depends on the arguments only.

    Args:
        report: The report of the edit.
        source: The edited model. The metadata `base_model` is set if it is a hub id, or lies in the cache of the hub.
            The licence is that of the base model's own card, if it names one.
        parts: The parts of the output, of model, gguf, lora, gguf-lora, edit, originals.
        has_settings: Whether the output has the options of its run.
    """
    sections = [
        f"---\n{_metadata(source, parts).to_yaml()}\n---",
        f"# {_text(_title(source))}, edited by rocr" if _applied(report) else f"# {_text(_title(source))}",
        _done(report, source),
    ]
    if _applied(report):
        sections += [_concepts(report), _measured(report), _adapter(report, parts), _settings(report), NOT_PROOF]
        sections.append(_before_publishing(parts, has_settings, has_replaced="quantised" in report))
    else:
        sections.append(_versions(report))
    return "\n\n".join(section for section in sections if section) + "\n"


def _applied(report: Mapping[str, Any]) -> bool:
    """Return whether the model of a report has the edit applied."""
    return bool(report.get("applied", True))


def _metadata(source: ModelSource, parts: Sequence[str]) -> ModelCardData:
    base = source.name if source.folder is None else _hub_id(source.folder)
    return ModelCardData(
        base_model=base,
        library_name=next((name for part, name in LIBRARIES if part in parts), "peft"),
        pipeline_tag="text-generation",
        tags=["unlearning", "model-editing", "rocr"],
        **_licence(source),
    )


def _hub_id(folder: Path) -> str | None:
    """Return the id of a model in the hub's cache (models--owner--name/snapshots/commit), or None for other folders."""
    parts = folder.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/", 1)


def _licence(source: ModelSource) -> dict[str, str]:
    """Return the licence fields in the metadata of the base model's card."""
    if source.checkpoint_folder is None:
        return {}
    card = source.checkpoint_folder / CARD_FILE
    try:
        if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
            return {}
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML raises many types of errors for a file that is no card
        return {}
    found = {name: data.get(name) for name in _INHERITED}
    return {name: value for name, value in found.items() if isinstance(value, str) and len(value) <= 200}


def _title(source: ModelSource) -> str:
    """Return the hub id or the name of the base model."""
    hub_id = None if source.folder is None else _hub_id(source.folder)
    return hub_id or (Path(source.name).resolve().name if source.folder else source.name)


def _done(report: Mapping[str, Any], source: ModelSource) -> str:
    count = len(report["concepts"])
    concepts = f"{count} concept{'' if count == 1 else 's'}"
    layers = ", ".join(str(layer) for layer in report["config"]["layers"])
    if not _applied(report):
        return (
            f"An edit of {concepts} in the layers {layers} was reverted by rocr: every edited weight has the sha256 "
            "that was recorded before the edit."
        )
    done = (
        f"The MLP down-projections of the layers {layers} were changed in closed form, without training, so that the "
        f"model reads {concepts} as something else. The method is ROCR (Ye, Zhang and Wu, *LLM Unlearning Should Be "
        "Form-Independent*, [arXiv 2506.07795](https://arxiv.org/abs/2506.07795)). Every other weight is that of "
        "the base model."
    )
    mismatch = report.get("fingerprint_mismatch")
    if mismatch:
        done += f"\n\n{_text(mismatch)} The figures below were measured on the model that it was made for."
    return done


def _concepts(report: Mapping[str, Any]) -> str:
    concepts = report["concepts"]
    rows = [
        (_text(c["name"]), _text(c["redirect"]), _percent(c["closed"]), _percent(c["distance"]))
        for c in concepts[:SHOWN_CONCEPTS]
    ]
    table = _table(("concept", "read as", "residual closed", "distance left"), rows)
    more = len(concepts) - len(rows)
    return "## Concepts\n\n" + table + (f"\n\nand {more} more, in {REPORT_FILE}." if more else "")


def _measured(report: Mapping[str, Any]) -> str:
    rows = [
        (str(layer["layer"]), str(layer["keys"]), _percent(layer["relative_norm"]), _percent(_mean(layer["closed"])))
        for layer in report["layers"]
    ]
    lines = [
        "## Measured",
        _table(("layer", "keys", "update / weight", "residual closed, mean"), rows),
        "*Residual closed*: the share of the distance to the redirect that the update covers at the concepts' keys. "
        "*Distance left*: the distance of the state at the name from that at the redirect after the last edited layer, "
        "as a share of the distance before the edit.",
    ]
    if report["divergence"] is not None:
        lines.append(
            f"The edit changes the model's predictions on a passage of ordinary prose by {report['divergence']:.2e} "
            "nats per token (Kullback-Leibler divergence)."
        )
    if report.get("drift") is not None:
        lines.append(
            f"The edit moves the encoder's states on a passage of ordinary prose by {_percent(report['drift'])} of "
            "their length."
        )
    lines += [f"The edit exceeds a limit, which was forced: {_text(sentence)}" for sentence in report["limits_passed"]]
    return "\n\n".join(lines)


def _adapter(report: Mapping[str, Any], parts: Sequence[str]) -> str:
    rows = [
        (
            str(layer["layer"]),
            f"{layer['rank']} of {layer['full_rank']}",
            _percent(layer["relative_error"]),
            _percent(layer["key_error"]),
        )
        for layer in report.get("lora", ())
    ]
    if not rows:
        return ""
    kinds = [sentence for part, sentence in ADAPTERS if part in parts]
    name = str(report["fingerprint"]["name"])
    if "lora" in parts and name.endswith(GGUF_SUFFIX):
        call = visible(loading_call(name, "lora")).replace("`", "'")
        kinds.append(f"The base model is a GGUF file, whose name peft needs: `{call}`.")
    table = _table(("layer", "rank", "error of the update", "error at the keys"), rows)
    return "\n\n".join(["## Adapter", " ".join(kinds), table])


def _settings(report: Mapping[str, Any]) -> str:
    config = {name: value for name, value in report["config"].items() if name not in ("layers", "templates", "chat")}
    settings = ", ".join(f"{name} {value}" for name, value in config.items())
    text = report["statistics"]
    lines = [
        "## Settings",
        f"{_text(settings)}; {len(report['config']['templates'])} context templates.",
        f"Ordinary text that is protected: {text.get('tokens', 0):,} tokens ({_text(str(text.get('text', 'unknown')))}"
        ").",
        _versions(report),
        f"{REPORT_FILE} holds all figures and the templates, and {SUMS_FILE} the sha256 of the written files.",
    ]
    return "\n\n".join(lines)


def _versions(report: Mapping[str, Any]) -> str:
    return "Made with " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."


def _before_publishing(parts: Sequence[str], has_settings: bool, has_replaced: bool) -> str:
    naming = ["This card", REPORT_FILE, *([SETTINGS_FILE] * has_settings), *([EDIT_FILE] * ("edit" in parts))]
    reverting = [f"`{name}`" for part, name in UNDO_FILES if part in parts]
    if has_replaced and "edit" in parts:
        reverting.append(f"`{REPLACED_FILE}`")
    lines = [
        "## Before publishing",
        f"{_listed(naming)} name the concepts{' or the file with their list' if has_settings else ''}. Do not publish "
        "them if the list itself is private.",
    ]
    if reverting:
        lines.append(f"Do not publish {_listed(reverting)} if others must not revert the edit with `rocr revert`.")
    return "\n\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    """Return names as a list for a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _text(text: str) -> str:
    """Return a text as one line without markup for Markdown and HTML and without control characters."""
    return _MARKUP.sub(r"\\\1", visible(" ".join(text.split()))).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
