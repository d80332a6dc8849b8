"""What edited weights are called in the class that a checkpoint is of, where it was loaded as another one.

A vision-language checkpoint is edited as the language model inside it. Whoever loads the checkpoint's own class, as
its config.json names it, finds the same weights under other names.
"""

from __future__ import annotations

from collections.abc import Iterable

import transformers
from torch import nn
from transformers import PreTrainedModel

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.hub import loading
from rocr.model.load import LoadedModel
from rocr.model.load_partial import parameters_on_meta
from rocr.model.source import ModelSource
from rocr.model.stored_weights import find_weights, stored_names


def own_names(loaded: LoadedModel, parameters: Iterable[str]) -> dict[str, str]:
    """For parameters of a loaded model their names in the checkpoint's own class, where these differ.

    Args:
        loaded: the model.
        parameters: names of some of its parameters.

    Returns:
        Nothing where the class is the same, is not one of transformers, or cannot be made from the configuration.
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
    """The checkpoint's own class without weights; None where the model is of it, or it cannot be made."""
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
