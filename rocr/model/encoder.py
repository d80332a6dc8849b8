"""The encoder of an encoder-decoder, alone or with its decoder."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.wrappers import own_modules, unwrapped


def is_encoder_decoder(base: nn.Module) -> bool:
    """Return whether a model of transformers has an encoder that reads a text, and a decoder that writes another.

    An encoder alone, such as T5EncoderModel, may have the configuration of both.
    """
    return getattr(getattr(base, "config", None), "is_encoder_decoder", False) is True and has_decoder(base)


def encoder_config(base: nn.Module) -> Any:
    """Return the configuration of the encoder of an encoder-decoder, also if the encoder is alone; None for others.

    Raises:
        InputError: As `text_encoder`.
    """
    config = getattr(base, "config", None)
    if is_encoder_decoder(base):
        return getattr(text_encoder(base), "config", config)
    return None if has_decoder(base) else getattr(config, "encoder", None)


def text_encoder(base: nn.Module) -> nn.Module:
    """Return the encoder of an encoder-decoder.

    Raises:
        InputError: The encoder does not read text, or is not found.
    """
    name = type(base).__name__
    wanted = getattr(base, "main_input_name", "input_ids")
    if wanted != "input_ids":
        raise InputError(
            f"{name} is an encoder-decoder whose encoder reads {wanted}, not text (input_ids), so no concept has keys "
            "there. rocr edits encoders that read text."
        )
    with calling(f"{name}.get_encoder"):
        encoder: Any = base.get_encoder()  # type: ignore[operator]
    if not isinstance(encoder, nn.Module) or encoder is base:
        raise InputError(f"{name} is an encoder-decoder, but get_encoder does not return its encoder.")
    return encoder


def encoder_layers(base: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the layers of an encoder-decoder's encoder.

    They are the outermost list of modules inside the encoder that contain a matrix.

    Raises:
        InputError: There is no such list or more than one, or `text_encoder` raises.
    """
    inside = {id(module) for module in unwrapped(text_encoder(base)).modules()}
    found: dict[str, nn.ModuleList] = {}
    for name, module, _ in own_modules(base):
        is_nested = any(name.startswith(f"{outer}.") for outer in found)
        if (
            id(module) in inside
            and isinstance(module, nn.ModuleList)
            and not is_nested
            and any(map(_has_matrix, module))
        ):
            found[name] = module
    if len(found) > 1:  # beside a vision tower, as in T5Gemma 2
        inside_text = [name for name, module, _ in own_modules(base) if module is base.get_input_embeddings()]  # type: ignore[operator]
        around = inside_text[0].rpartition(".")[0] if inside_text else ""
        found = {name: layers for name, layers in found.items() if name.startswith(f"{around}.")} or found
    if len(found) != 1:
        raise InputError(
            f"The encoder of {type(base).__name__} has {len(found)} lists of layers "
            f"({', '.join(found) or 'none'}); rocr needs exactly one."
        )
    return next(iter(found.items()))


def has_decoder(base: nn.Module) -> bool:
    """Return whether a model of transformers has a decoder, alone or with an encoder."""
    inner = getattr(base, "base_model", base)
    parts = (base, inner, getattr(inner, "language_model", inner))
    return any(hasattr(part, "decoder") for part in parts)


def _has_matrix(layer: nn.Module) -> bool:
    return any(_is_matrix(module) for module in layer.modules())


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))
