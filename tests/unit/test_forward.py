"""Models whose code takes few arguments, returns no cache or other outputs, in all that rocr does with a model."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers

import rocr
from rocr import CollectOptions, Concept, EditConfig, InputError
from rocr.evaluation import EvaluateOptions, Probe, evaluate
from rocr.evaluation.lora_training import answer_nll
from rocr.evaluation.measures import TextSample, divergence, perplexity
from rocr.model.forward import accepts, forward, logits_of
from rocr.model.generate import ask
from rocr.statistics.self_generated import sample_sequences

pytestmark = pytest.mark.usefixtures("one_thread")
Llama = transformers.LlamaForCausalLM
PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born, and what did she write there?", "London", ("Paris", "Rome", "Oslo")),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh, and with what?", "the air", ("gold",), split="retain"),
]


class NoLogitsToKeep(Llama):
    """A signature that was common in remote code some years ago."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache)


class NoCache(Llama):
    """A model that takes only tokens and has no cache."""

    def forward(self, input_ids=None, attention_mask=None):
        return super().forward(input_ids, attention_mask, use_cache=False)


class CacheIgnored(Llama):
    """A model that takes any argument and never returns a cache."""

    def forward(self, input_ids=None, attention_mask=None, **_):
        output = super().forward(input_ids, attention_mask, use_cache=False)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=output.logits)


class Tuples(NoCache):
    def forward(self, input_ids=None, attention_mask=None):
        return (super().forward(input_ids, attention_mask).logits,)


class Mappings(NoCache):
    def forward(self, input_ids=None, attention_mask=None):
        return {"logits": super().forward(input_ids, attention_mask).logits}


OTHERS = [NoLogitsToKeep, NoCache, CacheIgnored, Tuples, Mappings]


@pytest.fixture(params=OTHERS, ids=lambda kind: kind.__name__)
def other(request, model):
    """The tiny Llama's weights in code of its own."""
    found = request.param(model.config).eval()
    found.load_state_dict(model.state_dict())
    return found


def test_it_writes_the_same_text(other, model, tokenizer):
    expected = sample_sequences(model, tokenizer, 120, seed=3)
    assert sample_sequences(other, tokenizer, 120, seed=3) == expected


@pytest.mark.parametrize("schedule", ["full", "predicted"])
def test_it_is_edited_without_text(schedule, other, model, tokenizer):
    concepts = [Concept("Ada Byron", "Blaise Pascal")]
    config = EditConfig(layers=(1, 2), token_schedule=schedule)
    made = []
    for edited in (other, copy.deepcopy(model)):
        statistics = rocr.collect_statistics(edited, tokenizer, None, [1, 2], CollectOptions(tokens=200))
        made.append(rocr.unlearn(edited, tokenizer, concepts, statistics, config))
    # For predictions, the model of transformers runs what prompts share once: other batches, other rounding.
    bound = 0.0 if schedule == "full" else 1e-4
    for one, expected in zip(made[0].updates, made[1].updates, strict=True):
        torch.testing.assert_close(one.factors.left, expected.factors.left, rtol=bound, atol=bound / 10)
        torch.testing.assert_close(one.factors.right, expected.factors.right, rtol=bound, atol=bound / 10)
    assert made[0].report.divergence == pytest.approx(made[1].report.divergence, rel=10 * bound, abs=0)


def test_it_is_evaluated(other, model, tokenizer, texts):
    options = EvaluateOptions(text=TextSample.take(texts, tokenizer, 64, 32))
    found, expected = (evaluate(m, tokenizer, PROBES, options=options) for m in (other, model))
    scores, wanted = ([item.score for item in evaluation.items] for evaluation in (found, expected))
    # The model of transformers runs what prompts share once: other batches, other rounding.
    assert scores == pytest.approx(wanted, rel=1e-4)
    assert found.measures["perplexity"] == pytest.approx(expected.measures["perplexity"], rel=1e-6)
    sample = options.text
    assert perplexity(other, sample) == found.measures["perplexity"]
    assert divergence(other, sample, nullcontext) == 0
    with torch.no_grad():
        nll, expected_nll = (float(answer_nll(m, [1, 2, 3], [4, 5])) for m in (other, model))
    assert nll == pytest.approx(expected_nll)


def test_it_is_asked(other, model, tokenizer):
    questions = ["Who is Ada Byron?", "Rain?"]
    expected = ask(model, tokenizer, questions, 6)
    assert ask(other, tokenizer, questions, 6) == expected and any(expected)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Rain?"}], tokenize=False, add_generation_prompt=True
    )
    first = int(model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax())
    for asked in (model, other):
        asked.generation_config.eos_token_id = [first, 1]
        stopped = ask(asked, tokenizer, ["Rain?"], 6)
        assert stopped == [tokenizer.decode([first]).strip()], "it ends at any of the end tokens"


class Raising(Llama):
    def forward(self, input_ids=None, attention_mask=None, **_):
        raise AttributeError("'DynamicCache' object has no attribute 'seen_tokens'")


def test_what_its_code_raises_becomes_a_sentence(model, tokenizer):
    raising = Raising(model.config)
    for call in (
        lambda: sample_sequences(raising, tokenizer, 8, 0),
        lambda: perplexity(raising, TextSample(torch.zeros(1, 4, dtype=torch.int64))),
        lambda: evaluate(raising, tokenizer, PROBES),
        lambda: ask(raising, tokenizer, ["Who?"]),
    ):
        with pytest.raises(InputError, match="The forward pass of Raising failed: AttributeError: 'DynamicCache'"):
            call()


def test_what_generation_raises_becomes_a_sentence(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: [][0])
    with pytest.raises(InputError, match=r"generate of LlamaForCausalLM failed: IndexError: .*--no-answers"):
        ask(model, tokenizer, ["Who?"])


def test_ids_beyond_the_embedding_become_a_sentence(model):
    with pytest.raises(InputError, match="forward pass of LlamaForCausalLM failed: IndexError"):
        forward(model, torch.tensor([[10**6]]))


@pytest.mark.parametrize("output", [(), {"loss": 1}, (torch.zeros(3),), None])
def test_an_output_without_logits_becomes_a_sentence(output):
    with pytest.raises(InputError, match="logits in a model's output failed"):
        logits_of(output)


def test_an_adapters_wrapper_takes_what_the_model_inside_takes(model):
    peft = pytest.importorskip("peft")
    inner = NoLogitsToKeep(model.config)
    wrapped = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"]))
    assert accepts(wrapped, "use_cache") and not accepts(wrapped, "logits_to_keep")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(logits_of(forward(wrapped, tokens, logits_to_keep=1)), inner(tokens).logits)
