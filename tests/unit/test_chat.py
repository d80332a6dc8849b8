"""Chat templates: those that raise, read the clock or change their arguments, and chat settings."""

import datetime
import json
import random

import pytest
import transformers.utils.chat_template_utils as rendering

import rocr
from rocr import ChatSettings, InputError
from rocr.chat_settings import CLOCK_DATE
from rocr.config import Template
from rocr.keys.prompts import build_prompts, render_template
from rocr.model.chat import _codes, find_chat_format, render_chat, with_date

BODY = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
RAISING = {
    "a system message": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system message comes first.') }}{% endif %}",
        "TemplateError: A system message comes first",
        ChatSettings(system="You are terse."),
        "<|user|>You are terse.<|end|><|user|>Hello<|end|>",
    ),
    "documents": (
        "{% for d in documents %}{{ d.text }}{% endfor %}",
        "TypeError: 'NoneType' object is not iterable",
        ChatSettings(variables={"documents": [{"text": "Rain."}]}),
        "Rain.<|user|>Hello<|end|>",
    ),
    "a variable": (
        "{{ region | upper + region.code }}",
        "UndefinedError: ",
        ChatSettings(variables={"region": {"code": "EU"}}),
        None,
    ),
    "a language that is known": (
        "{% if lang not in ['en', 'de'] %}{{ raise_exception('lang must be en or de') }}{% endif %}",
        "TemplateError: lang must be en or de",
        ChatSettings(variables={"lang": "de"}),
        "<|user|>Hello<|end|>",
    ),
    "another syntax": ("{% if %}", "TemplateSyntaxError: ", None, None),
}


@pytest.mark.parametrize("kind", RAISING)
def test_what_a_template_raises_becomes_a_sentence_with_a_way_round(make_tokenizer, kind):
    head, reason, settings, text = RAISING[kind]
    tokenizer = make_tokenizer(chat=head + BODY)
    for call in (
        lambda: render_chat(tokenizer, "Hello"),
        lambda: render_template(tokenizer, Template("Who is {}?", chat=True)),
    ):
        with pytest.raises(InputError, match="The tokenizer's chat template failed") as caught:
            call()
        for part in (reason, "--system TEXT", "--template-variable NAME=VALUE", "--template TEXT", "--no-chat"):
            assert part in str(caught.value)
    if text is not None:
        assert render_chat(tokenizer, "Hello", settings) == text
    without = ChatSettings(enabled=False)
    assert render_chat(tokenizer, "Hello", without) == "Hello"
    rendered = render_template(tokenizer, Template("<|user|>{}<|end|>", chat=True), without)
    assert rendered.to_json() == {"before": "<|user|>", "after": "<|end|>"}


@pytest.mark.parametrize(
    "chat",
    [
        "{% for m in messages %}{% for p in m['content'] %}<|user|>{{ p['text'] }}<|end|>{% endfor %}{% endfor %}",
        "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('a list') }}{% endif %}"
        "<|user|>{{ m['content'][0]['text'] }}<|end|>{% endfor %}",
    ],
    ids=["loops over parts", "refuses a text"],
)
def test_content_is_a_list_of_parts_where_a_template_wants_one(make_tokenizer, chat):
    tokenizer = make_tokenizer(chat=chat)
    assert render_chat(tokenizer, "Hello") == "<|user|>Hello<|end|>"
    settings = ChatSettings(system="Be kind.")
    assert render_chat(tokenizer, "Hello", settings) == "<|user|>Be kind.<|end|><|user|>Hello<|end|>"
    (prompt,) = build_prompts(tokenizer, render_template(tokenizer, Template("Who is {}?", chat=True)), ["O'Neill"])
    assert tokenizer.decode([prompt.tokens[i] for i in prompt.name]).strip(" ?") == "O'Neill"


CLOCKS = {
    "strftime_now": ("Today: {{ strftime_now('%d %b %Y') }}.\n" + BODY, "Today: 26 Jul 2024.\n"),
    "if defined": (
        "{% if strftime_now is defined %}{% set day = strftime_now('%Y-%m-%d') %}{% else %}{% set day = 'x' %}"
        "{% endif %}{{ day }}|" + BODY,
        "2024-07-26|",
    ),
    "in a macro": (
        "{% macro today(form) %}{{ strftime_now(form) | upper }}{% endmacro %}{{ today('%A, %B %e') }}|" + BODY,
        "FRIDAY, JULY 26|",
    ),
    "by its name": ("{% set year = strftime_now(format='%Y') | int %}{{ year - 1 }}|" + BODY, "2023|"),
    "date_string": ("{{ date_string }}|" + BODY, "26 Jul 2024|"),
    "date_string or the clock": (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}|" + BODY,
        "26 Jul 2024|",
    ),
    "white space first": ("\n  {% if true %}{{ strftime_now('%y') }}{% endif %}" + BODY, "\n24"),
}


