"""The model card of an output folder (README.md), made from its report: what was done, measured, and not proven."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rocr.io.visible import visible
from rocr.model.load import ModelSource

CARD_FILE = "README.md"
SHOWN_CONCEPTS = 20
MAX_CARD_BYTES = 2**20
_INHERITED = ("license", "license_name", "license_link")
UNDOING = (("edit", "edit.safetensors"), ("originals", "originals/"))
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#$~])")

NOT_PROOF = """## What this is not

It is not proof of erasure. The figures above were measured once, on this model, with these settings; they do not show
that nothing of the concepts can be drawn out by other questions, by probing hidden states, or by further training.
The update is of low rank and in a few layers only, and whoever has the base model has what was there before."""


def write_card(report: Mapping[str, Any], source: ModelSource, parts: Sequence[str], folder: Path) -> None:
    """Write the card of an output; see `build_card`."""
    (folder / CARD_FILE).write_text(build_card(report, source, parts), encoding="utf-8")


def build_card(report: Mapping[str, Any], source: ModelSource, parts: Sequence[str]) -> str:
    """The card of a model, in Markdown with the hub's metadata before it; the same report gives the same bytes.

    Args:
        report: of the edit.
        source: the model that was edited. Only a hub id becomes `base_model`: a folder's name is none. The licence
            is that of the base model's own card, where it names one.
        parts: what the folder holds: of model, lora, edit, originals.
    """
    sections = [
        f"---\n{_metadata(source, parts).to_yaml()}\n---",
        f"# {_text(_title(source))}, edited by rocr" if _applied(report) else f"# {_text(_title(source))}",
        _done(report, source),
    ]
    if _applied(report):
        sections += [_concepts(report), _measured(report), _adapter(report), _settings(report), NOT_PROOF]
        sections.append(_before_publishing(parts))
    else:
        sections.append(_versions(report))
    return "\n\n".join(section for section in sections if section) + "\n"


def _applied(report: Mapping[str, Any]) -> bool:
    return bool(report.get("applied", True))


def _metadata(source: ModelSource, parts: Sequence[str]) -> ModelCardData:
    base = source.name if source.folder is None else _hub_id(source.folder)
    return ModelCardData(
        base_model=base,
        library_name="transformers" if "model" in parts else "peft",
        pipeline_tag="text-generation",
        tags=["unlearning", "model-editing", "rocr"],
        **_licence(source),
    )


def _hub_id(folder: Path) -> str | None:
    """The id of a model that lies in the hub's cache (models--owner--name/snapshots/commit); None elsewhere."""
    parts = folder.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/", 1)


def _licence(source: ModelSource) -> dict[str, str]:
    """What the base model's card says of its licence."""
    if source.checkpoint_folder is None:
        return {}
    card = source.checkpoint_folder / CARD_FILE
    try:
        if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
            return {}
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card of others that is no card: YAML raises whatever it likes
        return {}
    found = {name: data.get(name) for name in _INHERITED}
    return {name: value for name, value in found.items() if isinstance(value, str) and len(value) <= 200}


def _title(source: ModelSource) -> str:
    hub_id = None if source.folder is None else _hub_id(source.folder)
    return hub_id or (Path(source.name).resolve().name if source.folder else source.name)


def _done(report: Mapping[str, Any], source: ModelSource) -> str:
    count = len(report["concepts"])
    concepts = f"{count} concept{'' if count == 1 else 's'}"
    layers = ", ".join(str(layer) for layer in report["config"]["layers"])
    if not _applied(report):
        return (
            f"An edit of {concepts} in the layers {layers} was taken off again by rocr: every edited weight has the "
            "sha256 that was recorded before the edit."
        )
    done = (
        f"The MLP down-projections of the layers {layers} were changed in closed form, without training, so that the "
        f"model reads something else in place of {concepts}: ROCR (Ye, Zhang and Wu, *LLM Unlearning Should Be "
        "Form-Independent*, [arXiv 2506.07795](https://arxiv.org/abs/2506.07795)). Every other weight is that of "
        "the base model."
    )
    mismatch = report.get("fingerprint_mismatch")
    if mismatch:
        done += f"\n\n{_text(mismatch)} The figures below are those of the model that it was made for."
    return done


def _concepts(report: Mapping[str, Any]) -> str:
    concepts = report["concepts"]
    rows = [
        (_text(c["name"]), _text(c["redirect"]), _percent(c["closed"]), _percent(c["distance"]))
        for c in concepts[:SHOWN_CONCEPTS]
    ]
    table = _table(("concept", "read as", "residual closed", "distance left"), rows)
    more = len(concepts) - len(rows)
    return "## Concepts\n\n" + table + (f"\n\nand {more} more, in report.json." if more else "")


def _measured(report: Mapping[str, Any]) -> str:
    rows = [
        (str(layer["layer"]), str(layer["keys"]), _percent(layer["relative_norm"]), _percent(_mean(layer["closed"])))
        for layer in report["layers"]
    ]
    lines = [
        "## Measured",
        _table(("layer", "keys", "update / weight", "residual closed, mean"), rows),
        "*Residual closed*: share of the way to the redirect that the update covers at the concepts' own keys. "
        "*Distance left*: how far the state at the name still is from that of the redirect after the last edited "
        "layer, as a share of before.",
    ]
    if report["divergence"] is not None:
        lines.append(
            f"On a passage of ordinary prose the model's predictions moved by {report['divergence']:.2e} nats a token "
            "(Kullback-Leibler divergence)."
        )
    lines += [f"A limit was passed and forced: {_text(sentence)}" for sentence in report["limits_passed"]]
    return "\n\n".join(lines)


def _adapter(report: Mapping[str, Any]) -> str:
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
    return "## Adapter\n\n`lora/` is a PEFT adapter of the base model.\n\n" + _table(
        ("layer", "rank", "left out of the update", "left out at the keys"), rows
    )


def _settings(report: Mapping[str, Any]) -> str:
    config = {name: value for name, value in report["config"].items() if name not in ("layers", "templates", "chat")}
    settings = ", ".join(f"{name} {value}" for name, value in config.items())
    text = report["statistics"]
    lines = [
        "## Settings",
        f"{_text(settings)}; {len(report['config']['templates'])} context templates.",
        f"Ordinary text that was protected: {text.get('tokens', 0):,} tokens ({_text(str(text.get('text', 'unknown')))}"
        ").",
        _versions(report),
        "report.json holds all figures, the templates, and the sha256 of every file that was written.",
    ]
    return "\n\n".join(lines)


def _versions(report: Mapping[str, Any]) -> str:
    return "Made with " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."


def _before_publishing(parts: Sequence[str]) -> str:
    naming = ["this card", "report.json"] + (["edit.safetensors"] if "edit" in parts else [])
    undoing = [f"`{name}`" for part, name in UNDOING if part in parts]
    lines = [
        "## Before publishing",
        f"The concepts are named in {_listed(naming)}: leave them out where the list itself is private.",
    ]
    if undoing:
        lines.append(f"To be left out where the edit must not be undone (`rocr revert`): {_listed(undoing)}.")
    return "\n\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _text(text: str) -> str:
    """A text of others as one line that Markdown, HTML and a terminal show as it is."""
    return _MARKUP.sub(r"\\\1", visible(" ".join(text.split()))).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
