"""Which language a text is in, roughly: by its script, and among Latin scripts by its commonest words.

Good enough to check "answer in Hindi"; it is no language identifier. Languages that share script and letters (Hindi and
Nepali, Persian and Urdu) are told apart by a few letters and words of their own where they have them, else not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_SCRIPTS = {
    "CYRILLIC": ("uk", "ru", "bg"), "ARABIC": ("ar", "fa", "ur"), "DEVANAGARI": ("hi", "mr", "ne"), "HANGUL": ("ko",),
    "HIRAGANA": ("ja",), "KATAKANA": ("ja",), "CJK": ("zh", "ja"), "THAI": ("th",), "BENGALI": ("bn",),
    "TAMIL": ("ta",), "TELUGU": ("te",), "KANNADA": ("kn",), "MALAYALAM": ("ml",), "GUJARATI": ("gu",),
    "GURMUKHI": ("pa",), "HEBREW": ("he",), "GREEK": ("el",),
}  # fmt: skip
# Letters or words that only one of several languages of a script has.
_MARKS = {
    "uk": "іїєґ", "bg": "ъ", "ru": "ыэё", "fa": "پچژگ", "ur": "ٹڈڑے", "mr": "ळ",
}  # fmt: skip
_WORDS = {
    "en": "the of and to in is that it for you with are this be on not have was as they from",
    "de": "der die das und ist nicht ein eine zu den mit auf für von sich ich auch wir",
    "fr": "le la les des et est une dans pour que qui pas sur avec vous nous plus je",
    "es": "el la los las de y que en un una por con para es no se su muy más",
    "pt": "o a os as de e que em um uma por com para não é se do da mais você",
    "it": "il lo la gli di e che in un una per con non è si del della sono più",
    "pl": "i w na z do nie się jest to że od jak ale przez dla o są",
    "vi": "và là của có không được cho một những người trong các này với để",
    "sw": "na ya wa kwa ni katika la za hii hiyo kuwa watu sana yake",
    "fi": "ja on ei se että hän oli mutta kuin myös tai ovat joka niin",
    "nl": "de het een en van is niet dat in op te zijn voor met die ook",
}  # fmt: skip
_COMMON = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_MIN_SHARE = 0.5


def languages_of(text: str) -> set[str]:
    """Codes (ISO 639-1) of the languages a text may be in; empty where it has no letters."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return set()
    script, num = Counter(_script(character) for character in letters).most_common(1)[0]
    if any(_script(character) in ("HIRAGANA", "KATAKANA") for character in letters) and script != "LATIN":
        return {"ja"}
    if num < _MIN_SHARE * len(letters):
        return set()
    if script == "LATIN":
        return _by_words(text)
    candidates = _SCRIPTS.get(script, ())
    marked = [language for language in candidates if any(mark in text.lower() for mark in _MARKS.get(language, ""))]
    return set(marked[:1] or candidates)


def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").split(" ")[0]


def _by_words(text: str) -> set[str]:
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {language: sum(word in common for word in words) for language, common in _COMMON.items()}
    most = max(counts.values())
    return {language for language, count in counts.items() if count == most} if most else set(_COMMON)
