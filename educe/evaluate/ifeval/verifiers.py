"""IFEval's 25 instruction types (Zhou et al. 2023, arXiv 2311.07911), each a function from an answer to whether it follows.

The rules are those of the authors' program, its oddities too, since published scores rest on them. Two things differ: a missing
argument is an error (there it is drawn at random), and words of the prompt are taken literally (there they are regular
expressions; none of the 541 prompts can tell). Examples of each: `examples.py`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from educe.evaluate.ifeval.words import count_capital_words, count_sentences, count_words, language_of

LESS, LEAST = "less than", "at least"


def _holds(count: int, relation: str, wanted: int) -> bool:
    return count < wanted if relation == LESS else count >= wanted


def capital_word_frequency(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(count_capital_words(answer), capital_relation, capital_frequency)


def english_capital(answer: str) -> bool:
    """A text without letters to go by counts as English."""
    return answer.isupper() and language_of(answer) in ("en", None)


def english_lowercase(answer: str) -> bool:
    return answer.islower() and language_of(answer) in ("en", None)


def repeat_prompt(answer: str, *, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(answer: str) -> bool:
    """Two different texts with six asterisks between them; nothing may be empty but the ends."""
    parts = [part.strip() for part in answer.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def number_placeholders(answer: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def postscript(answer: str, *, postscript_marker: str) -> bool:
    """The marker anywhere; spaces after the points of P.S. and P.P.S do not count."""
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(postscript_marker, re.escape(postscript_marker.lower())), answer.lower()) is not None


def constrained_response(answer: str) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


def json_format(answer: str) -> bool:
    """JSON as Python's own parser takes it, in a markdown fence or without."""
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def multiple_sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", answer)) >= num_sections


def number_bullet_lists(answer: str, *, num_bullets: int) -> bool:
    """Exactly so many lines begin with `*` (and not `**`) or `-`."""
    stars = re.findall(r"^\s*\*[^*].*$", answer, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", answer, re.MULTILINE)) == num_bullets


def number_highlighted_sections(answer: str, *, num_highlights: int) -> bool:
    """Spans in single or double asterisks, on one line and not blank."""
    single = [found.strip("*") for found in re.findall(r"\*[^\n*]*\*", answer)]
    double = [found[2:-2] for found in re.findall(r"\*\*[^\n*]*\*\*", answer)]
    return sum(bool(text.strip()) for text in (*single, *double)) >= num_highlights


def title(answer: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", answer))


def existence(answer: str, *, keywords: Sequence[str]) -> bool:
    """Each somewhere, within longer words too."""
    return all(re.search(re.escape(word), answer, re.IGNORECASE) for word in keywords)


def forbidden_words(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    """None of them as a whole word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def frequency(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(len(re.findall(re.escape(keyword.strip()), answer, re.IGNORECASE)), relation, frequency)


def letter_frequency(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(answer.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(answer: str, *, language: str) -> bool:
    """A text without letters to go by counts as right."""
    return language_of(answer) in (language, None)


def nth_paragraph_first_word(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are what blank lines separate. Empty ones are not counted, and yet are in the way of the n-th."""
    paragraphs = answer.split("\n\n")
    count = sum(bool(p.strip()) for p in paragraphs)
    if nth_paragraph > count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"""[.,?!'"]""", word)[0].lower() == first_word.lower()


def number_paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    """Paragraphs are what `***` separates; nothing may be empty but the ends."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    ends = (not parts[0]) + (len(parts) > 1 and not parts[-1])
    return all(parts[1:-1]) and len(parts) - ends == num_paragraphs


def number_sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    return _holds(count_sentences(answer), relation, num_sentences)


def number_words(answer: str, *, num_words: int, relation: str) -> bool:
    return _holds(count_words(answer), relation, num_words)


def no_comma(answer: str) -> bool:
    return "," not in answer


def end_checker(answer: str, *, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


VERIFIERS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "combination:repeat_prompt": repeat_prompt,
    "combination:two_responses": two_responses,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:json_format": json_format,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:title": title,
    "keywords:existence": existence,
    "keywords:forbidden_words": forbidden_words,
    "keywords:frequency": frequency,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "punctuation:no_comma": no_comma,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
}


def _fault(name: str, value: Any) -> str:
    """What is wrong with an argument, or ''."""
    if "relation" in name:
        return "" if value in (LESS, LEAST) else f'must be "{LESS}" or "{LEAST}"'
    if name in ("keywords", "forbidden_words"):
        words = value if isinstance(value, list | tuple) else [value, ""]
        return "" if words and all(isinstance(w, str) and w.strip() for w in words) else "must be a list of words"
    if name.startswith(("num_", "nth_")) or name.endswith("frequency"):
        least = 1 if name == "nth_paragraph" else 0
        return "" if type(value) is int and value >= least else f"must be a whole number, {least} or more"
    if not isinstance(value, str) or not value.strip():
        return "must be text"
    return "must be one letter" if name == "letter" and len(value) != 1 else ""


def faults_of(kind: str, arguments: Mapping[str, Any]) -> str:
    """Why an instruction cannot be verified, or ''. No argument has a default: one that is missing would pass or fail by chance."""
    if kind not in VERIFIERS:
        return f"{kind!r} is not one of the {len(VERIFIERS)} instruction types"
    wanted = [n for n, p in inspect.signature(VERIFIERS[kind]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    found = [f"{n} is missing" for n in wanted if n not in arguments]
    found += [f"{n} is not an argument of it" for n in arguments if n not in wanted]
    found += [f"{n} {fault}" for n in wanted if n in arguments and (fault := _fault(n, arguments[n]))]
    return f"{kind}: {'; '.join(found)}" if found else ""
