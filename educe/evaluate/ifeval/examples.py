"""Of each instruction type an answer that follows it, one that does not, and a near miss. Tests hold the verifiers to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Answers to an instruction with these arguments. `near` looks as if it followed, and does not."""

    follows: str
    fails: str
    near: str
    arguments: dict[str, Any] = field(default_factory=dict)


EXAMPLES: dict[str, Shown] = {
    "change_case:capital_word_frequency": Shown(
        arguments={"capital_frequency": 3, "capital_relation": "at least"},
        follows="STOP right there, DO NOT move.",
        fails="Stop right there.",
        near="STOP-RIGHT there, DO move.",  # hyphenated words are one
    ),
    "change_case:english_capital": Shown(
        follows="THE WEATHER WILL BE FINE ALL DAY.",
        fails="The weather will be fine all day.",
        near="DAS WETTER WIRD HEUTE DEN GANZEN TAG SCHÖN SEIN.",
    ),
    "change_case:english_lowercase": Shown(
        follows="the weather will be fine all day.",
        fails="THE WEATHER WILL BE FINE ALL DAY.",
        near="the weather in Rome will be fine all day.",
    ),
    "combination:repeat_prompt": Shown(
        arguments={"prompt_to_repeat": "Name a tree."},
        follows="Name a tree. An oak.",
        fails="An oak.",
        near="You said: Name a tree. An oak.",
    ),
    "combination:two_responses": Shown(
        follows="An oak.\n******\nA beech.",
        fails="An oak.",
        near="An oak.\n******\nAn oak.",
    ),
    "detectable_content:number_placeholders": Shown(
        arguments={"num_placeholders": 2},
        follows="Dear [name], come to [address].",
        fails="Dear Ann, come home.",
        near="Dear [name], come to (address).",
    ),
    "detectable_content:postscript": Shown(
        arguments={"postscript_marker": "P.P.S"},
        follows="See you soon.\n\nP. P. S. Bring bread.",
        fails="See you soon.",
        near="See you soon.\n\nP.S. Bring bread.",
    ),
    "detectable_format:constrained_response": Shown(
        follows="My answer is maybe.",
        fails="I do not know.",
        near="My answer is no, never.",
    ),
    "detectable_format:json_format": Shown(
        follows='```json\n{"tree": "oak"}\n```',
        fails="tree: oak",
        near='Here it is:\n```json\n{"tree": "oak"}\n```',
    ),
    "detectable_format:multiple_sections": Shown(
        arguments={"section_spliter": "SECTION", "num_sections": 2},
        follows="SECTION 1\nRoots.\nSECTION 2\nLeaves.",
        fails="Roots and leaves.",
        near="SECTION 1\nRoots.\nSection 2\nLeaves.",
    ),
    "detectable_format:number_bullet_lists": Shown(
        arguments={"num_bullets": 2},
        follows="Trees:\n* oak\n* beech",
        fails="Trees: oak, beech",
        near="Trees:\n* oak\n* beech\n- elm",
    ),
    "detectable_format:number_highlighted_sections": Shown(
        arguments={"num_highlights": 2},
        follows="The *oak* and the *beech*.",
        fails="The oak and the beech.",
        near="The *oak* and the * *.",
    ),
    "detectable_format:title": Shown(
        follows="<<On oaks>>\nThey are old.",
        fails="On oaks\nThey are old.",
        near="<On oaks>\nThey are old, << >>.",
    ),
    "keywords:existence": Shown(
        arguments={"keywords": ["oak", "beech"]},
        follows="Oaks and beeches grow here.",
        fails="Elms grow here.",
        near="Oaks and birches grow here.",
    ),
    "keywords:forbidden_words": Shown(
        arguments={"forbidden_words": ["oak"]},
        follows="Oaken tables are heavy.",
        fails="An oak table is heavy.",
        near="Tables of oak-wood are heavy.",
    ),
    "keywords:frequency": Shown(
        arguments={"keyword": "oak", "frequency": 2, "relation": "at least"},
        follows="An oak, an old Oak.",
        fails="An elm.",
        near="An oak, an old one.",
    ),
    "keywords:letter_frequency": Shown(
        arguments={"letter": "q", "let_frequency": 2, "let_relation": "less than"},
        follows="Quite alone.",
        fails="Quick, quiet, quaint.",
        near="Quite quiet.",
    ),
    "language:response_language": Shown(
        arguments={"language": "de"},
        follows="Das Wetter wird heute den ganzen Tag schön sein.",
        fails="The weather will be fine all day.",
        near="Het weer zal vandaag de hele dag mooi zijn.",
    ),
    "length_constraints:nth_paragraph_first_word": Shown(
        arguments={"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "leaves"},
        follows="Roots hold.\n\nLeaves, too, fall.",
        fails="Roots hold. Leaves fall.",
        near="Roots hold.\n\nThe leaves fall.",
    ),
    "length_constraints:number_paragraphs": Shown(
        arguments={"num_paragraphs": 2},
        follows="Roots hold.\n***\nLeaves fall.",
        fails="Roots hold.",
        near="Roots hold.\n\nLeaves fall.",
    ),
    "length_constraints:number_sentences": Shown(
        arguments={"num_sentences": 3, "relation": "at least"},
        follows="Roots hold. Leaves fall. Mr. Elm waits.",
        fails="Roots hold.",
        near="Roots hold. Mr. Elm waits, e.g. Mondays.",
    ),
    "length_constraints:number_words": Shown(
        arguments={"num_words": 4, "relation": "less than"},
        follows="Roots hold on.",
        fails="Roots hold on, and leaves fall in the end.",
        near="Roots don't hold.",  # the apostrophe parts a word
    ),
    "punctuation:no_comma": Shown(
        follows="Roots hold; leaves fall.",
        fails="Roots hold, leaves fall.",
        near="Roots hold; leaves fall; 1,000 of them.",
    ),
    "startend:end_checker": Shown(
        arguments={"end_phrase": "That is all."},
        follows='Leaves fall. "That is all."',
        fails="Leaves fall.",
        near="Leaves fall. That is all. Bye!",
    ),
    "startend:quotation": Shown(
        follows='"Leaves fall."',
        fails="Leaves fall.",
        near='"Leaves" fall.',
    ),
}
