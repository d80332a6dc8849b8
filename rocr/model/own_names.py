"""The names of weights in the other class that the same checkpoint can be loaded as.

A vision-language checkpoint can be loaded as the class that its config.json names, or by AutoModelForCausalLM as the
language model inside it. Both classes have the same weights under other names.
"""

from __future__ import annotations

from collections.abc import Iterable

import transformers
from torch import nn
from transformers import PreTrainedModel

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.hub import loading, parameters_on_meta
from rocr.model.load import LoadedModel
from rocr.model.model_class import inner_language_model
from rocr.model.source import ModelSource
from rocr.model.stored_names import stored_names
from rocr.model.stored_weights import find_weights


def own_names(loaded: LoadedModel, parameters: Iterable[str]) -> dict[str, str]:
    """Map names of parameters of a loaded model to their names in the other class of its checkpoint.

    Args:
        loaded: The model.
        parameters: The names of some of its parameters.

    Returns:
        The names that differ; empty if there is no other class, or it is not one of transformers or cannot be built
        from the configuration.
    """
    files = find_weights(loaded.source)
    other = None if files is None else _other_class(loaded.source, loaded.model)
    if files is None or other is None:
        return {}
    mine, theirs = stored_names(files, loaded.model), stored_names(files, other)
    parameter_of = {stored: parameter for parameter, places in theirs.plain.items() for stored in places}
    pairs = ((name, parameter_of.get(mine.of(name), name)) for name in parameters)
    return {name: found for name, found in pairs if found != name}


def _other_class(source: ModelSource, model: nn.Module) -> nn.Module | None:
    """Build the other class of a checkpoint without weights; None if there is none, or it cannot be built."""
    try:
        with loading(source) as library, calling(f"The configuration of {source.name}"):
            config = library.config()
            name = (getattr(config, "architectures", None) or [""])[0]
            if name == type(model).__name__:
                build = inner_language_model(config)
            else:
                kind = getattr(transformers, str(name), None)  # config.json may name anything
                build = kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None
            if build is None:
                return None
            with parameters_on_meta():
                other: nn.Module = build(config)
            return other
    except InputError:
        return None
