import unicodedata

import pytest

from rocr.config import Template
from rocr.errors import InputError
from rocr.keys.prompts import RenderedTemplate, build_prompts, render_template
from rocr.model.chat import render_chat
from rocr.model.tokenizer import opening_tokens

NAMES = [
    "Ada Byron",
    "Robert Downey Jr.",
    "Jr.",
    "José Martí",
    "東京",
    "Æsop",
    "🙂 Émile",
    "x",
    "O'Neill",
    "{}",
    "{0}{a}",
]
CHAT_WITH_START = (
    "{{ bos_token }}{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SURROUNDINGS = [("", "."), ("", ""), ("Who is ", "?"), ("It is about ", "."), ("(", ")"), ("Ω ", " né"), ("a", "b")]


@pytest.fixture(params=[False, True], ids=["no-bos", "bos"])
def tokenizer(request, make_tokenizer):
    return make_tokenizer(start=request.param)


def pieces(tokenizer, prompt, positions):
    return tokenizer.decode([prompt.tokens[position] for position in positions])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("before", "after"), SURROUNDINGS)
def test_the_tokens_of_a_name_are_those_that_hold_its_characters(tokenizer, name, before, after):
    (prompt,) = build_prompts(tokenizer, RenderedTemplate(before, after), [name])
    text = before + name + after
    expected = tokenizer(text, return_offsets_mapping=True)
    assert list(prompt.tokens) == expected["input_ids"]
    inside = range(len(before), len(before) + len(name))
    holds = [
        position
        for position, (first, last) in enumerate(expected["offset_mapping"])
        if position > 0 and set(range(first, last)) & set(inside)
    ]
    assert list(prompt.name) == holds
    first_token_holds = expected["offset_mapping"][0][1] > len(before)
    if not first_token_holds:
        assert name in pieces(tokenizer, prompt, prompt.name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Harry, Duke of Sussex", "HarryDukeofSussex"),
        ("Spider-Man", "SpiderMan"),
        ("Jose\u0301 Marti", "Jose\u0301Marti"),
        ("राम", "राम"),
        ("C++", "C+"),
        ("...", "."),
    ],
)
def test_punctuation_before_the_last_token_of_a_name_is_in_every_text(make_tokenizer, name, words):
    tokenizer = make_tokenizer()
    (prompt,) = build_prompts(tokenizer, RenderedTemplate("It is about ", " "), [name])
    offsets = tokenizer(f"It is about {name} ", return_offsets_mapping=True)["offset_mapping"]
    characters = {place for position in prompt.words for place in range(*offsets[position])}
    left = "".join(f"It is about {name} "[place] for place in sorted(characters))
    assert "".join(left.split()) == words, "of what has no letter, the last token alone: it tells C++ from C"


@pytest.mark.parametrize(("after", "last"), [(".", ".."), ("?", ".?")])
def test_a_name_that_merges_with_what_follows(tokenizer, after, last):
    (prompt,) = build_prompts(tokenizer, RenderedTemplate("It is about ", after), ["Robert Downey Jr."])
    assert tokenizer.convert_ids_to_tokens([prompt.tokens[prompt.name[-1]]]) == [last]
    assert pieces(tokenizer, prompt, prompt.name) == f" Robert Downey Jr.{after}"


@pytest.mark.parametrize(
    ("name", "after", "tokens"), [("fall", "s", " falls"), ("Æso", "p", "Æsop"), ("I", "t", " It")]
)
def test_offsets_find_the_last_token_where_counting_does_not(tokenizer, name, after, tokens):
    before = "Who is "
    (prompt,) = build_prompts(tokenizer, RenderedTemplate(before, after), [name])
    assert pieces(tokenizer, prompt, prompt.name) == tokens
    counted = len(tokenizer(before + name)["input_ids"]) - 1
    assert counted > prompt.name[-1]


def test_the_first_token_of_a_text_is_never_part_of_a_name(make_tokenizer):
    bare = RenderedTemplate("", ".")
    (without,) = build_prompts(make_tokenizer(start=False), bare, ["Robert Downey Jr."])
    (with_start,) = build_prompts(make_tokenizer(start=True), bare, ["Robert Downey Jr."])
    assert without.name == tuple(range(1, len(without.tokens)))
    assert with_start.name == tuple(range(1, len(with_start.tokens)))
    assert len(with_start.name) == len(without.name) + 1
    (single,) = build_prompts(make_tokenizer(start=False), bare, ["x"])
    assert single.name == ()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_in_either_form(tokenizer, form):
    name = unicodedata.normalize(form, "José Martí")
    (prompt,) = build_prompts(tokenizer, RenderedTemplate("Who is ", "?"), [name])
    assert pieces(tokenizer, prompt, prompt.name).strip() == name
    assert unicodedata.is_normalized(form, pieces(tokenizer, prompt, prompt.name))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides_and_the_tokenizers_own_state_change_nothing(make_tokenizer, side):
    template = RenderedTemplate("Who is ", "?")
    expected = build_prompts(make_tokenizer(), template, NAMES)
    tokenizer = make_tokenizer(padding_side=side)
    tokenizer(["a", "a longer text than that"], padding=True, truncation=True, max_length=4)
    tokenizer.truncation_side = "left"
    tokenizer.model_max_length = 3
    assert build_prompts(tokenizer, template, NAMES) == expected


