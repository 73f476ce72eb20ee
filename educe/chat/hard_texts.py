"""Texts on which two implementations of one tokenizer part, if they do: a table, code points in turn, and a mix from a fixed seed."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

from educe.seeds import derive

# fmt: off
SPACES = (
    *" \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2009\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff",
    *("  ", "   ", "       ", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\n\r", " \n", "\n ", "\t\t", " \t ", "\t \n", "\xa0 ", " \xa0"),
)
WORDS = (
    "Hello", "world", "the", " the", "THE", "tokenizer", "HTMLParser", "snake_case", "kebab-case", "x", "I", "naïve",
    "straße", "don't", "I'LL", "we'Ve", "you'D", "'S", "'s", "'RE", "'t", "it''s", "’s", "’ll", "′s", "ʼn", "'ſ", "'sx",
    "''", "o'clock", "0", "7", "12", "123", "1234", "1234567", "3.14", "1e-5", "1,000", "0x1F", "٣٤٥", "१२३", "๕๖", "½",
    "²", "①", "Ⅷ", "𝟙𝟚", "x=y;", "def f(a, *b):", "for(i=0;i<n;i++){", "return -1;", "#include <a.h>", "</tag>", "<|",
    "|>", "<", ">", "&amp;", "\\n", "$%^", "!!!", "...", "…", "--", "—", "=>", "->", "::", "//", "/*", "*/", "```", "\\",
    '"', "“q”", "«q»", "(a)", "[x]", "{}", "@#", "https://a.b/c?d=e%20f#g", "user@host.org", "C:\\dir", "#!/bin/sh",
    "~/x", "a.b.c", "1st", "2nd", "A4", "H₂O", "E=mc²", "Привет", "мир", "Ελληνικά", "עברית", "العربية", "ـــ", "فارسی",
    "हिन्दी", "বাংলা", "தமிழ்", "ไทย", "ລາວ", "မြန်မာ", "ខ្មែរ", "አማርኛ", "ქართული", "Հայերեն", "中文", "日本語",
    "カタカナ", "ひらがな", "한국어", "\u1112\u1161\u11ab", "བོད", "ᠮᠣᠩᠭᠣᠯ", "ᏣᎳᎩ", "𐍈𐌰", "𓀀", "𠀀𪚥", "，。！？", "\xe9",
    "e\u0301", "\xc5", "\u212b", "A\u030a", "\u1e69", "s\u0323\u0307", "s\u0307\u0323", "a\u0301\u0323\u0302", "ﬁ", "ﬃ",
    "İ", "ß", "\u0301", "x\u0301\u0301\u0301", "\u0f71\u0f72\u0f74", "\u05b0\u05bc", "\u0eba\u0301", "\u05c9\u0591",
    "ａｂｃ", "㍿", "\u3099か", "Ǆ", "🙂", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "1️⃣", "☺️", "❤", "☃", "♥️", "🫠",
    "\u200d", "\ufe0f", "\U000e0067", "\U0001f3fb", "\x00", "\x01\x02", "\x07", "\x1b[0m", "\x7f", "\x80", "\x9f", "\xad",
    "\u200e", "\u202e", "\ufffd", "\ufffe", "\uffff", "\ue000", "\uf8ff", "\U000f0000", "\U0010ffff", "\u0378",
    "\U0001fffe", "\U000e0001", "\u2066x\u2069", "Ã©", "â€™", "ï»¿", "\u0c5c", "\u0cdc", "▁", "▁▁", "Ġ", "Ċ", "<0x0A>",
    "<0xFF>", "##ing", "</w>", "<unk>", "<s>", "</s>", "[MASK]", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
    "<|eot_id|>", "<｜User｜>", "[INST]", "<think>", "</think>",
)
LONG = (
    *(c * n for c in "aA1 !\n\té中\u0301" for n in (7, 31, 33, 128, 130, 300, 1100)),
    *("ab" * 900, "don't " * 300, " \n" * 400, "1a" * 300, "a\u0301" * 300, "🙂" * 300, "supercalifragilistic" * 60, "x" * 20_000),
)
_SWEEP = (  # first code point, one past the last, step
    (0, 0x3400, 1), (0x3400, 0xA000, 31), (0xA000, 0xAC00, 1), (0xAC00, 0xD7A4, 31), (0xD7A4, 0xD800, 1), (0xE000, 0xF900, 31),
    (0xF900, 0x10000, 1), (0x10000, 0x14000, 3), (0x14000, 0x1AFF0, 31), (0x1AFF0, 0x20000, 3), (0x20000, 0x32400, 31),
    (0xE0000, 0xE0200, 31),
)
_PLACES = (  # of a control token {0}, with another {1}
    "{0}", "{0}a", "a{0}", "a{0}b", "a {0} b", "a  {0}\n\nb", "\t{0}\xa0", " {0}", "{0} ", "é{0}中", "_{0}9", "1{0}2", "<{0}>",
    "{0}'s", "{0}\u0301", "e{0}\u0301", "\r\n{0}\r\n", "{0}{0}", "{0}{1}", "{0} {1}", "{0}\n{1}", "x{0}{1}{0}y", "   {0}   {1}   ",
)
# fmt: on
_SEED = 20_240
_PER_TEXT = 64  # code points of a sweep in one text: long texts are encoded faster
_NUM_MIXED = 1_500
_MIXED_LONG_CHARS = (9_000, 40_000, 150_000)  # engines cut long texts into pieces for their threads
_NUM_CONTROL = (
    12  # so many control tokens, of the first and of the last, are put in every place; the others in one text each
)


def hard_texts(control: Sequence[str]) -> list[str]:
    """About 4,000 texts, the same on every call; `control` are the texts of the tokenizer's added tokens."""
    rng = random.Random(derive(_SEED, "hard texts"))
    some_control = [*control[:_NUM_CONTROL], *control[_NUM_CONTROL:][-_NUM_CONTROL:]]
    pieces = [*SPACES, *WORDS]
    texts = ["", *pieces, *LONG, *_sweep(), *(f"say {t}now" for t in control), *_with_control(some_control)]
    texts += [a + b + c for a in ("a", "1", ".", "") for b in SPACES for c in ("b", "2", "'s", "!", "")]
    texts += [_mix(rng, pieces, some_control, rng.choice((2, 3, 5, 8, 13, 30))) for _ in range(_NUM_MIXED)]
    texts += [_mix(rng, pieces, some_control, chars // 4)[:chars] for chars in _MIXED_LONG_CHARS]
    return texts


def _with_control(control: Sequence[str]) -> list[str]:
    """Control tokens at the start, at the end, with and without spaces around, two adjacent, cut short, in another case."""
    texts = []
    for i, t in enumerate(control):
        after = control[(i + 1) % len(control)]
        texts += [place.format(t, after) for place in _PLACES]
        texts += [t[:-1], t[1:], t.upper(), t[:1] + t]
    return texts


def _sweep() -> list[str]:
    """Code points among letters and digits: all of plane 0, one in 3 of plane 1, one in 31 of ideographs, Hangul and private use.

    The splits of a tokenizer depend on the Unicode class of a character, and libraries carry tables of different years.
    """
    chars = [chr(c) for first, end, step in _SWEEP for c in range(first, end, step)]
    marks = [c for c in chars if unicodedata.combining(c)]
    parts = [f"a{c}1{c}'s " for c in chars] + [f"e\u0301{c}\u0323{c} " for c in marks]
    return ["".join(parts[i : i + _PER_TEXT]) for i in range(0, len(parts), _PER_TEXT)]


def _mix(rng: random.Random, pieces: list[str], control: list[str], num: int) -> str:
    """`num` parts glued: pieces, cut pieces, runs of spaces, random code points, control tokens, bytes read as Latin-1 or UTF-8."""
    parts = []
    for _ in range(num):
        kind = rng.random()
        piece = pieces[int(rng.random() * len(pieces))]
        if kind < 0.5:
            parts.append(piece)
        elif kind < 0.6:
            parts.append(piece[int(rng.random() * len(piece)) :])
        elif kind < 0.75:
            parts.append(SPACES[int(rng.random() * len(SPACES))] * (1 + int(rng.random() ** 3 * 6)))
        elif kind < 0.9:
            parts.append(_character(rng))
        elif kind < 0.95 and control:
            parts.append(control[int(rng.random() * len(control))])
        else:
            raw = rng.getrandbits(64).to_bytes(8, "big")[: 1 + int(rng.random() * 8)]
            parts.append(raw.decode("latin-1") if kind < 0.98 else raw.decode("utf-8", "replace"))
    return "".join(parts)


def _character(rng: random.Random) -> str:
    """A code point, small ones more often; never a surrogate."""
    code = int(rng.random() ** 4 * 0x33000)
    return chr(code) if not 0xD800 <= code < 0xE000 else chr(code - 0x1000)
