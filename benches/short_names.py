"""Print how near the beginnings of famous names are to the whole names in a model, from 0 to 1.

    python benches/short_names.py MODEL

An edit moves a beginning the full distance if it is as near as `rocr.edit.short_names.STANDS_FOR`. The redirect of
people is Frédéric Chopin, that of things Mount Everest.
"""

from __future__ import annotations

import argparse

import torch

import rocr
from rocr.edit.short_names import STANDS_FOR, beginnings_of, nearness
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind
from rocr.model.load import find_model, load_model

PEOPLE = (
    "Galileo Galilei", "Wolfgang Amadeus Mozart", "Vincent van Gogh", "Neil Armstrong", "Nelson Mandela",
    "Pablo Picasso", "Christopher Columbus", "Mahatma Gandhi", "Walt Disney", "Stephen King", "Isaac Newton",
    "Michael Jordan", "Muhammad Ali", "Leonardo da Vinci", "Taylor Swift", "Elon Musk", "Albert Einstein",
    "Charles Darwin", "Jane Austen", "J. K. Rowling", "George Washington", "Napoleon Bonaparte", "Dante Alighieri",
    "Winston Churchill", "Marie Curie", "Michelangelo Buonarroti", "Harry Potter", "Abraham Lincoln",
    "Aristotle Onassis", "Ludwig van Beethoven", "Sigmund Freud", "Cristiano Ronaldo", "Barack Obama", "Donald Trump",
    "Oprah Winfrey", "Beyoncé Knowles", "Rembrandt van Rijn",
)  # fmt: skip
THINGS = ("Eiffel Tower", "Don Quixote", "French Revolution", "Star Wars", "World War II")


def main() -> None:
    """Print a Markdown table, the nearest beginnings first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a .gguf file")
    arguments = parser.parse_args()
    loaded = load_model(find_model(arguments.model), torch.bfloat16)
    architecture = with_kind(find_architecture(loaded.model), 0)
    concepts = [rocr.Concept(name, "Frédéric Chopin", kind="person") for name in PEOPLE]
    concepts += [rocr.Concept(name, "Mount Everest", kind="thing") for name in THINGS]
    rows = [
        (near, beginning, concept.name)
        for concept in concepts
        for beginning, near in nearness(architecture, loaded.tokenizer, concept, beginnings_of(concept.name)).items()
    ]
    print("| beginning | name | nearness | stands for it |\n|---|---|---:|---|")
    for near, beginning, name in sorted(rows, reverse=True):
        print(f"| {beginning} | {name} | {near:.2f} | {'yes' if near >= STANDS_FOR else ''} |")


if __name__ == "__main__":
    main()