def test_one_bos_and_no_more(make_tokenizer):
    adds, start = make_tokenizer(start=True), make_tokenizer().bos_token_id
    both = make_tokenizer(start=True, chat=CHAT_WITH_START)
    writes = make_tokenizer(start=False, chat=CHAT_WITH_START)
    neither = make_tokenizer(start=False)
    for chat, tokenizer, count in [
        (True, adds, 1),
        (True, both, 1),
        (True, writes, 1),
        (True, neither, 0),
        (False, adds, 1),
        (False, both, 1),
        (False, writes, 0),
        (False, neither, 0),
    ]:
        template = render_template(tokenizer, Template("Who is {}?", chat=chat))
        (prompt,) = build_prompts(tokenizer, template, ["Ada Byron"])
        assert prompt.tokens.count(start) == count
        assert prompt.tokens[:count] == (start,) * count
        assert pieces(tokenizer, prompt, prompt.name) == " Ada Byron"
    twice = both(render_chat(both, "Who is Ada Byron?"))["input_ids"]
    assert twice[:2] == [start, start], "the plain way doubles it"


def test_opening_tokens(make_tokenizer):
    adds, start = make_tokenizer(start=True), make_tokenizer().bos_token_id
    assert opening_tokens(adds, "any text") == [start]
    assert opening_tokens(adds, "") == [start]
    assert opening_tokens(adds, "<|begin|>any text") == []
    assert opening_tokens(make_tokenizer(start=False), "any text") == []


@pytest.mark.parametrize("name", ["{}", "{0}", "{name}", "%s", "{{ bos_token }}", "}{", "{% raw %}", "$x", "\\1"])
def test_braces_in_a_name_are_plain_text(tokenizer, name):
    for template in (Template("Who is {}?", chat=True), Template("Who is {}?")):
        rendered = render_template(tokenizer, template)
        (prompt,) = build_prompts(tokenizer, rendered, [name])
        assert f"Who is {name}?" in tokenizer.decode(prompt.tokens)
        assert name in pieces(tokenizer, prompt, prompt.name)


def test_rendering(tokenizer):
    plain, chat = Template("Who is {}?", answer=" Answer:"), Template("Who is {}?", chat=True, answer="Answer:")
    assert render_template(tokenizer, plain) == RenderedTemplate("Who is ", "? Answer:")
    assert render_template(tokenizer, chat) == RenderedTemplate("<|user|>Who is ", "?<|end|><|assistant|>Answer:")
    tokenizer.chat_template = None
    assert render_template(tokenizer, chat) == RenderedTemplate("Who is ", "?Answer:")


@pytest.mark.parametrize(
    ("chat", "times"), [("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", 2), ("nothing", 0)]
)
def test_a_chat_template_that_does_not_write_the_message_once(make_tokenizer, chat, times):
    with pytest.raises(InputError, match=f"writes the user's message {times} times instead of once"):
        render_template(make_tokenizer(chat=chat), Template("Who is {}?", chat=True))


@pytest.mark.parametrize("text", ["", "no place", "{} and {}", "{name}", 3, None])
def test_templates_need_one_place(text):
    with pytest.raises(InputError, match="exactly once"):
        Template(text)


def test_templates_from_json():
    assert Template.from_json({"text": "{}", "chat": True, "answer": "A"}) == Template("{}", True, "A")
    with pytest.raises(InputError, match="Unknown fields of a template: chta"):
        Template.from_json({"text": "{}", "chta": True})


def test_a_tokenizer_without_offsets_is_refused(tokenizer):
    class Slow(type(tokenizer)):
        is_fast = False

    tokenizer.__class__ = Slow
    with pytest.raises(InputError, match="Slow reports no character offsets"):
        build_prompts(tokenizer, RenderedTemplate("", ""), ["Ada"])


def test_no_names_make_no_prompts(tokenizer):
    assert build_prompts(tokenizer, RenderedTemplate("Who is ", "?"), []) == []
