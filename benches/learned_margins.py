"""Why some kinds lose more about others: how sure they are of an answer, and how far an edit moves other people.

    python benches/learned_margins.py

Prints a table for the kinds of `learned_families.py`, whose trained models it reads from the cache: the margins of
right answers about people who are not unlearned, how far ten unlearned people move the states of the others at the last
token of the name, as a share of the mean distance between two people there, and what is lost with the default settings
about others by the name that they share with one of the ten.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from learned_edits import COUNTS, METHODS, Subject, decrease, right_answers
from learned_facts import HELD_OUT, Person, questions, redirect_of
from learned_kinds import KINDS
from learned_training import Learned, cache_folder, learn, next_logits
from torch import Tensor

import rocr
from rocr.keys.plan import plan_keys
from rocr.keys.read import read_states
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind

PEOPLE = 10
METHODS_SHOWN = ("rocr", "rocr, last tokens")
SHARED = ("first name", "last name", "no name")


@torch.no_grad()
def margins(learned: Learned, people: list[Person]) -> Tensor:
    """Return for each held-out question the logit of the right answer minus that of the best wrong one."""
    asked, tokenizer = questions(people, HELD_OUT), learned.tokenizer
    encoded = tokenizer([question.text for question in asked], padding=True, return_tensors="pt")
    logits = next_logits(learned.model, encoded["input_ids"], encoded["attention_mask"])
    choices = logits.gather(1, torch.tensor([tokenizer.convert_tokens_to_ids(each.choices) for each in asked]))
    answers = torch.tensor([question.choices.index(question.answer) for question in asked])[:, None]
    wrong = choices.scatter(1, answers, -torch.inf).max(dim=1).values
    return choices.gather(1, answers)[:, 0] - wrong


def states_at_names(subject: Subject) -> Tensor:
    """Return (people, d_out): the output of the last edited layer at each name's last token, over the templates."""
    layer = subject.kind.layers[-1]
    architecture = with_kind(find_architecture(subject.learned.model), layer)
    config = rocr.EditConfig(layers=(layer,), key_tokens="last", closing_keys=False)
    names = [rocr.Concept(person.name, person.name) for person in subject.learned.people]
    plan = plan_keys(subject.learned.tokenizer, names, config, architecture.kind)
    return read_states(architecture, plan.keys, layer).hidden


def moved_and_lost(subject: Subject, method: str) -> tuple[float, list[float]]:
    """Unlearn ten people and undo it.

    Returns:
        The mean distance that others' states move, as a share of the mean distance between two people; and what is
        lost about those who share a first name, a last name and neither.
    """
    people, redirects = subject.learned.people, subject.learned.redirects
    before = states_at_names(subject)
    concepts = [rocr.Concept(person.name, redirect_of(person, redirects).name) for person in people[:PEOPLE]]
    revert = METHODS[method](subject, concepts)
    after = states_at_names(subject)
    right = right_answers(subject.learned, subject.asked)
    revert()
    shares = [shared_name(question.person, people[:PEOPLE]) for question in subject.asked]
    lost = []
    for name in SHARED:
        part = torch.tensor([share == name for share in shares])
        lost.append(decrease(float(subject.before[part].float().mean()), float(right[part].float().mean())))
    return float((after - before)[PEOPLE:].norm(dim=1).mean() / torch.pdist(before).mean()), lost


def shared_name(person: Person, unlearned: list[Person]) -> str | None:
    """Return which name a person shares with the unlearned ones; None for one of them, or for both names."""
    first, last = (
        any(person.name.split()[place] == other.name.split()[place] for other in unlearned) for place in (0, -1)
    )
    if first and last:
        return None
    return "first name" if first else "last name" if last else "no name"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of trained models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    moves = [f"moved by {method}" for method in METHODS_SHOWN]
    columns = ["kind", "median margin", "lowest tenth below", *moves, *(f"lost, shared {name}" for name in SHARED)]
    print(f"| {' | '.join(columns).replace('shared no name', 'no shared name')} |")
    print("|---|" + "---:|" * (len(columns) - 1))
    for name in arguments.kinds:
        learned = learn(KINDS[name], arguments.cache)
        subject = Subject.of(learned, KINDS[name])
        found = margins(learned, learned.people[max(COUNTS) :])
        low, middle = torch.quantile(found, torch.tensor([0.1, 0.5])).tolist()
        results = [moved_and_lost(subject, method) for method in METHODS_SHOWN]
        cells = [f"{share:.1%}" for share in (*(moved for moved, _ in results), *results[0][1])]
        print(f"| {name} | {middle:.1f} | {low:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
