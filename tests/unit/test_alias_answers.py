"""What is cut out of a model's answers as a name, a spelling or a description, and what is refused with a reason."""

import unicodedata

import pytest

from rocr.edit.alias_answers import (
    LATIN,
    SCRIPTS,
    Cut,
    cut_descriptions,
    cut_full_name,
    cut_nicknames,
    cut_related,
    cut_spelling,
)
from rocr.edit.alias_examples import listed_names
from rocr.edit.aliases import LANGUAGES

NAME = "Stephen King"
ITSELF = "the name itself or a part of it"


def assert_cut(found, expected):
    """`expected` is a tuple of texts, or a part of the reason why there are none."""
    if isinstance(expected, tuple):
        assert found == Cut(expected)
    else:
        assert found.texts == () and expected in found.reason and "\n" not in found.reason


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Stephen Edwin King", ("Stephen Edwin King",)),
        ("The full name of Stephen King is Stephen Edwin King.", ("Stephen Edwin King",)),
        ("Stephen King's full name is Stephen Edwin King, Jr. He was born in Maine.", ("Stephen Edwin King",)),
        ("Full Name: Stephen R. R. Tolkien.", ("Stephen R. R. Tolkien",)),
        ("Certainly!\nHis full name:\n\n**Stephen Edwin King**\n", ("Stephen Edwin King",)),
        ("It is \u201cStephen Edwin King\u201d.", ("Stephen Edwin King",)),
        ("Stephen van Beethoven and others", ("Stephen van Beethoven",)),
        ("The Maine Woods know Stephen Downey Jr. as an actor", ("Stephen Downey Jr.",)),
        ("He is Richard Bachman of Castle Rock.", "shares no word with the name: 'Richard Bachman of Castle Rock'"),
        ("", "no other capitalised words: an empty answer"),
        ("\n \n", "no other capitalised words: an empty answer"),
        ("Stephen King", ITSELF),
        ("STEPHEN  KING.", ITSELF),
        ("King", ITSELF),
        ("His name is not known to me.", "no other capitalised words: 'His name"),
        ("The American author", "no other capitalised words"),
        ("an American author of horror", "no other capitalised words"),
        ("I'm sorry, but I cannot tell Private Names.", "the model refuses: \"I'm sorry"),
        ("I\u2019m sorry, but Stephen Edwin King asked me not to.", "the model refuses"),
        ("As an AI language model, I know no Full Names of Living People.", "the model refuses"),
        ("斯蒂芬·金", "no other capitalised words"),
        ("A B C D E F G H I J", "no other capitalised words"),
    ],
)
def test_full_names(answer, expected):
    assert_cut(cut_full_name(answer, NAME), expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('Stephen King is called the "King of Horror".', ("King of Horror",)),
        (
            'The "King of Horror", "The Master of Suspense" and "Steve".',
            ("King of Horror", "Master of Suspense", "Steve"),
        ),
        ('"Aa", "Bb", "Cc" and "Dd"', ("Aa", "Bb", "Cc")),
        ('"Steve", "Steve" or "Steve"', ("Steve",)),
        ("His nickname is 'Uncle Stevie' among readers' groups.", ("Uncle Stevie",)),
        ("Er heißt »Steve« oder «Stevie»", ("Steve", "Stevie")),
        ("Stephen King is nicknamed Steve in Maine.", ("Steve",)),
        ('The nickname of "Stephen King" is Steve.', ("Steve",)),
        ('He said "this is no nickname" to Richard Bachman.', ("Richard Bachman",)),
        ("1. Steve 2. Stevie", ("Steve",)),
        ("He has no nickname.", "no other capitalised words"),
        ('His nickname is "King".', ITSELF),
        ("X", "no other capitalised words"),
        ("Unfortunately, Steve is not known", "the model refuses"),
    ],
)
def test_nicknames(answer, expected):
    assert_cut(cut_nicknames(answer, NAME), expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Shining, Carrie, Misery, and The Dark Tower.", ("The Shining", "Carrie", "Misery", "The Dark Tower")),
        ('He wrote "It", "The Shining" and "1984".', ("It", "The Shining", "1984")),
        ("1. The Shining 2. Carrie", ("The Shining", "Carrie")),
        ("- **The Stand** (1978)\n- **Misery** (1987)", ("The Stand", "Misery")),
        ('"A1", "A2", "A3", "A4", "A5", "A6"', ("A1", "A2", "A3", "A4", "A5")),
        ("《闪灵》 and 《The Stand》", ("The Stand",)),
        ('"The World of Stephen King"', "holds the name itself: 'The World of Stephen King'"),
        ("Stephen King", ITSELF),
        ("He is best known for his novels.", "no other capitalised words"),
        ("Sorry, The Shining is not allowed", "the model refuses"),
    ],
)
def test_related_things(answer, expected):
    assert_cut(cut_related(answer, NAME), expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("the author of It", ("the author of It",)),
        ("The author of The Shining.", ("the author of The Shining",)),
        ("Stephen King is the American author of Carrie and Misery.", ("the American author of Carrie",)),
        ("He is the author of It, the maker of Rain, the king of Maine, the son of Ruth.",
         ("the author of It", "the maker of Rain", "the king of Maine")),
        ('"The author of It"', ("the author of It",)),
        ("the winner of 1984 who lives in Maine", ("the winner of 1984",)),
        ("the author of the Dark Tower series", ("the author of the Dark Tower series",)),
        ("the author of A b c d e f g h i j", ("the author of A b c d e f g h",)),
        ('King is the author of many popular novels, including "The Shining," "The Stand," and "It."',
         ("the author of The Shining",)),
        ("the author of novels such as Carrie and Misery", ("the author of Carrie",)),
        ("the author of Carrie, including Misery", ("the author of Carrie",)),
        ("the author of novels. He likes books such as Carrie", "names nothing in particular"),
        ("the author of many novels, including some", "names nothing in particular"),
        ("the author of many books", "names nothing in particular: 'the author of many books'"),
        ("the author of which It is one", "names nothing in particular"),
        ("the full name of Stephen King", "holds the name itself: 'the full name of Stephen King'"),
        ("the father of Stephen King's children", "holds the name itself"),
        ("an author of It", 'no phrase "the ... of ..."'),
        ("the author", 'no phrase "the ... of ..."'),
        ("", 'no phrase "the ... of ...": an empty answer'),
        ("I cannot name the author of It", "the model refuses"),
    ],
)  # fmt: skip
def test_descriptions(answer, expected):
    assert_cut(cut_descriptions(answer, NAME), expected)


