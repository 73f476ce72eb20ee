"""Words, sentences and languages as IFEval's own program counts them: with nltk and langdetect, but without data to download.

nltk's sentence splitter (Punkt, Kiss & Strunk 2006) is used with the table below in place of the model that nltk downloads, and
langdetect with a seed: the same text gets the same verdict on every machine.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from educe.errors import MachineError

# What a full stop does not end: titles, units of writing, months, days, ranks, American states' short names.
_ABBREVIATIONS = """
a.d a.m adm al approx apr aug ave b.c blvd bros c.e capt cf co col corp ct d.c dec dept dr e.g ed eds eq est etc feb fig fri ft
gen gov hon i.e inc jan jr jul jun lt ltd m.d maj messrs mon mr mrs ms mt nov oct p.m ph.d prof rep rev sat sen sept sgt sr st sun
thurs tues u.k u.n u.s u.s.a vol vs wed
""".split()  # noqa: SIM905
# Words that are written small unless they begin a sentence: after an abbreviation or an initial, a capital says that one begins.
_SMALL = """
a about after again all also although always an and another any are as ask at avoid be because before both but by can check choose
consider could did do does don't during each either enjoy even every finally find first for from get give go had has have he he's
her here here's his how however i if i'm in instead is it its it's keep last later let let's make many maybe me meanwhile more
most my next no not now of often on once one only or other our out over perhaps please remember second see several she she's
should since so some sometimes soon still stay such take than thank that that's the their them then there there's therefore these
they they're third this those though through thus to today together too try two under unfortunately until up use very was we we're
well were what what's when where whether which while who why will with without would yes yet you your you're
""".split()  # noqa: SIM905


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    return len(_splitter().tokenize(text))


def count_capital_words(text: str) -> int:
    """Words without a small letter. A hyphenated word is one, a contraction is two."""
    split = _word_splitter()
    return sum(word.isupper() for sentence in _splitter().tokenize(text) for word in split.tokenize(sentence))


def language_of(text: str) -> str | None:
    """The most likely language (ISO 639-1); None for a text without any letters to go by."""
    detector = _languages().create()
    detector.append(text)
    from langdetect.lang_detect_exception import LangDetectException

    try:
        found: str = detector.detect()
    except LangDetectException:
        return None
    return found


@functools.cache
def _languages() -> Any:
    try:
        from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
    except ImportError as e:
        raise _missing(e) from e
    factory = DetectorFactory()  # of our own: the module's one is shared by the whole process
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory


@functools.cache
def _splitter() -> Any:
    try:
        from nltk.tokenize.punkt import _ORTHO_LC, PunktParameters, PunktSentenceTokenizer
    except ImportError as e:
        raise _missing(e) from e
    known = PunktParameters()
    known.abbrev_types.update(_ABBREVIATIONS)
    known.ortho_context.update(dict.fromkeys(_SMALL, _ORTHO_LC))
    return PunktSentenceTokenizer(known)


@functools.cache
def _word_splitter() -> Any:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


def need_packages() -> None:
    """Raise a teaching error where nltk or langdetect is missing: before minutes are spent on answers."""
    _languages()
    _splitter()


def _missing(e: ImportError) -> MachineError:
    return MachineError(1, str(e.name), "is needed to grade IFEval.", "pip install 'educe[ifeval]'.")
