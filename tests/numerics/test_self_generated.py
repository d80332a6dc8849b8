import pytest
import torch

from rocr.statistics.self_generated import SEQUENCES, sample_sequences

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_seed_decides_the_text(model, tokenizer):
    first = sample_sequences(model, tokenizer, 300, seed=7)
    torch.manual_seed(99)
    assert sample_sequences(model, tokenizer, 300, seed=7) == first
    assert sample_sequences(model, tokenizer, 300, seed=8) != first


def test_global_random_state_is_untouched(family, make_model, tokenizer):
    model = make_model(family).train()
    before = torch.get_rng_state()
    first = sample_sequences(model, tokenizer, 100, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample_sequences(model, tokenizer, 100, seed=0) == first, "no dropout either"
    assert all(module.training for module in model.modules())


def test_tokens_are_drawn_from_the_models_own_distribution(model, tokenizer):
    tokenizer.chat_template, template = None, tokenizer.chat_template
    try:
        sequences = torch.tensor(sample_sequences(model, tokenizer, SEQUENCES * 40, seed=0))
    finally:
        tokenizer.chat_template = template
    with torch.no_grad():
        logits = model(sequences[:, :-1]).logits.double()
    drawn = logits.log_softmax(-1).gather(2, sequences[:, 1:, None]).squeeze(2)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    surprise = (-drawn - entropy).mean() / ((-drawn - entropy).std() / drawn.numel() ** 0.5)
    assert abs(surprise) < 4, "mean surprise is the entropy, within four standard errors"
    greedy = sequences[:, 1:] == logits.argmax(-1)
    assert greedy.double().mean() < 0.9, "temperature 1, not the likeliest token"


@pytest.mark.parametrize("tokens", [1, 2, 99, 1000])
def test_counts(model, tokenizer, tokens):
    sequences = sample_sequences(model, tokenizer, tokens, seed=0)
    starts = {tuple(sequence[:1]) for sequence in sequences}
    assert starts == {(tokenizer.bos_token_id,), (tokenizer.convert_tokens_to_ids("<|user|>"),)}
    written = sum(len(sequence) - 1 for sequence in sequences)
    assert tokens <= written < tokens + 2 * SEQUENCES


def test_starts(make_tokenizer, model):
    for start in (False, True):
        tokenizer = make_tokenizer(start=start, chat=None)
        sequences = sample_sequences(model, tokenizer, 10, seed=0)
        assert {sequence[0] for sequence in sequences} == {tokenizer.bos_token_id}
        assert len(sequences) == 10
    chat = sample_sequences(model, make_tokenizer(start=True), 10, seed=0)
    assert [sequence[:2] for sequence in chat[5:]] == [[0, tokenizer.convert_tokens_to_ids("<|user|>")]] * 5


def test_a_chat_template_that_writes_the_message_alone(make_tokenizer, model):
    tokenizer = make_tokenizer(chat="{{ messages[0]['content'] }}")
    sequences = sample_sequences(model, tokenizer, 10, seed=0)
    assert {sequence[0] for sequence in sequences} == {tokenizer.bos_token_id}


def test_no_text_is_longer_than_the_model_has_positions(make_model, tokenizer):
    model = make_model("GPT-2", n_positions=16)
    sequences = sample_sequences(model, tokenizer, SEQUENCES * 40, seed=0)
    assert {len(sequence) for sequence in sequences} == {16}
    assert sum(len(sequence) - 1 for sequence in sequences) >= SEQUENCES * 40


def test_progress_reaches_the_end(model, tokenizer):
    steps = []
    sample_sequences(model, tokenizer, 500, seed=0, progress=steps.append)
    assert steps[-1].done == steps[-1].total == 500
    assert [step.done for step in steps] == sorted(step.done for step in steps)
