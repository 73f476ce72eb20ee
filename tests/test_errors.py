"""Error codes: what the source raises is in the table, what is in the table is raised, and every message teaches."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from educe import errors
from educe.errors import CODES, EduceError, Refusal

PACKAGE = Path(errors.__file__).parent
CLASSES = {c.__name__: c for c in EduceError.__subclasses__()}


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != Path(errors.__file__):
            yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def calls() -> Iterator[tuple[str, type[EduceError], ast.Call]]:
    """Every place that makes an EduceError: where, its class, the call."""
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                yield f"{name}:{node.lineno}", CLASSES[node.func.id], node


def used_codes() -> set[str]:
    text = "\n".join(t for _, t in sources())
    raised = re.findall(rf"\b({'|'.join(CLASSES)})\(\s*(\d+)", text)
    return {f"{CLASSES[c].prefix}{int(n):03d}" for c, n in raised} | set(re.findall(r'"(E-[A-Z]+-\d{3})"', text))


def test_every_code_in_the_source_is_in_the_table() -> None:
    used = used_codes()
    assert len(used) > 30, "the search itself is broken"
    assert used <= set(CODES)


def test_every_code_in_the_table_is_used() -> None:
    assert set(CODES) == used_codes()


def test_errors_are_made_with_a_literal_number_a_place_what_was_found_and_what_to_do() -> None:
    found = list(calls())
    assert len(found) > 30, "the search itself is broken"
    for where, kind, call in found:
        assert len(call.args) == 4, where
        assert not call.keywords, where
        number = call.args[0]
        assert isinstance(number, ast.Constant), where
        assert f"{kind.prefix}{number.value:03d}" in CODES, where


def test_what_was_found_is_a_sentence() -> None:
    for where, _, call in calls():
        last = call.args[2].values[-1] if isinstance(call.args[2], ast.JoinedStr) else call.args[2]
        if isinstance(last, ast.Constant):
            assert str(last.value).rstrip().endswith((".", "?", ")")), where


def test_every_class_has_codes_and_every_code_a_class() -> None:
    prefixes = {c.prefix for c in CLASSES.values()}
    assert len(prefixes) == len(CLASSES)
    assert {re.sub(r"\d{3}$", "", code) for code in CODES} == prefixes
    for code, meaning in CODES.items():
        assert re.fullmatch(r"E-[A-Z]+-[0-3]\d\d", code)
        assert meaning
        assert not meaning.endswith(".")


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_error_carries_its_parts(code: str) -> None:
    kind = next(c for c in CLASSES.values() if code.startswith(c.prefix))
    error = kind(int(code[-3:]), "rows.jsonl:3:7", "is odd.", "Make it even.")
    assert (error.code, error.where, error.found, error.fix) == (code, "rows.jsonl:3:7", "is odd.", "Make it even.")
    assert str(error) == f"{code} rows.jsonl:3:7 is odd. Make it even."


def test_a_code_that_is_not_in_the_table_cannot_be_raised() -> None:
    for kind in (EduceError, *CLASSES.values()):
        with pytest.raises(KeyError, match="999"):
            kind(999, "here", "is odd.", "Make it even.")
    with pytest.raises(KeyError, match="E-DATA-999"):
        Refusal(code="E-DATA-999", where="here", found="odd.", fix="Make it even.")


def test_a_refusal_reads_like_an_error() -> None:
    refusal = Refusal(code="E-DATA-142", where="rows.jsonl:3", found="odd.", fix="Make it even.")
    assert str(refusal) == "E-DATA-142 rows.jsonl:3 odd. Make it even."
    with pytest.raises(AttributeError):
        refusal.code = "E-DATA-141"  # type: ignore[misc]