@pytest.mark.parametrize(
    ("language", "answer", "expected"),
    [
        ("Chinese", "斯蒂芬·金", ("斯蒂芬·金",)),
        ("Chinese", "斯蒂芬·金 (Sīdìfēn Jīn)", ("斯蒂芬·金",)),
        ("Chinese", "Stephen King 的中文名是\u201c斯蒂芬·金\u201d。", ("斯蒂芬·金",)),
        ("Chinese", "斯蒂芬·金\n\n斯蒂芬金", ("斯蒂芬·金",)),
        ("Chinese", "斯蒂芬·金在中文里是这样写的", "a sentence, not a name: '斯蒂芬·金在"),
        ("Chinese", "스티븐 킹", "no letters of Chinese: '스티븐 킹'"),
        ("Russian", 'It is "\u041cicrosoft".', "one letter for a whole name"),
        ("Chinese", "", "no letters of Chinese: an empty answer"),
        ("Japanese", "スティーヴン・キング。", ("スティーヴン・キング",)),
        ("Japanese", "「スティーヴン・キング」", ("スティーヴン・キング",)),
        ("Korean", "스티븐 킹 (Stephen King)", ("스티븐 킹",)),
        ("Russian", "Стивен Кинг.", ("Стивен Кинг",)),
        ("Russian", "Стивен Кинг - американский писатель", ("Стивен Кинг",)),
        ("Russian", "Дж. Д. Сэлинджер", ("Дж. Д. Сэлинджер",)),
        ("Russian", "«Стивен Кинг»", ("Стивен Кинг",)),
        ("Russian", "Стивен Кинг это американский писатель", "a sentence, not a name"),
        ("Arabic", "ستيفن كينغ", ("ستيفن كينغ",)),
        ("Arabic", "بالعربية: ستيفن كينغ", ("ستيفن كينغ",)),
        ("Hindi", "स्टीफ़न किंग", ("स्टीफ़न किंग",)),
        ("Greek", "Στίβεν Κινγκ!", ("Στίβεν Κινγκ",)),
        ("Hebrew", "סטיבן קינג", ("סטיבן קינג",)),
        ("Hebrew", "Stephen King", "no letters of Hebrew: 'Stephen King'"),
        ("Hebrew", "I'm sorry, I can't.", "no letters of Hebrew (the model refuses)"),
        ("Thai", "สตีเฟน คิง", ("สตีเฟน คิง",)),
        ("Spanish", "Esteban Rey", ("Esteban Rey",)),
        ("Spanish", "Stephen King", ITSELF),
    ],
)
def test_spellings(language, answer, expected):
    assert_cut(cut_spelling(answer, NAME, language), expected)


def test_a_short_name_may_be_one_letter():
    assert_cut(cut_spelling("金", "King", "Chinese"), ("金",))


def test_a_name_in_its_own_script_is_the_name_itself():
    assert_cut(cut_spelling("東京", "東京", "Japanese"), ITSELF)


def test_joiners_inside_a_word_stay_and_others_are_left_out():
    for language, before, joiner, after, expected in (
        ("Persian", "\u0639\u0644\u06cc", "\u200c", "\u0631\u0636\u0627", None),
        ("Hindi", "\u0915\u094d", "\u200d", "\u0937", None),
        ("Hebrew", "\u200f", "", "סטיבן קינג\u200f", ("סטיבן קינג",)),
        ("Russian", "Сти", "\u200c", "вен", "has invisible characters"),
    ):
        answer = before + joiner + after
        assert_cut(cut_spelling(answer, NAME, language), expected or (answer,))


def test_the_letters_of_every_language_are_known_to_unicode():
    names = [unicodedata.name(chr(code), "") for code in range(0x30000)]
    for language, script in SCRIPTS.items():
        assert any(name.startswith(script) for name in names), language
        if script != (LATIN,):
            assert not any(name.startswith(script) for name in map(unicodedata.name, NAME))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_list_has_examples_in_the_letters_of_its_language_but_not_of_the_name_itself(language):
    text = listed_names("Ada Byron", language)
    first, *examples, last = text.split("\n")
    assert (first, last, len(examples)) == (f"Names in {language}:", "Ada Byron =", 2)
    for line in examples:
        name, _, spelling = line.partition(" = ")
        assert cut_spelling(spelling, name, language).texts == (spelling,)
    assert listed_names("ALBERT EINSTEIN", language).count("\n") == 2
    assert listed_names("Ada Byron", "Swedish") is None
