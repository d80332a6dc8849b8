"""rocr: bulk concept unlearning for language models, in closed form."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rocr import ops
    from rocr.chat import ChatSettings
    from rocr.collect import CollectOptions, collect_statistics
    from rocr.concepts import Concept, load_concepts
    from rocr.config import EditConfig
    from rocr.edit import Edit
    from rocr.errors import GuardError, InputError, RocrError, VerificationError
    from rocr.evaluation import Evaluation, Probe, evaluate, load_probes
    from rocr.guards import Guards
    from rocr.pipeline import unlearn
    from rocr.progress import Progress
    from rocr.prompts import Template
    from rocr.statistics import Statistics

_HOMES = {
    "ChatSettings": "chat",
    "CollectOptions": "collect",
    "Concept": "concepts",
    "Edit": "edit",
    "EditConfig": "config",
    "Evaluation": "evaluation",
    "GuardError": "errors",
    "Guards": "guards",
    "InputError": "errors",
    "Probe": "evaluation",
    "Progress": "progress",
    "RocrError": "errors",
    "Statistics": "statistics",
    "Template": "prompts",
    "VerificationError": "errors",
    "choose_redirects": "evaluation",
    "collect_statistics": "collect",
    "evaluate": "evaluation",
    "load_concepts": "concepts",
    "load_probes": "evaluation",
    "unlearn": "pipeline",
}

__version__ = "0.1.0"
__all__ = [
    "ChatSettings",
    "CollectOptions",
    "Concept",
    "Edit",
    "EditConfig",
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
    "choose_redirects",
    "collect_statistics",
    "evaluate",
    "load_concepts",
    "load_probes",
    "ops",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `rocr --help` does not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"rocr.{_HOMES[name]}"), name)
    if name == "ops":
        return importlib.import_module("rocr.ops")
    raise AttributeError(f"module 'rocr' has no attribute {name!r}")
