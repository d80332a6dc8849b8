"""Names in other scripts as the continuation of a list of examples, which small models write better than answers."""

from __future__ import annotations

from collections.abc import Mapping

from rocr.concepts import folded

EXAMPLES: Mapping[str, Mapping[str, str]] = {
    "Chinese": {"Albert Einstein": "阿尔伯特·爱因斯坦", "William Shakespeare": "威廉·莎士比亚"},
    "Japanese": {
        "Albert Einstein": "アルベルト・アインシュタイン",
        "William Shakespeare": "ウィリアム・シェイクスピア",
    },
    "Korean": {"Albert Einstein": "알베르트 아인슈타인", "William Shakespeare": "윌리엄 셰익스피어"},
    "Russian": {"Albert Einstein": "Альберт Эйнштейн", "William Shakespeare": "Уильям Шекспир"},
    "Arabic": {"Albert Einstein": "ألبرت أينشتاين", "William Shakespeare": "ويليام شكسبير"},
    "Hindi": {"Albert Einstein": "अल्बर्ट आइंस्टीन", "William Shakespeare": "विलियम शेक्सपियर"},
    "Greek": {"Albert Einstein": "Άλμπερτ Αϊνστάιν", "William Shakespeare": "Ουίλλιαμ Σαίξπηρ"},
    "Hebrew": {"Albert Einstein": "אלברט איינשטיין", "William Shakespeare": "ויליאם שייקספיר"},
}
"""Two names in each of the languages that are asked for by default."""


def listed_names(name: str, language: str) -> str | None:
    """Return a text that ends where a name would follow in a language; None if the language has no examples.

    Args:
        name: The name. An example of the same name is left out.
        language: A language, such as "Chinese".
    """
    if language not in EXAMPLES:
        return None
    examples = [f"{key} = {value}" for key, value in EXAMPLES[language].items() if folded(key) != folded(name)]
    return "\n".join([f"Names in {language}:", *examples, f"{name} ="])
