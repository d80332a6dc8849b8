"""The names of weights in the class that a checkpoint's config.json names, if the model was loaded as another class.

A vision-language checkpoint is edited as the language model inside it. The checkpoint's own class has the same
weights under other names.
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
from rocr.model.source import ModelSource
from rocr.model.stored_weights import find_weights, stored_names


def own_names(loaded: LoadedModel, parameters: Iterable[str]) -> dict[str, str]:
    """Map names of parameters of a loaded model to their names in the checkpoint's own class.

    Args:
        loaded: The model.
        parameters: The names of some of its parameters.

    Returns:
        The names that differ; empty if the class is the same, is not one of transformers, or cannot be built from the
        configuration.
    """
    files = find_weights(loaded.source)
    own = None if files is None else _own_class(loaded.source, loaded.model)
    if files is None or own is None:
        return {}
    mine, theirs = stored_names(files, loaded.model), stored_names(files, own)
    parameter_of = {stored: parameter for parameter, places in theirs.plain.items() for stored in places}
    pairs = ((name, parameter_of.get(mine.of(name), name)) for name in parameters)
    return {name: other for name, other in pairs if other != name}


def _own_class(source: ModelSource, model: nn.Module) -> nn.Module | None:
    """Build the checkpoint's own class without weights; None if the model is of it, or it cannot be built."""
    try:
        with loading(source) as library, calling(f"The configuration of {source.name}"):
            config = library.config()
            name = (getattr(config, "architectures", None) or [""])[0]
            kind = getattr(transformers, str(name), None)
            if name == type(model).__name__ or not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
                return None  # config.json may name anything
            with parameters_on_meta():
                own: nn.Module = kind(config)
            return own
    except InputError:
        return None
