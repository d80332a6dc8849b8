import pytest
import torch

import rocr
from rocr.keys.continuations import log_probabilities
from rocr.model.smaller_batches import retry_with_smaller_batch

OutOfMemory = torch.cuda.OutOfMemoryError


@pytest.fixture
def smaller(model):
    """smaller(rows): from now on the model raises an out-of-memory error for batches of more rows."""
    hooks, refused = [], []

    def limit(rows):
        def check(_, inputs):
            if len(inputs[0]) > rows:
                refused.append(len(inputs[0]))
                raise OutOfMemory("out of memory")

        hooks.append(model.model.layers[1].mlp.register_forward_pre_hook(check))
        return refused

    yield limit
    for hook in hooks:
        hook.remove()


def test_a_size_is_halved_until_it_does():
    tried = []

    def run(size):
        tried.append(size)
        if size > 3:
            raise OutOfMemory("out of memory")
        return size

    assert retry_with_smaller_batch(run, 20) == 2
    assert tried == [20, 10, 5, 2]
    with pytest.raises(OutOfMemory):
        retry_with_smaller_batch(run, 20, least=4)


def test_statistics_are_the_same_in_smaller_pieces(model, tokenizer, texts, smaller):
    options = rocr.CollectOptions(length=32, batch_tokens=512)
    whole = rocr.collect_statistics(model, tokenizer, texts, [1, 2], options)
    refused = smaller(3)
    pieces = rocr.collect_statistics(model, tokenizer, texts, [1, 2], options)
    assert refused and pieces.tokens == whole.tokens
    for layer in (1, 2):
        torch.testing.assert_close(pieces.second_moment(layer), whole.second_moment(layer), rtol=1e-5, atol=1e-7)


def test_an_edit_is_the_same_in_smaller_batches(model, tokenizer, concepts, statistics, smaller):
    config, guards = rocr.EditConfig(layers=(1, 2)), rocr.Guards(force=True)
    whole = rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=guards)
    whole.revert(model)
    refused = smaller(3)
    pieces = rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=guards)
    assert refused
    for mine, theirs in zip(pieces.updates, whole.updates, strict=True):
        torch.testing.assert_close(
            mine.factors.left @ mine.factors.right, theirs.factors.left @ theirs.factors.right, rtol=1e-4, atol=1e-6
        )


def test_where_one_sequence_is_too_large_the_error_stays(model, tokenizer, texts, smaller):
    smaller(0)
    with pytest.raises(OutOfMemory):
        rocr.collect_statistics(model, tokenizer, texts, [1, 2])


def test_the_probabilities_of_continuations_are_the_same_in_smaller_batches(model, tokenizer, smaller):
    prompts = [tokenizer(text).input_ids for text in ("Ada Byron", "the sun", "Who was Ada", "it is", "Blaise")]
    whole = log_probabilities(model, prompts, [()] * len(prompts))
    refused = smaller(2)
    pieces = log_probabilities(model, prompts, [()] * len(prompts))
    assert refused
    for mine, theirs in zip(pieces, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
