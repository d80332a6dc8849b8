"""Evaluation: does a model forget in every form of a question, and keep the rest?"""

from rocr.evaluation.compare import Comparison, FormChange, compare_evaluations
from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.forms import FORMS, ORT_FORMS
from rocr.evaluation.probes.load import load_probes
from rocr.evaluation.probes.probe import Probe, Wording
from rocr.evaluation.redirects import RedirectChoice, choose_redirects
from rocr.evaluation.scores import Evaluation

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