@pytest.mark.parametrize("drawn", ["{{ range(100000) | random }}", "{{ lipsum() }}"])
def test_what_a_template_draws_at_random_is_the_same_in_every_run(make_tokenizer, drawn):
    tokenizer = make_tokenizer(chat=drawn + BODY)
    found = []
    for seed in (1, 2):
        random.seed(seed)
        state = random.getstate()
        found.append(render_chat(tokenizer, "Hello"))
        assert random.getstate() == state
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", CLOCKS)
def test_a_template_is_told_one_day_on_all_days(make_tokenizer, monkeypatch, kind):
    chat, written = CLOCKS[kind]
    tokenizer = make_tokenizer(chat=chat)
    found = []
    for day in (3, 14):
        clock = type("Clock", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None, d=day: cls(2026, 5, d))})
        monkeypatch.setattr(rendering, "datetime", clock)
        rendering._compile_jinja_template.cache_clear()
        found.append(render_chat(tokenizer, "Hello"))
    rendering._compile_jinja_template.cache_clear()
    assert found == [written + "<|user|>Hello<|end|>"] * 2
    other = render_chat(tokenizer, "Hello", ChatSettings(date="2031-01-02"))
    assert other != found[0] and "Hello" in other


@pytest.mark.parametrize("day", ["2024-07-26", "2023-01-01", "2024-12-31", "1999-03-07", "2020-02-29"])
def test_the_pinned_clock_writes_what_strftime_writes_at_midnight(day):
    today = datetime.date.fromisoformat(day)
    midnight = datetime.datetime.combine(today, datetime.time())
    for code, text in _codes(today).items():
        if code.startswith("%") and code not in ("%%", "%n", "%t"):
            assert text == midnight.strftime(code), code


def test_codes_and_percent_signs_side_by_side(make_tokenizer):
    tokenizer = make_tokenizer(chat="{{ strftime_now('100%% of %%d on %-d/%m: %F %H:%M%z') }}" + BODY)
    assert render_chat(tokenizer, "").startswith("100% of %d on 26/07: 2024-07-26 00:00<|user|>")


@pytest.mark.parametrize(
    ("chat", "settings", "part"),
    [
        (BODY, ChatSettings(variables={"lang": "de"}), "does not use the variable 'lang'"),
        (BODY, ChatSettings(date="2024-01-01"), "does not use a date"),
        ("{{ messages[-1]['content'] }}", ChatSettings(system="Be kind."), "does not write a system message"),
        (None, ChatSettings(system="Be kind."), "has no chat template: leave out system"),
    ],
)
def test_a_setting_without_effect_is_refused(make_tokenizer, chat, settings, part):
    with pytest.raises(InputError, match=part):
        find_chat_format(make_tokenizer(chat=chat), settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"system": "\udce9"},
        {"system": " "},
        {"system": "a" * 10_001},
        {"system": 3},
        {"variables": {"messages": []}},
        {"variables": {"tokenize": True}},
        {"variables": {"a b": 1}},
        {"variables": {"a": "\udce9"}},
        {"variables": {"a": float("nan")}},
        {"variables": {"a": "b" * 10_001}},
        {"variables": {"a": object()}},
        {"variables": "a=b"},
        {"date": "26.07.2024"},
        {"date": "2024-02-30"},
        {"date": 20240726},
        {"enabled": 1},
        {"enabled": False, "system": "x"},
    ],
)
def test_settings_that_no_template_can_be_given(wrong):
    with pytest.raises(InputError):
        ChatSettings(**wrong)


def test_settings_come_back_from_json_and_stay_out_of_files_that_need_none():
    settings = ChatSettings("Be kind.", {"enable_thinking": False, "documents": []}, "2025-01-01")
    config = rocr.EditConfig(chat=settings)
    assert rocr.EditConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    off = rocr.EditConfig(chat=ChatSettings(enabled=False))
    assert rocr.EditConfig.from_json(off.to_json()) == off
    assert "chat" not in rocr.EditConfig().to_json()
    for wrong in ({"sytem": "x"}, {"system": 3}, {"enabled": "no"}):
        with pytest.raises(InputError):
            rocr.EditConfig.from_json({"chat": wrong})
    with pytest.raises(InputError, match="chat must be ChatSettings"):
        rocr.EditConfig(chat="x")


