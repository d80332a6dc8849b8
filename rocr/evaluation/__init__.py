"""Evaluate how much a model knows of the forget set and the retain set, asked in several forms."""

from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.forms import FORMS, ORT_FORMS
from rocr.evaluation.probes.load import load_probes
from rocr.evaluation.probes.probe import Probe, Wording
from rocr.evaluation.redirects import RedirectChoice, choose_redirects
from rocr.evaluation.scores import Comparison, Evaluation, FormChange, compare_evaluations

__all__ = [
    "FORMS",
    "ORT_FORMS",
    "Comparison",
    "EvaluateOptions",
    "Evaluation",
    "FormChange",
    "Probe",
    "RedirectChoice",
    "Wording",
    "choose_redirects",
    "compare_evaluations",
    "evaluate",
    "load_probes",
]
