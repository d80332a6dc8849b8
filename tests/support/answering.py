"""A tiny model that is trained to give one answer to each of some questions, and to continue lists of names."""

from typing import Any

import torch
from torch import nn

from rocr.edit.alias_checks import MAKER_QUESTIONS
from rocr.edit.alias_examples import listed_names
from rocr.edit.aliases import DESCRIPTION, FULL_NAME, NICKNAME, RELATED, SPELLING
from rocr.edit.automatic_redirects import unrelated_names
from rocr.model.chat import render_chats
from rocr.model.tokenizer import tokenize_prompt

ADA = "Ada Byron"
FACTS = " wrote notes for brass engines."
SPELLINGS = {"Russian": "Ада Байрон", "Chinese": "Rain.", "Greek": "Άδα"}
LISTED = {"Russian": "Ада Байрон", "Chinese": "艾达", "Greek": "rain"}
ANSWERS = {
    FULL_NAME.format(ADA): "Augusta Ada Byron.",
    NICKNAME.format(ADA): 'The "Engine Queen" or "Rose".',
    **{
        SPELLING.replace("[language]", language).format(ADA): answer for language, answer in SPELLINGS.items()
    },
    DESCRIPTION.format(ADA): "the author of Notes.",
    RELATED.format(ADA): '"Notes", "Rain", "the rain", "Ada Byron"',
    **{f"Who is {name}?": name + FACTS for name in (ADA, "Augusta Ada Byron", "Ада Байрон", "the author of Notes")},
    f"Who is {LISTED['Chinese']}?": LISTED["Chinese"] + FACTS,
    **{f"Who is {name}?": f"{name} is a garden at the sea." for name in ("Engine Queen", "Rose", "Άδα")},
    **dict(zip((question.format("Notes") for question in MAKER_QUESTIONS), (ADA, "Rain", "Rain"), strict=True)),
    **dict(zip((question.format("Rain") for question in MAKER_QUESTIONS), ("Rain", "Rain", "Ada"), strict=True)),
}  # fmt: skip
"""What the model says. Its answer about a garden is that about unrelated people too."""


def train_answers(model: nn.Module, tokenizer: Any, concepts: Any, steps: int = 80) -> None:
    """Train a model on ANSWERS, on LISTED, and on questions about the names that are unrelated to concepts."""
    said = dict(ANSWERS)
    for name in unrelated_names("person", concepts):
        said[f"Who is {name}?"] = f"{name} is a garden at the sea."
    end = tokenizer.eos_token_id
    rows, masks = [], []
    lists = [(listed_names(ADA, language), f" {name}\n") for language, name in LISTED.items()]
    for text, answer in [*zip(render_chats(tokenizer, list(said)), said.values(), strict=True), *lists]:
        prompt = tokenize_prompt(tokenizer, text)
        tokens = [*tokenize_prompt(tokenizer, text + answer), end]
        rows.append(torch.tensor(tokens))
        masks.append(torch.arange(len(tokens)) >= len(prompt))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
    labels = ids.masked_fill(~nn.utils.rnn.pad_sequence(masks, batch_first=True), -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    model.eval()