def test_the_date_is_written_down_where_a_template_reads_it(make_tokenizer):
    assert with_date(ChatSettings(), make_tokenizer(chat=CLOCKS["strftime_now"][0])).date == CLOCK_DATE
    assert with_date(ChatSettings(), make_tokenizer()) == ChatSettings()
    given = ChatSettings(date="2031-01-02")
    assert with_date(given, make_tokenizer(chat=CLOCKS["date_string"][0])) == given


def test_tokenizers_with_several_templates_and_with_none(make_tokenizer):
    tokenizer = make_tokenizer(chat={"default": CLOCKS["strftime_now"][0], "tool_use": "x"})
    assert render_chat(tokenizer, "Hello") == "Today: 26 Jul 2024.\n<|user|>Hello<|end|>"
    with pytest.raises(InputError, match="choice of a chat template failed"):
        render_chat(make_tokenizer(chat={"one": BODY, "two": BODY}), "Hello")
    assert render_chat(object(), "Hello") == "Hello", "no such attribute at all"


def test_a_template_that_writes_without_bound_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(chat="{% for i in range(2000) %}" + "x" * 600 + "{% endfor %}" + BODY)
    with pytest.raises(InputError, match=r"writes 1,2\d\d,\d\d\d characters for a message of"):
        render_chat(tokenizer, "Hello")


NAMES = ["Ada Byron", "O'Neill & Søn", "ada", "STRASSE 7", "a", "gardener", "user", "I", "Ωmega", "x{}y", "東京"]
CHANGING = {
    "upper": ("{{ m['content'] | upper }}", str.upper),
    "lower": ("{{ m['content'] | lower }}", str.lower),
    "title": ("{{ m['content'] | title }}", None),
    "capitalize": ("{{ m['content'] | capitalize }}", None),
    "trim": ("{{ m['content'] | trim }}", str),
    "escape": ("{{ m['content'] | e }}", lambda name: name.replace("&", "&amp;").replace("'", "&#39;")),
    "counts": ("{{ m['content'] | length }} letters: {{ m['content'] }}", str),
    "strips private use": ("{{ m['content'] | replace('\ue000', '') }}", str),
    "says it in a list": ("{{ [m['content']] }}", str),
}


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("context", ["{}", "Who is {}?", "tell me about {}s.", "a {} a"])
def test_a_name_is_read_as_the_chat_template_writes_it(make_tokenizer, kind, context):
    write, change = CHANGING[kind]
    chat = "{% for m in messages %}<|user|>" + write + "<|end|>{% endfor %}<|assistant|>"
    tokenizer = make_tokenizer(chat=chat)
    rendered = render_template(tokenizer, Template(context, chat=True, answer="Answer:"))
    for name in NAMES:
        before, as_read, after = rendered.around(name)
        message = [{"role": "user", "content": context.replace("{}", name)}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) + "Answer:"
        assert before + as_read + after == text
        assert before.startswith("<|user|>") and after.endswith("<|end|><|assistant|>Answer:")
        if change is None:
            assert as_read.casefold() == name.casefold()
        else:
            assert as_read == change(name)
    (prompt,) = build_prompts(tokenizer, rendered, ["Ada Byron"])
    assert tokenizer.decode([prompt.tokens[i] for i in prompt.name]).strip(" s.?'").casefold().endswith("byron")


@pytest.mark.parametrize(
    ("chat", "name"),
    [
        ("{{ messages[0]['content'] | replace('Ada Byron', '') }}", "Ada Byron"),
        ("{{ messages[0]['content'] | length }}{{ messages[0]['content'] | replace('e', '3') }}", "Peter Weiße"),
    ],
)
def test_a_name_that_cannot_be_found_again_is_refused(make_tokenizer, chat, name):
    rendered = render_template(make_tokenizer(chat=chat), Template("{}.", chat=True))
    with pytest.raises(
        InputError,
        match=f"The name '{name}' is not found in the text that the tokenizer's chat template renders.*--no-chat",
    ):
        build_prompts(make_tokenizer(chat=chat), rendered, ["Bill", name])


def test_a_system_message_and_a_variable_reach_the_contexts(make_tokenizer):
    chat = "{% if quiet %}<|quiet|>{% endif %}" + BODY
    settings = ChatSettings(system="Be kind.", variables={"quiet": True})
    rendered = render_template(make_tokenizer(chat=chat), Template("Who is {}?", chat=True), settings)
    assert rendered.before == "<|quiet|><|user|>Be kind.<|end|><|user|>Who is "
