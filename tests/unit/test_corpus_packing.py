import itertools
import random
import tracemalloc

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rocr.errors import InputError
from rocr.statistics.corpus import pack_tokens, token_batches

SENTENCES = [
    "The gardener waters the roses before the sun is high.",
    "A key is the input of the down-projection.",
    "Æsop's fables, naïve café talk and 東京 are ordinary text too.",
    "One two three four five six seven eight nine ten.",
]


def build_tokenizer(adds_start, start="<s>", end="<|endoftext|>"):
    """Train a byte-level BPE; as Llama 3 does, it puts BOS before a text if `adds_start`."""
    special = [token for token in (start, end) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, model_max_length=16)


@pytest.fixture(scope="module", params=[False, True], ids=["no-bos", "bos"])
def tokenizer(request):
    return build_tokenizer(adds_start=request.param)


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stream_of(tokenizer, documents):
    """The packed stream by its definition: every document's tokens, joined by the end-of-text token."""
    stream = []
    for document in documents:
        stream += [tokenizer.eos_token_id] * bool(stream) + tokens_of(tokenizer, document)
    return stream


def adds_start(tokenizer):
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("length", [2, 3, 7, 64, 10_000])
def test_packing_loses_and_adds_nothing(tokenizer, length):
    documents = SENTENCES * 3
    sequences = list(pack_tokens(iter(documents), tokenizer, length))
    assert all(len(sequence) == length for sequence in sequences[:-1])
    assert 2 <= len(sequences[-1]) <= length
    head = [tokenizer.bos_token_id] if adds_start(tokenizer) else []
    bodies = [sequence[len(head) :] for sequence in sequences]
    assert all(sequence[: len(head)] == head for sequence in sequences)
    packed = [token for body in bodies for token in body]
    whole = stream_of(tokenizer, documents)
    assert packed == whole[: len(packed)]
    assert len(whole) - len(packed) < 2 - len(head)  # what is too short for a sequence


def test_one_start_token_a_sequence_and_none_where_the_tokenizer_adds_none(tokenizer):
    sequences = list(pack_tokens(SENTENCES * 5, tokenizer, 9))
    assert len(sequences) > 10
    starts = [sequence.count(tokenizer.bos_token_id) for sequence in sequences]
    assert set(starts) == ({1} if adds_start(tokenizer) else {0})


def test_start_tokens_written_in_the_text_do_not_double_the_first():
    tokenizer = build_tokenizer(adds_start=True)
    documents = ["<s><s>" + SENTENCES[0], "<s>", SENTENCES[1], "<s>" * 40]
    assert tokens_of(tokenizer, documents[0])[:2] == [tokenizer.bos_token_id] * 2
    for length in (2, 3, 8, 30):
        for sequence in pack_tokens(documents, tokenizer, length):
            assert sequence[0] == tokenizer.bos_token_id
            assert sequence[1] != tokenizer.bos_token_id


def test_start_and_end_may_be_the_same_token():
    tokenizer = build_tokenizer(adds_start=True, start="<|endoftext|>", end="<|endoftext|>")
    sequences = list(pack_tokens(SENTENCES * 4, tokenizer, 5))
    assert all(sequence[0] == tokenizer.bos_token_id != sequence[1] for sequence in sequences)
    assert sum(sequence[1:].count(tokenizer.eos_token_id) for sequence in sequences) > 5


def test_documents_are_joined_by_the_end_of_text_token_and_not_by_a_chat_models_end_of_turn():
    tokenizer = build_tokenizer(adds_start=False)
    end_of_text = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    (sequence,) = pack_tokens(["a", "b"], tokenizer, 10)
    assert sequence == [*tokens_of(tokenizer, "a"), end_of_text, *tokens_of(tokenizer, "b")]


@pytest.mark.parametrize("end", [None, "</s>"])
def test_the_separator_is_what_the_tokenizer_has(end):
    tokenizer = build_tokenizer(adds_start=False, end=end)
    (sequence,) = pack_tokens(["a", "", "b"], tokenizer, 10)
    separator = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    assert sequence == [*tokens_of(tokenizer, "a"), *separator, *tokens_of(tokenizer, "b")]


def test_a_tokenizer_that_truncates_and_pads_by_default_does_not_shorten_documents():
    tokenizer = build_tokenizer(adds_start=True)
    whole = list(pack_tokens(SENTENCES, tokenizer, 12))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert len(tokenizer.backend_tokenizer.encode(SENTENCES[0]).ids) == 50
    assert list(pack_tokens(SENTENCES, tokenizer, 12)) == whole


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_what_makes_fewer_than_two_tokens_makes_no_sequence(texts):
    assert list(pack_tokens(texts, build_tokenizer(adds_start=False), 4)) == []


def test_one_token_after_a_start_token_is_a_sequence():
    tokenizer = build_tokenizer(adds_start=True)
    assert list(pack_tokens(["a"], tokenizer, 4)) == [[tokenizer.bos_token_id, *tokens_of(tokenizer, "a")]]


def test_packing_holds_no_more_than_a_batch_of_documents(tokenizer):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield SENTENCES[taken % len(SENTENCES)]

    sequences = pack_tokens(endless(), tokenizer, 32)
    for _ in range(200):
        next(sequences)
    early = taken
    tracemalloc.start()
    for _ in range(6000):
        next(sequences)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert early < 1200
    assert taken > 10_000
    assert peak < 2**20  # measured: 0.5 MiB for a batch of 256 sentences; all that was read has 4 MiB of tokens


def test_batches_hold_whole_sequences_within_the_budget():
    generator = random.Random(0)
    sequences = [[0] * generator.randint(1, 40) for _ in range(200)]
    batches = list(token_batches(iter(sequences), 64))
    assert [sequence for batch in batches for sequence in batch] == sequences
    assert all(sum(map(len, batch)) <= 64 for batch in batches)
    for batch, following in itertools.pairwise(batches):
        assert sum(map(len, batch)) + len(following[0]) > 64
    assert list(token_batches([[1] * 9, [2] * 9], 1)) == [[[1] * 9], [[2] * 9]]
    assert list(token_batches([], 1)) == []


def test_a_length_or_budget_that_holds_nothing_is_refused(tokenizer):
    with pytest.raises(InputError, match="sequence of 1 tokens"):
        next(pack_tokens(SENTENCES, tokenizer, 1))
    with pytest.raises(InputError, match="budget of 0"):
        next(token_batches([[1]], 0))
