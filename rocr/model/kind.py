"""How a model reads a text, and whether it writes one: what decides how its keys are read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelKind:
    """How a model reads a text, and whether it writes one; `rocr.model.causality.with_kind` finds it out by running it.

    Attributes:
        bidirectional: Whether the state of a token depends on later tokens, as in BERT and the encoder of T5. Prompts
            are then run as a whole, and no prefix is shared.
        writes_text: Whether the model predicts the next token of a text that it reads. A model that does not is called
            a text encoder here: its states are its result, and they include those of the tokens that its tokenizer
            puts after a text.
    """

    bidirectional: bool = False
    writes_text: bool = True


LANGUAGE_MODEL = ModelKind()
