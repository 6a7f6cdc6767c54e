"""Text to index terms as Lucene 8.11's English analysis makes them, which is what the official search index holds.

The chain: words by Unicode's rules for word boundaries (UAX #29, https://www.unicode.org/reports/tr29, as Lucene's
`StandardTokenizer` applies them), possessive 's off, lower case, 33 stop words out, Porter's stemmer with the author's
own later changes (https://tartarus.org/martin/PorterStemmer), which is NLTK's `MARTIN_EXTENSIONS`.

Word-break classes are those of the Unicode version that the package regex has, Lucene's are of Unicode 9; emoji are of
version 11 in both, because newer tables left out signs that product texts are full of, such as the star U+2605.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache

import regex

VERSION = 1
"""To be raised with every change of what terms come out: an index that was built before is then built again."""

LONGEST = 255
"""Characters of a token; what is longer is cut into pieces (`StandardTokenizer.MAX_TOKEN_LENGTH_DEFAULT`)."""

STOP_WORDS = {
    *("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of"),
    *(
        "on",
        "or",
        "such",
        "that",
        "the",
        "their",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "was",
        "will",
        "with",
    ),
}
"""Lucene's `EnglishAnalyzer.ENGLISH_STOP_WORDS_SET`."""

PICTOGRAPHS = (
    r"\xA9\xAE\u203C\u2049\u2122\u2139\u2194-\u2199\u21A9\u21AA\u231A\u231B\u2328\u2388\u23CF\u23E9-\u23F3"
    r"\u23F8-\u23FA\u24C2\u25AA\u25AB\u25B6\u25C0\u25FB-\u25FE\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705"
    r"\u2708-\u2712\u2714\u2716\u271D\u2721\u2728\u2733\u2734\u2744\u2747\u274C\u274E\u2753-\u2755\u2757\u2763-\u2767"
    r"\u2795-\u2797\u27A1\u27B0\u27BF\u2934\u2935\u2B05-\u2B07\u2B1B\u2B1C\u2B50\u2B55\u3030\u303D\u3297\u3299"
    r"\U0001F000-\U0001F0FF\U0001F10D-\U0001F10F\U0001F12F\U0001F16C-\U0001F171\U0001F17E\U0001F17F\U0001F18E"
    r"\U0001F191-\U0001F19A\U0001F1AD-\U0001F1E5\U0001F201-\U0001F20F\U0001F21A\U0001F22F\U0001F232-\U0001F23A"
    r"\U0001F23C-\U0001F23F\U0001F249-\U0001F3FA\U0001F400-\U0001F53D\U0001F546-\U0001F64F\U0001F680-\U0001F6FF"
    r"\U0001F774-\U0001F77F\U0001F7D5-\U0001F7FF\U0001F80C-\U0001F80F\U0001F848-\U0001F84F\U0001F85A-\U0001F85F"
    r"\U0001F888-\U0001F88F\U0001F8AE-\U0001F8FF\U0001F90C-\U0001F93A\U0001F93C-\U0001F945\U0001F947-\U0001FFFD"
)
"""Extended_Pictographic of https://unicode.org/Public/emoji/11.0/emoji-data.txt: each is a token."""

SKIN_TONES = r"\U0001F3FB-\U0001F3FF"


