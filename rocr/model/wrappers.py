"""The model inside wrappers: its modules and parameters under the names of its own state dict.

peft, torch.compile, data parallelism and activation checkpointing wrap modules in others, which adds parts to names.
Classes are recognised by name, so that these libraries need not be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from rocr.errors import InputError

_INNER_ATTRIBUTES = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",
    "BaseTunerLayer": "base_layer",
    "AuxiliaryTrainingWrapper": "original_module",
}
"""The attribute that holds the inner module, for each class of wrappers and its subclasses."""

_ADAPTERS = {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}
"""Classes of peft that add trained parameters to a module or replace the module's own."""


def base_of(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside wrappers. Layers of an active adapter stay in it and run with it.

    Raises:
        InputError: The wrapper adds tokens or states to every text.
    """
    if "PeftModel" in kinds(model) and "BaseTuner" not in kinds(inner := model.get_submodule("base_model")):
        raise InputError(
            f"{type(model).__name__} around {type(inner).__name__} adds tokens or states to every text, as prompt and "
            "prefix tuning do, so its keys are not those of the text. Give the model inside it."
        )
    return unwrapped(model)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the innermost module inside wrappers; a module without a wrapper is returned unchanged."""
    while True:
        attribute = next((_INNER_ATTRIBUTES[kind] for kind in kinds(module) if kind in _INNER_ATTRIBUTES), None)
        if attribute is None:
            return module
        module = getattr(module, attribute)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield each module of a model without wrappers: its name, the module, and its outermost wrapper or itself.

    The order is that of `named_modules`. A module that is used in several places is yielded once.

    Raises:
        InputError: A wrapper stores parameters in another form.
    """
    yield from _own_modules("", model, set())


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter of a model without wrappers and adapters, in the order of `named_parameters`."""
    seen: set[int] = set()
    for name, module, _ in own_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{leaf}" if name else leaf, parameter


def own_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each buffer that a model's files store, such as a scalar of a layer, named as in `own_parameters`."""
    for name, module, _ in own_modules(model):
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                yield f"{name}.{leaf}" if name else leaf, buffer


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, float]]:
    """Yield each parameter of active adapters that are not merged: a name without the adapter's, itself, its scale."""
    for path, module in model.named_modules():
        if not kinds(module) & _ADAPTERS or getattr(module, "disable_adapters", False):
            continue
        active = set(module.active_adapters) - set(getattr(module, "merged_adapters", ()))  # type: ignore[arg-type]
        base = {id(parameter) for parameter in unwrapped(module).parameters()}
        scaling = getattr(module, "scaling", None)
        for name, parameter in module.named_parameters():
            adapter = next((part for part in name.split(".") if part in active), None)
            if adapter is not None and id(parameter) not in base:
                scale = scaling.get(adapter, 1.0) if isinstance(scaling, dict) else 1.0
                kept = [part for part in name.split(".") if part != adapter]
                yield f"{path}.{'.'.join(kept)}", parameter, float(scale)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules without compilation inside the context, so that hooks that were added later are called.

    torch before 2.6 cannot do this, and runs them compiled.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    is_compiled = "torch._dynamo" in sys.modules  # otherwise no module is compiled
    with set_stance("force_eager") if is_compiled and set_stance else nullcontext():
        yield


def kinds(module: nn.Module) -> set[str]:
    """Return the names of a module's class and of its base classes."""
    return {kind.__name__ for kind in type(module).__mro__}


def _own_modules(name: str, outer: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    module = unwrapped(outer)
    if "FullyShardedDataParallel" in kinds(module):
        raise InputError(
            f"{name or 'The model'} is inside FullyShardedDataParallel, which stores parameters in flat parts without "
            "their shapes. Load the model in one process, or with a tp_plan."
        )
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module, outer
    for child_name, child in module.named_children():
        yield from _own_modules(f"{name}.{child_name}" if name else child_name, child, seen)
