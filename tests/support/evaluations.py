"""An invented evaluation with everything that a page can show: names and answers with markup, and a form not known."""

from rocr.evaluation import Evaluation
from rocr.evaluation.report import About
from rocr.evaluation.scores import FreeAnswer, ItemScore

HOSTILE = "<img src=x onerror=alert(1)> \"Bobby\" & 'co' </table><script>alert(2)</script>"
FORGET = {"Stephen King": "Carrie", "Ada Byron": "programs", HOSTILE: "<b>bold</b>"}
RETAIN = {f"Kept Person {i}": f"work {i}" for i in range(1, 6)}
BEFORE = {"qa": 0.55, "fb": 0.48, "mcp": 0.27, "misspelt": 0.4}
LEFT = {"qa": 0.12, "fb": 0.25, "mcp": 1.0, "misspelt": 0.6}
ABOUT = About(
    model="tiny-model",
    edit="edit.safetensors",
    date="2026-01-02 03:04 UTC",
    versions={"rocr": "0.1.0", "torch": "2.0"},
    options={"generate": True},
    redirects={"Stephen King": "Bruce Lee", "Ada Byron": "a gardener", HOSTILE: "<i>a redirect</i>"},
)


def _items(after: bool) -> list[ItemScore]:
    items = []
    for split, subjects in (("forget", FORGET), ("retain", RETAIN)):
        for number, (subject, answer) in enumerate(subjects.items()):
            for fact in range(2):
                for form, level in BEFORE.items():
                    score = level * (1 - 0.08 * number) * (1 - 0.1 * fact)
                    if after:
                        score *= LEFT[form] * (1 + 0.3 * number) if split == "forget" else 1 - 0.05 * number
                    probe = 2 * number + fact + (10 if split == "retain" else 0)
                    question = f"Please answer.\nQuestion: What did {subject} make in year {fact}?\n"
                    chance = 0.25 if form == "mcp" else None
                    shown = "B" if form == "mcp" else answer
                    items.append(
                        ItemScore(
                            probe, subject, form, split, score, 0.5, 0.0, chance=chance, question=question, answer=shown
                        )
                    )
    return items


def _answers(items: list[ItemScore], after: bool) -> list[FreeAnswer]:
    answers = []
    for item in items:
        if item.form == "qa":
            known = item.split == "retain" or not after
            text = (
                f"It is {item.answer}, of course." if known else "A film about martial arts.<script>alert(3)</script>"
            )
            answers.append(FreeAnswer(item.probe, item.subject, item.split, item.question, item.answer, text, known))
    return answers


def invented() -> tuple[Evaluation, Evaluation]:
    """Evaluations before and after an edit."""
    settings = {"forms": list(BEFORE), "seed": 0, "orders": 1}
    before, after = (
        Evaluation(items, 16, measures=measures, settings=settings, answers=_answers(items, late), seconds=12.0)
        for late, items, measures in (
            (False, _items(False), {"contained forget": 0.8, "contained retain": 0.33, "perplexity": 20.0}),
            (True, _items(True), {"contained forget": 0.1, "contained retain": 0.19, "perplexity": 20.4}),
        )
    )
    return before, after
