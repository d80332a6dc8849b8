"""Whether answers about concepts still read as sentences: the n-gram entropy in a report, and what is said of it."""

import math

import pytest

from rocr.cli.console import Console
from rocr.cli.tables import show_fluency
from rocr.export.report import Answer, fluency


def test_a_repetitive_answer_has_a_low_entropy():
    """Four different pairs and three different triples: 2/3 log2 4 and 4/3 log2 3, halved; two equal words: 0."""
    answers = [Answer("Ada", True, "Who?", "a b c d e", "no no no no no"), Answer("Bob", True, "Who?", "x", "x")]
    found = fluency(answers)["fluency"]
    assert found["before"] == pytest.approx((2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)) / 2 / 2)
    assert found["after"] == pytest.approx(0.0)
    assert fluency([]) == {}


@pytest.mark.parametrize(
    ("after", "words"), [(4.0, "still read as before"), (3.8, "still read as before"), (3.79, "try another redirect")]
)
def test_the_terminal_gives_a_verdict(after, words, capsys):
    show_fluency({"before": 4.0, "after": after}, Console())
    assert words in " ".join("".join(capsys.readouterr()).split())
    show_fluency(None, Console())
    show_fluency({"before": 0.0, "after": 0.0}, Console())
    assert "".join(capsys.readouterr()) == ""
