"""Cut proposals out of a model's answers: names, spellings in a script, descriptions; or say why nothing fits."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rocr.concepts import folded
from rocr.io.spelling import hidden_characters

LATIN = "LATIN "
_IDEOGRAPHS = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC ITERATION MARK")
_HAN, _KANA, _HANGUL = _IDEOGRAPHS, (*_IDEOGRAPHS, "HIRAGANA", "KATAKANA"), ("HANGUL",)
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "Chinese": _HAN,
    "Japanese": _KANA,
    "Korean": _HANGUL,
    **dict.fromkeys(("Russian", "Ukrainian", "Bulgarian", "Serbian", "Kazakh"), ("CYRILLIC ",)),
    **dict.fromkeys(("Arabic", "Persian", "Urdu"), ("ARABIC ",)),
    **dict.fromkeys(("Hindi", "Marathi", "Nepali"), ("DEVANAGARI ",)),
    "Greek": ("GREEK ",),
    "Hebrew": ("HEBREW ",),
    "Amharic": ("ETHIOPIC ",),
    "Armenian": ("ARMENIAN ",),
    "Bengali": ("BENGALI ",),
    "Burmese": ("MYANMAR ",),
    "Georgian": ("GEORGIAN ",),
    "Gujarati": ("GUJARATI ",),
    "Kannada": ("KANNADA ",),
    "Khmer": ("KHMER ",),
    "Lao": ("LAO ",),
    "Malayalam": ("MALAYALAM ",),
    "Punjabi": ("GURMUKHI ",),
    "Sinhala": ("SINHALA ",),
    "Tamil": ("TAMIL ",),
    "Telugu": ("TELUGU ",),
    "Thai": ("THAI ",),
    **dict.fromkeys(
        ("Czech", "Dutch", "French", "German", "Indonesian", "Italian", "Polish", "Portuguese", "Spanish", "Swahili",
         "Swedish", "Turkish", "Vietnamese"),
        (LATIN,),
    ),
}  # fmt: skip
"""How the Unicode names of the letters of each language begin."""
SYLLABLES = (_HAN, _HANGUL)
"""Scripts with a character for each syllable or more."""
MAX_CHARACTERS_PER_LETTER, MAX_SYLLABLES_PER_LETTER = 2.0, 0.7
LEAST_LIMIT, MORE_WORDS, MAX_WORDS = 8, 2, 8
"""A spelling may have 8 characters, or as many as the constants above for each letter of the name, and two words more
than it. Names and the second half of descriptions have at most 8 words."""
LONGEST_OF_ONE_LETTER = 5
"""Largest number of letters of a name that is written as one letter of another script."""
SEVERAL, RELATED = 3, 5
"""Largest number of nicknames or descriptions, and of related things, that are cut out of one answer."""

_PLAIN_QUOTES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"'))
_QUOTES = re.compile(
    r'"([^"]+)"|«([^»]+)»|»([^«]+)«|「([^」]+)」|『([^』]+)』|《([^》]+)》|\*\*([^*]+)\*\*|(?<!\w)\'([^\']+)\'(?!\w)'
)
_SEPARATORS = "·・•=-'\u2027\uff1d\u2010\u05f3\u05f4"
"""Dots in the middle, hyphens, and what is written between or after letters of a name."""
_JOINERS = "\u200c\u200d"
_PARTICLES = frozenset(
    {
        "of", "the", "de", "da", "do", "dos", "del", "della", "di", "du", "des", "la", "le", "van", "von",
        "der", "den", "zu", "bin", "ibn", "al", "el", "y", "&",
    }
)  # fmt: skip
_SMALL_WORDS = _PARTICLES | {"and", "for", "in", "on", "to", "a", "an", "at", "with"}
"""Words that are not capitalised inside names, and those inside titles, which are quoted."""
_ARTICLES = frozenset(("the", "a", "an"))
_FUNCTION_WORDS = _ARTICLES | frozenset(
    {
        "i", "i'm", "he", "she", "it", "its", "his", "her", "their", "they", "we", "you", "your", "my", "yes", "no",
        "not", "sure", "sorry", "certainly", "of", "course", "as", "ai", "in", "on", "at", "to", "for", "from",
        "by", "with", "and", "or", "but", "if", "so", "this", "that", "these", "those", "there", "here", "who",
        "what", "which", "when", "where", "why", "how", "is", "are", "was", "were", "also", "another", "one",
        "some", "several", "many", "most", "other", "others", "known", "commonly", "often", "full", "name", "names",
        "nickname", "nicknames", "real", "answer", "called", "however", "unfortunately", "please", "note",
        "according", "best", "well", "born", "official", "officially",
    }
)  # fmt: skip
_ABBREVIATIONS = frozenset(
    {
        "jr", "sr", "dr", "mr", "mrs", "ms", "st", "inc", "co", "corp", "ltd",
    }
)  # fmt: skip
_REFUSALS = (
    "i'm sorry", "i am sorry", "sorry", "i cannot", "i can't", "i can not", "as an ai", "as a language model",
    "i do not know", "i don't", "i am not", "i'm not", "unfortunately", "there is no", "no information",
    "i am an ai", "i'm an ai", "i apologize",
)  # fmt: skip
_DESCRIPTION = re.compile(r"\b([Tt]he)((?: [^\W\d_][\w'-]*){1,5}?) of ([^.,;:!?()\[\]\"«»\n]+)")
_EXAMPLES = re.compile(r",?\s+(?:including|such as|like)\s+")
_ENDS = frozenset(
    {
        "and", "or", "who", "whom", "whose", "which", "that", "was", "is", "are", "were", "has", "had", "with",
        "by", "known", "since", "when", "where", "while", "because", "but", "also", "as", "for", "from", "best",
        "widely", "he", "she", "it's", "its", "one",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """What is cut out of an answer.

    Attributes:
        texts: The proposals, the first of the answer first.
        reason: Why there are none; empty if there are some.
    """

    texts: tuple[str, ...] = ()
    reason: str = ""


def cut_full_name(answer: str, name: str) -> Cut:
    """Cut out the first two or more capitalised words that share one with the name and are not the name itself."""
    cut = _cut_names(answer, name, RELATED, least_words=2, all_runs=True)
    words = set(folded(name).split())
    sharing = [text for text in cut.texts if words & set(folded(text).split())]
    return Cut(tuple(sharing[:1]), "" if sharing else cut.reason or f"shares no word with the name: {cut.texts[0]!r}")


def cut_nicknames(answer: str, name: str) -> Cut:
    """Cut out what is quoted, up to three; or else the first capitalised words that are not the name itself."""
    return _cut_names(answer, name, SEVERAL)


def cut_related(answer: str, name: str) -> Cut:
    """Cut out up to five titles or names that do not hold the name: those that are quoted, or else capitalised words.

    An article at the beginning of a title stays.
    """
    return _cut_names(answer, name, RELATED, all_runs=True, keeps_articles=True, without_name=True)


def cut_spelling(answer: str, name: str, language: str) -> Cut:
    """Cut out the first words in the letters of a language, those after a colon if there are some.

    Of a language in Latin letters these are the first capitalised words.

    Args:
        answer: The answer of the model.
        name: The name.
        language: One of `SCRIPTS`.
    """
    answer, script = answer.translate(_PLAIN_QUOTES), SCRIPTS[language]
    if script == (LATIN,):
        return _cut_names(answer, name, 1)
    found = _runs_of_script(answer.rpartition(":")[2], script) or _runs_of_script(answer, script)
    if not found:
        refused = " (the model refuses)" if _is_refusal(answer) else ""
        return Cut(reason=f"no letters of {language}{refused}: {_start(answer)}")
    quoted = [part for part in _quoted(answer) if part in _runs_of_script(part, script)]
    best = (*quoted, *found)[0]
    letters = sum(character.isalpha() for character in name)
    share = MAX_SYLLABLES_PER_LETTER if script in SYLLABLES else MAX_CHARACTERS_PER_LETTER
    count = sum(unicodedata.category(character)[0] == "L" for character in best)
    if count > max(LEAST_LIMIT, share * letters) or len(best.split()) > len(name.split()) + MORE_WORDS:
        return Cut(reason=f"a sentence, not a name: {_start(best)}")
    if count < 2 and letters > LONGEST_OF_ONE_LETTER:
        return Cut(reason=f"one letter for a whole name: {_start(answer)}")
    return _checked([best], name, "")


def cut_descriptions(answer: str, name: str) -> Cut:
    """Cut out up to three phrases "the ... of ..." with a capitalised word or a number after "of".

    A phrase ends at punctuation, at a word such as "who" or "and", or after eight words. It must not hold the name.
    Of "the author of many novels, including It" it is "the author of It".
    """
    answer = answer.translate(_PLAIN_QUOTES)
    if _is_refusal(answer):
        return Cut(reason=f"the model refuses: {_start(answer)}")
    found, reason = [], f'no phrase "the ... of ...": {_start(answer)}'
    for phrase in _DESCRIPTION.finditer(answer):
        what, *examples = _EXAMPLES.split(phrase[3] + answer[phrase.end() :], maxsplit=1)
        words = _object(what if len(what) <= len(phrase[3]) else phrase[3])
        if examples and len(what) <= len(phrase[3]) and not _names_something(words):
            quoted = (part for part in _quoted(examples[0]) if _is_title(part))
            example = next(quoted, None) or next(_capitalised_runs(examples[0]), "")
            words = example.split()
        text = f"the{phrase[2]} of {' '.join(words)}"
        if not _names_something(words):
            reason = f"names nothing in particular: {_start(text)}"
        elif _holds(text, name):
            reason = f"holds the name itself: {_start(text)}"
        else:
            found.append(text)
    return _checked(list(dict.fromkeys(found))[:SEVERAL], name, reason)


def _object(text: str) -> list[str]:
    """Return the words after "of" in a description, up to its end."""
    words: list[str] = []
    for word in text.split()[:MAX_WORDS]:
        if word.lower() in _ENDS:
            break
        words.append(word.removesuffix("'s").strip("'*"))
    while words and words[-1].lower() in _SMALL_WORDS:
        words.pop()
    return words


def _names_something(words: Sequence[str]) -> bool:
    """Return whether one of some words is capitalised or begins with a digit."""
    return any(word[:1].isupper() or word[:1].isdigit() for word in words)


def _is_refusal(answer: str) -> bool:
    """Return whether an answer begins as the refusals of chat models do."""
    start = answer.strip().lower()
    return any(start.startswith(words) for words in _REFUSALS)


def _cut_names(
    answer: str,
    name: str,
    most: int,
    least_words: int = 1,
    all_runs: bool = False,
    keeps_articles: bool = False,
    without_name: bool = False,
) -> Cut:
    """Cut names out of an answer: those that are quoted, or else the first run of capitalised words, or all runs."""
    answer = answer.translate(_PLAIN_QUOTES)
    if _is_refusal(answer):
        return Cut(reason=f"the model refuses: {_start(answer)}")
    reason = f"no other capitalised words: {_start(answer)}"

    def fits(text: str) -> bool:
        nonlocal reason
        if _is_part(text, name):
            reason = "the name itself or a part of it"
        elif without_name and _holds(text, name):
            reason = f"holds the name itself: {_start(text)}"
        elif least_words <= len(text.split()) <= MAX_WORDS and len(text) > 1:
            return True
        return False

    def names_of(parts: Iterable[str], left_out: frozenset[str]) -> list[str]:
        begun = (_without_first(part.split(), left_out - _ARTICLES if keeps_articles else left_out) for part in parts)
        return [text for text in dict.fromkeys(begun) if text and fits(text)]

    quoted = names_of((part for part in _quoted(answer) if _is_title(part)), _ARTICLES)
    runs = [] if quoted else names_of(_capitalised_runs(answer), _FUNCTION_WORDS)
    return _checked((quoted or (runs if all_runs else runs[:1]))[:most], name, reason)


def _checked(texts: Sequence[str], name: str, reason: str) -> Cut:
    """Return the texts that can be names on a list, or a reason."""
    kept = [text for text in texts if folded(text) != folded(name)]
    if texts and not kept:
        reason = "the name itself or a part of it"
    hidden = [text for text in kept if any(hidden_characters(text))]
    kept = [text for text in kept if text not in hidden]
    if hidden and not kept:
        reason = f"has invisible characters: {_start(hidden[0])}"
    return Cut(tuple(kept), "" if kept else reason)


def _is_part(text: str, name: str) -> bool:
    """Return whether the words of a text follow each other in a name, as those of the name itself do."""
    words, whole = folded(text).split(), folded(name).split()
    return any(whole[i : i + len(words)] == words for i in range(len(whole) - len(words) + 1))


def _holds(text: str, name: str) -> bool:
    """Return whether all words of a name follow each other in a text."""
    return _is_part(name, re.sub(r"[^\w\s.'-]|'s\b", " ", text))


def _quoted(text: str) -> Iterator[str]:
    """Yield what is between quotation marks, or set in bold type, without punctuation at its end."""
    for found in _QUOTES.finditer(text):
        part = next(group for group in found.groups() if group is not None)
        yield part.strip().rstrip(",.;:!?").strip()


def _is_title(text: str) -> bool:
    """Return whether all words of a text are capitalised, numbers or small ones of names."""
    words = text.split()
    return bool(words) and all(
        word[:1].isupper() or word[:1].isdigit() or (i and word in _SMALL_WORDS) for i, word in enumerate(words)
    )


def _capitalised_runs(text: str) -> Iterator[str]:
    """Yield the capitalised words of a text that follow each other, with small words such as "of" between them."""
    run: list[str] = []

    def ended() -> Iterator[str]:
        words = list(run)
        run.clear()
        while words and words[-1] in _PARTICLES:
            words.pop()
        if words:
            yield " ".join(words)

    for word in text.split():
        inner = word.lstrip("(\"'«[*_#")
        if inner != word:
            yield from ended()
        bare = inner.rstrip(")\"'»],;:!?*_…") if not _is_abbreviation(inner) else inner
        if not _is_abbreviation(bare):
            bare = bare.rstrip(".)\"'»],;:!?*_…")
        possessive = bare.removesuffix("'s")
        if possessive[:1].isupper() or (run and possessive in _PARTICLES):
            run.append(possessive)
        else:
            yield from ended()
        if possessive != inner:
            yield from ended()
    yield from ended()


def _is_abbreviation(word: str) -> bool:
    """Return whether a full stop belongs to a word: initials such as "J." and "J.K.", or "Jr."."""
    letters = word.removesuffix(".").split(".")
    return word.endswith(".") and (all(len(part) == 1 for part in letters) or word[:-1].lower() in _ABBREVIATIONS)


def _without_first(words: Sequence[str], left_out: frozenset[str]) -> str:
    """Return words as text, without those at the beginning that are to be left out, and articles alone."""
    plain = [word.lower().strip(".,") for word in words]
    first = next((i for i, word in enumerate(plain) if word not in left_out), len(plain))
    return " ".join(words[first:]) if not set(plain[first:]) <= _ARTICLES else ""


def _runs_of_script(text: str, script: tuple[str, ...]) -> list[str]:
    """Return the words of a text in the letters of a script that follow each other with one separator between them.

    A separator is a space, a dot in the middle, a hyphen or an apostrophe; a full stop and a space after initials.
    """
    runs, run = [], ""
    for i, character in enumerate(text):
        if _is_letter_of(character, script) or (run and _continues(run, character, text[i + 1 : i + 2], script)):
            run += character
        elif run:
            runs.append(run)
            run = ""
    runs.append(run)
    trimmed = (run.strip(f" .{_SEPARATORS}{_JOINERS}") for run in runs)
    return [run for run in trimmed if run]


def _is_letter_of(character: str, script: tuple[str, ...]) -> bool:
    """Return whether a character is a letter or a mark of a script."""
    return unicodedata.name(character, "").startswith(script) and unicodedata.category(character)[0] in "LM"


def _continues(run: str, character: str, after: str, script: tuple[str, ...]) -> bool:
    """Return whether a character that is no letter of a script belongs to a name in it, as a mark or a separator."""
    if unicodedata.category(character)[0] == "M" or character in _JOINERS:
        return True
    follows = bool(after) and _is_letter_of(after, script)
    if character == "." and len(re.split(r"[\s.]", run)[-1]) <= 2:
        return follows or after == " "
    return follows and (character == " " or character in _SEPARATORS)


def _start(text: str) -> str:
    """Quote the beginning of a text, in one line."""
    text = " ".join(text.split())
    return "an empty answer" if not text else repr(text if len(text) <= 60 else f"{text[:57]}...")
