import errno

import pytest

import rocr
from rocr.io.boundary import calling


@pytest.mark.parametrize("raised", [ValueError("bad\nsecond line"), KeyError("x"), StopIteration(), SystemExit(3)])
def test_what_code_of_others_raises_becomes_a_sentence_with_its_cause(raised):
    with pytest.raises(rocr.InputError) as caught, calling("The chat template", "Give --template TEXT."):
        raise raised
    assert caught.value.__cause__ is raised
    sentence = str(caught.value)
    assert sentence.startswith(f"The chat template failed: {type(raised).__name__}")
    assert sentence.endswith(". Give --template TEXT.") and "\n" not in sentence


@pytest.mark.parametrize(
    "raised",
    [
        rocr.GuardError("a sentence"),
        MemoryError(),
        RuntimeError("CUDA out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_what_the_caller_knows_more_of_passes_as_it_is(raised):
    with pytest.raises(type(raised)) as caught, calling("Anything"):
        raise raised
    assert caught.value is raised
