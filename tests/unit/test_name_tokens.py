"""The tokens of a name with several kinds of tokenizers, compared with the text of each token."""

# ruff: noqa: RUF001
from types import SimpleNamespace

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rocr import Concept, EditConfig, InputError
from rocr.config import Template
from rocr.edit.guards import predict
from rocr.evaluation.scoring import tokenize_questions
from rocr.keys.plan import plan_keys
from rocr.keys.prompts import RenderedTemplate, build_prompts, render_template
from rocr.model.chat import render_chats
from rocr.model.generate import ask
from rocr.model.tokenizer import token_texts
from rocr.statistics.corpus import pack_tokens
from rocr.statistics.self_generated import sample_sequences

TEXTS = ["Who is Ada Byron? Tell me about a gardener.", "This text is about rain.", "What is known?"] * 20
CHAT = "{% for m in messages %}<|user|>\n{{ m['content'] }}<|end|>{% endfor %}"
ROLES = [AddedToken(role, rstrip=True, normalized=False) for role in ("<|user|>", "<|end|>")]
CYRILLIC = "Ђорђе"
CYRILLIC_BYTES = [f"<0x{byte:02X}>" for byte in CYRILLIC.encode()]


def sentence_piece():
    """As Phi-3's: a space mark before a text and before each word, bytes for what is unknown, roles that eat space."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=380, special_tokens=special))
    raw.add_special_tokens(ROLES)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(raw, bos_token="<s>", eos_token="</s>")


def metaspace():
    """As newer SentencePiece conversions: the space mark is a pre-tokenizer's."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=380, special_tokens=special))
    raw.add_special_tokens(ROLES)
    return wrapped(raw, bos_token="<s>", eos_token="</s>")


