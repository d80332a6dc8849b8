"""What a user sees of the package at a prompt: the public names, their help, and one line for large objects."""

import pydoc
import re
import subprocess
import sys

import pytest

import rocr

pytestmark = pytest.mark.usefixtures("one_thread")
OF_MODULES = {"__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"}


def test_dir_offers_the_public_names_and_no_others():
    assert set(dir(rocr)) == {*rocr.__all__, *OF_MODULES}


def test_public_names_are_offered_before_any_of_them_is_imported():
    script = "import rocr; before = dir(rocr); rocr.Edit; assert dir(rocr) == before; print(*before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {*rocr.__all__, *OF_MODULES}


def test_help_lists_the_public_functions_with_their_docstrings():
    page = pydoc.plain(pydoc.render_doc(rocr))
    functions = page[page.index("\nFUNCTIONS\n") : page.index("\nDATA\n")]
    listed = re.findall(r"^    (\w+)\(", functions, re.MULTILINE)
    assert listed == [name for name in rocr.__all__ if name.islower() and name != "ops"]
    for name in listed:
        assert getattr(rocr, name).__doc__.splitlines()[0] in functions


def test_an_edit_and_what_it_is_made_with_are_shown_on_one_line(model, tokenizer, statistics, concepts):
    edit = rocr.unlearn(
        model, tokenizer, concepts, statistics, rocr.EditConfig(layers=(1, 2)), guards=rocr.Guards(force=True), ask=0
    )
    name = statistics.fingerprint.name
    assert repr(edit) == f"Edit(2 concepts, layers=(1, 2), method='whitened', model={name!r})"
    tokens, text = f"{statistics.tokens:,}", statistics.text[:40]
    assert repr(statistics) == f"Statistics({tokens} tokens, layers=(0, 1, 2, 3, 4), model={name!r}, text={text!r})"
    probes = [rocr.Probe("Ada Byron", "Who wrote programs?", "Ada Byron"), rocr.Probe("rain", "What falls?", "rain")]
    assert repr(rocr.evaluate(model, tokenizer, probes, ("qa",))) == "Evaluation(2 probes, 2 items, forms=('qa',))"
