"""Choose the class that a model is loaded as: the one that its config.json names.

A vision-language checkpoint is loaded with its vision tower, and a text encoder without a language modeling head that
its files do not hold. The name in config.json is untrusted: it only selects among the classes that transformers lists
for the type of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import transformers

HEADED = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM")
"""Classes of transformers that load models which write text, in the order of preference."""
HEADLESS = ("AutoModelForTextEncoding", "AutoModelForMaskedLM", "AutoModel")
"""Those that load models which only read text."""


def auto_class_of(config: Any, trust_remote_code: bool = False) -> Any:
    """Return the auto class of transformers that loads a model as the class that its configuration names.

    If the name is missing, or is that of a class which none of them loads, the choice is the first auto class in
    `HEADED` and `HEADLESS` that loads models with this type of configuration. The same holds for the bare model inside
    a model that writes text, such as LlamaModel: its head may be the embedding.

    Args:
        config: The model's configuration.
        trust_remote_code: Whether code that comes with the model may run. A class from `auto_map` is then preferred.

    Returns:
        A class with `from_pretrained` and `from_config`; AutoModelForCausalLM if no class is known, which reports that.
    """
    if trust_remote_code:
        for name in (*HEADED, "AutoModel"):
            if name in (getattr(config, "auto_map", None) or {}) and hasattr(transformers, name):
                return getattr(transformers, name)
    named = _named(config)
    known = dict(_known(config))
    by_name = {kind: auto for auto, kinds in reversed(known.items()) for kind in kinds}
    chosen = next((by_name[name] for name in named if name in by_name), None)
    if chosen in (None, HEADLESS[-1]):
        chosen = next(iter(known), HEADED[0])
    return getattr(transformers, chosen)


def writes_from_left_to_right(model: Any) -> bool:
    """Return whether a model is of a class that AutoModelForCausalLM loads for its configuration."""
    return type(model).__name__ in _kinds(getattr(transformers, HEADED[0]), type(model.config))


def inner_language_model(config: Any) -> Callable[[Any], Any] | None:
    """Return what builds the language model inside a vision-language model from its configuration.

    Returns:
        A function of the configuration; None if AutoModelForCausalLM loads no other class than `auto_class_of`.
    """
    causal, own = getattr(transformers, HEADED[0]), auto_class_of(config)
    inside = _kinds(causal, type(config))
    if own is causal or own.__name__ not in HEADED or not inside or inside == _kinds(own, type(config)):
        return None
    return causal.from_config  # type: ignore[no-any-return]


def _named(config: Any) -> list[str]:
    """Return the names of classes in a configuration, which may hold anything."""
    found = getattr(config, "architectures", None)
    return [name for name in found if isinstance(name, str)] if isinstance(found, (list, tuple)) else []


def _known(config: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each auto class that loads models with a type of configuration, and the names of their classes.

    Older versions of transformers lack some of them.
    """
    for name in (*HEADED, *HEADLESS):
        kinds = _kinds(getattr(transformers, name, None), type(config))
        if kinds:
            yield name, kinds


def _kinds(auto: Any, config_class: type) -> list[str]:
    """Return the names of the classes that an auto class loads for a class of configuration."""
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None or config_class not in mapping:
        return []
    found = mapping[config_class]
    return [kind.__name__ for kind in (found if isinstance(found, (list, tuple)) else [found])]