def byte_level(prefix=True, trim=False):
    """Bytes as letters, with a space before a text, and without a decoder, which has to be guessed then."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    raw.add_special_tokens(ROLES)
    return wrapped(raw, bos_token="<s>", eos_token="</s>")


def wrapped(raw, **tokens):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHAT, **tokens)


def pieces(tokenizer, prompt, positions):
    return [tokenizer.convert_ids_to_tokens(prompt.tokens[i]) for i in positions]


def prompt_of(tokenizer, name, before="<|user|>\n", after="<|end|>"):
    return build_prompts(tokenizer, RenderedTemplate(before, after), [name])[0]


@pytest.mark.parametrize("make", [sentence_piece, metaspace])
def test_a_lone_space_mark_before_a_name_is_no_part_of_it(make):
    tokenizer = make()
    prompt = prompt_of(tokenizer, CYRILLIC)
    assert "▁" in tokenizer.convert_ids_to_tokens(prompt.tokens), "or there is nothing to see"
    assert pieces(tokenizer, prompt, prompt.name) == pieces(tokenizer, prompt, prompt.words) == CYRILLIC_BYTES
    config = EditConfig(templates=(Template("{}", chat=True),))
    plan = plan_keys(tokenizer, [Concept(CYRILLIC, "a gardener")], config)
    read = zip(plan.keys.prompt_of, plan.keys.position_of, strict=True)
    keys = {tokenizer.convert_ids_to_tokens(plan.keys.prompts[p].tokens[i]) for p, i in read}
    assert keys == set(CYRILLIC_BYTES)
    latin = prompt_of(tokenizer, "Ada Byron")
    assert "".join(pieces(tokenizer, latin, latin.words)).replace("▁", "") == "AdaByron"


@pytest.mark.parametrize("trim", [False, True])
def test_a_lone_space_of_bytes_is_no_key(trim):
    tokenizer = byte_level(trim=trim)
    for name in (CYRILLIC, f"Ada {CYRILLIC}"):
        prompt = prompt_of(tokenizer, name)
        assert "Ġ" in tokenizer.convert_ids_to_tokens(prompt.tokens)
        keys = pieces(tokenizer, prompt, prompt.words)
        assert "Ġ" not in keys
        bytes_of_letters = len(name.replace(" ", "").encode())
        assert len("".join(keys).replace("Ġ", "")) == bytes_of_letters, "a character of a token stands for a byte"
    assert token_texts(tokenizer)(tokenizer.convert_tokens_to_ids("Ġ")) == " "


JOINED = ["علی\u200cرضا", "ശ്രീ\u200dകുമാർ", "葛\U000e0100城", "葛\U000e0100"]


@pytest.mark.parametrize("name", JOINED, ids=ascii)
@pytest.mark.parametrize("make", [sentence_piece, byte_level])
def test_joiners_and_selectors_are_read_but_no_keys(make, name):
    tokenizer = make()
    offsets = tokenizer(f"It is {name}.", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    (prompt,) = build_prompts(tokenizer, RenderedTemplate("It is ", "."), [name])
    opening = len(prompt.tokens) - len(offsets)
    text = f"It is {name}."
    words = {text[slice(*offsets[i - opening])].strip() for i in prompt.words}
    assert not {part for part in words if part in "\u200c\u200d\U000e0100"}
    letters = {c for c in name if c not in "\u200c\u200d\U000e0100"}
    assert set("".join(words)) >= letters, "every letter's bytes are keys"
    last = text[slice(*offsets[prompt.name[-1] - opening])]
    assert last == name.rstrip("\U000e0100")[-1], "the state is read at the last letter, not at a selector behind it"


def test_the_own_text_of_tokens():
    for tokenizer in (sentence_piece(), metaspace()):
        own = token_texts(tokenizer)
        texts = {piece: own(tokenizer.convert_tokens_to_ids(piece)) for piece in ("▁", "<0xD0>", "<0x41>", "<0x20>")}
        assert texts == {"▁": " ", "<0xD0>": "\ufffd", "<0x41>": "A", "<0x20>": " "}
    own, ids = token_texts(byte_level()), byte_level(prefix=False)("é né\u200c", add_special_tokens=False)["input_ids"]
    assert "".join(own(i) for i in ids).replace("\ufffd", "") == " n"
    assert own(10**6) == "\ufffd", "an id without a token says nothing of its own"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [sentence_piece, metaspace, byte_level])
def test_tokens_of_a_name_do_not_depend_on_padding_or_on_the_names_beside_it(make, side):
    tokenizer = make()
    tokenizer.pad_token, tokenizer.padding_side = "</s>", side
    rendered = render_template(tokenizer, Template("Who is {}?", chat=True))
    names = [CYRILLIC, "Ada Byron", CYRILLIC, "user", *JOINED]
    together = build_prompts(tokenizer, rendered, names)
    for name, prompt in zip(names, together, strict=True):
        (alone,) = build_prompts(tokenizer, rendered, [name])
        assert (alone.tokens, alone.name, alone.words) == (prompt.tokens, prompt.name, prompt.words)
    assert together[0] is together[2], "a name that stands there twice is read once"
    assert len({prompt.tokens[: prompt.shared] for prompt in together}) == 1


class Failing:
    """A tokenizer whose calls raise, after some that do not."""

    is_fast, bos_token_id, eos_token_id, chat_template = True, None, 0, None

    def __init__(self, calls=0):
        self.calls = calls

    def __call__(self, text, **_):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("the regex failed\nat great length")
        return {"input_ids": [1] if isinstance(text, str) else [[1] for _ in text]}

    def convert_tokens_to_ids(self, text):
        return None


@pytest.mark.parametrize(
    "call",
    [
        lambda t: build_prompts(t, RenderedTemplate("", ""), ["Ada"]),
        lambda t: list(pack_tokens(["Ada"], t, 8)),
        lambda t: tokenize_questions(t, ["Ada?"], [["yes"]]),
        lambda t: predict(SimpleNamespace(model=None, predicts_text=True), t),
        lambda t: ask(None, t, ["Who?"]),
        lambda t: sample_sequences(None, t, 8, 0),
    ],
)
def test_what_a_tokenizer_raises_becomes_a_sentence(call):
    with pytest.raises(InputError, match=r"^The tokenizer \(Failing\) failed: RuntimeError: the regex failed\.$"):
        call(Failing())


def test_half_of_a_surrogate_pair_becomes_a_sentence_of_the_tokenizers():
    with pytest.raises(InputError, match=r"tokenizer .* failed"):
        build_prompts(byte_level(), RenderedTemplate("", ""), ["\udce9"])


def test_a_tokenizer_without_an_attribute_for_chats_reads_plain_text():
    tokenizer = byte_level()
    bare = SimpleNamespace(is_fast=True)
    assert render_chats(bare, ["Who?"]) == ["Who?"]
    assert render_template(bare, Template("Who is {}?", chat=True)) == RenderedTemplate("Who is ", "?")
    assert render_chats(tokenizer, ["Who?"]) == ["<|user|>\nWho?<|end|>"]
