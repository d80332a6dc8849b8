"""Questions of rocr's probe set in the forms of ORT, for lm-evaluation-harness; needs no rocr.

ORT: Ye, Zhang and Wu, "LLM Unlearning Should Be Form-Independent", arXiv 2506.07795. `questions.jsonl` is written by
`python benches/harness_task.py`.
"""

import json
import math
from pathlib import Path

DIRECT = "Please provide direct answers without any explanations or additional content.\n"
"""What the authors write before a question to a Mistral model."""
FORMS = ("qa", "fb", "mcp", "subtoken")


def questions(form, pretrained=None, tokenizer=None, targets=(), chat=True, **_):
    """Return the questions of one form, rendered for a model, as {"test": dataset}.

    Args:
        form: One of FORMS.
        pretrained: Name or path of the model, which lm-eval takes from --model_args; its style of prompts follows.
        tokenizer: Name or path of the tokenizer, or the tokenizer itself. None is that of the model.
        targets: Subjects that were unlearned. Empty counts all questions as one set.
        chat: Whether the tokenizer's chat template is used, if it has one.

    Raises:
        ValueError: No tokenizer is named, or a target has no question.
    """
    from datasets import Dataset

    tokenizer = tokenizer or pretrained
    if tokenizer is None:
        raise ValueError(
            'Name the model: --model_args pretrained=MODEL, or TaskManager(metadata={"pretrained": MODEL}).'
        )
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    lines = (Path(__file__).parent / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if row["form"] == form]
    targets = [targets] if isinstance(targets, str) else list(targets)
    unknown = set(targets) - {row["subject"] for row in found}
    if unknown:
        raise ValueError(f"No question is about {', '.join(sorted(unknown))}: name a subject of questions.jsonl.")
    return {
        "test": Dataset.from_list([_rendered(row, str(pretrained).lower(), tokenizer, targets, chat) for row in found])
    }


def _rendered(row, name, tokenizer, targets, chat):
    """Return the row of a question: prompt, answer, the number of its tokens, and its set.

    `context` is the prompt without the spaces at its end, which the harness would move to the answer and score.
    `continuations` are these spaces with the answer and, where they are tokens of their own, the spaces alone.
    """
    message = row["plain"] if "plain" in row and "llama" in name else row["message"]
    if "mistral" in name and row["form"] != "subtoken":
        message = DIRECT + message
    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": message}]
        message = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    prompt = message + row["suffix"]
    context = prompt.rstrip()
    spaces = prompt[len(context) :]
    own, whole, tokens = (
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (context, prompt, row["answer"])
    )
    kept = "forget" if row["subject"] in targets else "retain"
    return {
        "subject": row["subject"],
        "prompt": prompt,
        "context": context,
        "answer": row["answer"],
        "continuations": [spaces + row["answer"], *([spaces] if whole > own else [])],
        "tokens": tokens,
        "set": kept if targets else "all",
    }


def qa(**settings):
    """Return the plain questions."""
    return questions("qa", **settings)


def fb(**settings):
    """Return the questions with a blank."""
    return questions("fb", **settings)


def mcp(**settings):
    """Return the multiple-choice questions; a guess scores the share of one option, mostly 0.25."""
    return questions("mcp", **settings)


def subtoken(**settings):
    """Return the questions whose answer is written character by character."""
    return questions("subtoken", **settings)


def scores(doc, results):
    """Return the score of one question, exp(-mean negative log-likelihood of the answer's tokens), under its set.

    A second result is the likelihood of the spaces before the answer.
    """
    (likelihood, _), *before = results
    score = math.exp((likelihood - sum(spaces for spaces, _ in before)) / doc["tokens"])
    return {"score": score} if doc["set"] == "all" else {"score": score, doc["set"]: score}
