"""rocr: bulk concept unlearning for language models in closed form."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rocr import ops
    from rocr.chat_settings import ChatSettings
    from rocr.concepts import Concept, load_concepts
    from rocr.config import EditConfig, Template
    from rocr.edit.aliases import propose_aliases
    from rocr.edit.edit import Edit
    from rocr.edit.guards import Guards
    from rocr.errors import GuardError, InputError, RocrError, VerificationError
    from rocr.evaluation import Evaluation, Probe, choose_redirects, load_probes
    from rocr.evaluation.evaluate import evaluate
    from rocr.export.edited import EditedModel, load
    from rocr.progress import Progress
    from rocr.statistics.collect import CollectOptions, collect_statistics
    from rocr.statistics.statistics import Statistics
    from rocr.unlearn import add_concepts, unlearn

_HOMES = {
    "ChatSettings": "chat_settings",
    "CollectOptions": "statistics.collect",
    "Concept": "concepts",
    "Edit": "edit.edit",
    "EditConfig": "config",
    "EditedModel": "export.edited",
    "Evaluation": "evaluation",
    "GuardError": "errors",
    "Guards": "edit.guards",
    "InputError": "errors",
    "Probe": "evaluation",
    "Progress": "progress",
    "RocrError": "errors",
    "Statistics": "statistics.statistics",
    "Template": "config",
    "VerificationError": "errors",
    "add_concepts": "unlearn",
    "choose_redirects": "evaluation",
    "collect_statistics": "statistics.collect",
    "evaluate": "evaluation",
    "load": "export.edited",
    "load_concepts": "concepts",
    "load_probes": "evaluation",
    "propose_aliases": "edit.aliases",
    "unlearn": "unlearn",
}

_OF_MODULES = ("__all__", "__doc__", "__file__", "__name__", "__path__", "__version__")
"""The names beside the public ones that `dir` lists."""

__version__ = "0.1.0"
__all__ = [
    "ChatSettings",
    "CollectOptions",
    "Concept",
    "Edit",
    "EditConfig",
    "EditedModel",
    "Evaluation",
    "GuardError",
    "Guards",
    "InputError",
    "Probe",
    "Progress",
    "RocrError",
    "Statistics",
    "Template",
    "VerificationError",
    "add_concepts",
    "choose_redirects",
    "collect_statistics",
    "evaluate",
    "load",
    "load_concepts",
    "load_probes",
    "ops",
    "propose_aliases",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `rocr --help` does not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"rocr.{_HOMES[name]}"), name)
    if name == "ops":
        return importlib.import_module("rocr.ops")
    raise AttributeError(f"module 'rocr' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, those that are not imported yet too, for completion and `help(rocr)`."""
    return sorted({*__all__, *(name for name in globals() if name in _OF_MODULES)})


class _Package(ModuleType):
    """The package. It keeps `rocr.unlearn` the function when the module `rocr.unlearn` is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