def _pattern() -> str:
    """A token: a word, an emoji, a run of a script without blanks (Thai, Lao, ...), or one Han or Hiragana sign."""
    marks = rf"[[\p{{WB=Extend}}\p{{WB=Format}}\p{{WB=ZWJ}}]--[{SKIN_TONES}]]"  # WB4: they go with what is before

    def one(*classes: str) -> str:
        inside = "".join(rf"\p{{WB={name}}}" for name in classes)
        return f"(?:[{inside}]{marks}*+)"

    letter, hebrew, katakana = one("ALetter", "Hebrew_Letter"), one("Hebrew_Letter"), one("Katakana")
    join, quote, quotes = one("ExtendNumLet"), one("Single_Quote"), one("Double_Quote")
    in_word, in_number = one("MidLetter", "MidNumLet", "Single_Quote"), one("MidNum", "MidNumLet", "Single_Quote")
    digit = rf"(?:[\p{{WB=Numeric}}\uFF10-\uFF19]{marks}*+)"
    letters = rf"{letter}(?:(?:{join}*+|{in_word}){letter})*+"  # WB5 to WB7
    after_hebrew = rf"(?:(?<=\p{{WB=Hebrew_Letter}}{marks}*)(?:{quotes}{hebrew}|{quote}))?+"  # WB7a to WB7c
    digits = rf"{digit}(?:(?:{join}*+|{in_number}){digit})*+"  # WB8, WB11, WB12
    part = rf"(?:{katakana}(?:{join}*+{katakana})*+|(?:{letters}{after_hebrew}|{digits})++)"  # WB9, WB10, WB13
    word = rf"{join}*+{part}(?:{join}++{part})*+{join}*+"  # WB13a, WB13b

    within = rf"[[{marks}]--[\uFE0E\uFE0F]]*+"
    toned = rf"(?:\p{{Emoji_Modifier_Base}}{within})?+[{SKIN_TONES}]{within}"
    emoji = rf"(?:{toned}|[{PICTOGRAPHS}]{within}\uFE0F?+)"
    emojis = rf"\u200D*+{emoji}(?:(?:(?<=\u200D)|\u200D++){emoji})*+(?:[\U000E0020-\U000E007E]++\U000E007F)?+"
    flag, keycap = rf"(?:\p{{WB=Regional_Indicator}}{marks}*+){{2}}", rf"[#*]{within}\uFE0F?+\u20E3{within}"
    unspaced, sign = rf"(?:\p{{LB=SA}}{marks}*+)++", rf"[\p{{Script=Han}}\p{{Script=Hiragana}}]{marks}*+"
    return "|".join((word, emojis, keycap, flag, unspaced, sign))


_TOKEN = regex.compile(_pattern(), regex.V1)

_PART = r"(?:[A-Za-z](?:[.:']?[A-Za-z])*|[0-9](?:[.,;']?[0-9])*)"
_ASCII_TOKEN = re.compile(rf"(?:_*{_PART})+_*")
"""The same where there is nothing but ASCII, ten times as fast."""
_BEYOND_ASCII = re.compile(r"[^\x00-\x7F]")


def tokens(text: str) -> list[str]:
    """The words of a text, as they stand in it."""
    found = _ASCII_TOKEN.findall(text) if text.isascii() else _mixed_tokens(text)
    if max(map(len, found), default=0) > LONGEST:
        return [piece for token in found for piece in _pieces(token)]
    return found


def _mixed_tokens(text: str) -> list[str]:
    """Tokens where only what stands between two blanks and is not ASCII is looked at the slow way."""
    found: list[str] = []
    at = 0
    for match in _BEYOND_ASCII.finditer(text):
        if match.start() >= at:
            start = text.rfind(" ", at, match.start()) + 1 or at
            end = text.find(" ", match.end())
            end = len(text) if end < 0 else end
            found += _ASCII_TOKEN.findall(text, at, start)
            found += _TOKEN.findall(text, start, end)
            at = end
    return found + _ASCII_TOKEN.findall(text, at)


def _pieces(token: str) -> Iterator[str]:
    at = 0
    while match := _TOKEN.search(token, at, at + LONGEST):
        yield match[0]
        at = match.end()


def term(token: str) -> str | None:
    """The index term of one word; None for a stop word."""
    if len(token) > 1 and token[-1] in "sS" and token[-2] in "'\u2019\uff07":
        token = token[:-2]
    token = token.lower() if token.isascii() else "".join(map(_lower, token))
    return None if token in STOP_WORDS else _stemmer()(token)


def _lower(character: str) -> str:
    """Java's `Character.toLowerCase`: one character for one, without regard to its neighbours."""
    return character.lower()[0]


@cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer  # takes seconds, and only those who analyse need it

    stem = PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS).stem
    return lambda word: str(stem(word, to_lowercase=False))


class _Terms(dict[str, str | None]):
    """Terms by their words, each worked out once."""

    def __missing__(self, token: str) -> str | None:
        if len(self) >= 1_000_000:  # numbers and the like have no end
            self.clear()
        self[token] = made = term(token)
        return made


_terms = _Terms()


def analyze(text: str) -> list[str]:
    """The index terms of a text, in order, with repeats.

    >>> analyze("The women's running shoes: 1,000 pairs")
    ['women', 'run', 'shoe', '1,000', 'pair']
    """
    return [found for found in map(_terms.__getitem__, tokens(text)) if found]
