"""The model inside its wrappers: modules and parameters under the names that its own state dict gives them.

peft, torch.compile, data parallelism and activation checkpointing put modules around others, which adds parts to
names. Classes are told by name, so that no library has to be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from rocr.errors import InputError

_HELD_AS = {
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
"""For each class of wrappers, subclasses included, the attribute that holds the module inside."""

_ADAPTERS = {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}
"""Classes of peft that put trained parameters beside or in place of those of a module."""


def base_of(model: nn.Module) -> nn.Module:
    """The model of transformers inside wrappers; layers of an active adapter stay in it and run with it.

    Raises:
        InputError: the wrapper changes more than modules.
    """
    if "PeftModel" in kinds(model) and "BaseTuner" not in kinds(held := model.get_submodule("base_model")):
        raise InputError(
            f"{type(model).__name__} around {type(held).__name__} adds tokens or states of its own to every text, as "
            "prompt and prefix tuning do: its keys are not those of the text. Give the model inside it."
        )
    return unwrapped(model)


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module that wrappers hold; a module that is no wrapper is itself."""
    while True:
        attribute = next((_HELD_AS[kind] for kind in kinds(module) if kind in _HELD_AS), None)
        if attribute is None:
            return module
        module = getattr(module, attribute)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Each module of a model as it is without wrappers: its name, the module, and its outermost wrapper or itself.

    The order is that of `named_modules`, and a module that stands in several places is given once.

    Raises:
        InputError: a wrapper keeps parameters in a form of its own.
    """
    yield from _own_modules("", model, set())


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter of a model as it is without wrappers and adapters, in the order of `named_parameters`."""
    seen: set[int] = set()
    for name, module, _ in own_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{leaf}" if name else leaf, parameter


def own_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each buffer that a model's files hold, such as a scalar of a layer, named as those of `own_parameters`."""
    for name, module, _ in own_modules(model):
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                yield f"{name}.{leaf}" if name else leaf, buffer


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, float]]:
    """What adapters that are active and not merged add: a name without the adapter's own, a parameter, its scale."""
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
    """Within the context, what is compiled runs as it was written, so that hooks that came later run.

    Before torch 2.6, which cannot do this, it runs compiled.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    is_compiled = "torch._dynamo" in sys.modules  # else nothing is
    with set_stance("force_eager") if is_compiled and set_stance else nullcontext():
        yield


def kinds(module: nn.Module) -> set[str]:
    """Names of a module's class and of those that it inherits from."""
    return {kind.__name__ for kind in type(module).__mro__}


def _own_modules(name: str, outer: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    module = unwrapped(outer)
    if "FullyShardedDataParallel" in kinds(module):
        raise InputError(
            f"{name or 'The model'} is inside FullyShardedDataParallel, which keeps parameters in flat pieces without "
            "their shapes. Load the model in one process, or with a tp_plan."
        )
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module, outer
    for child_name, child in module.named_children():
        yield from _own_modules(f"{name}.{child_name}" if name else child_name, child, seen)
