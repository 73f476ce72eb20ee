"""JSON by its fields: each leaf, by its path, is found, missing, wrong or added."""

from __future__ import annotations

from typing import Any

from educe.errors import Refusal
from educe.evaluate.metrics.question import Question
from educe.evaluate.metrics.texts import canonical, expected_json
from educe.files.jsonl import parse_json
from educe.types import Verdict

_NAMED = 5  # paths of each kind in a reason


def grade_json_fields(answer: str, question: Question) -> Verdict:
    """F1 of the leaves: 2 · equal / (said + expected), and so over all rows as one ratio of sums (micro). Types count, as in `json`.

    A leaf is a scalar, or an empty list or object, with the path to it; elements of a list go by their place. An answer that is
    not JSON says nothing. Raises `EvalError` for an expected answer that is not JSON.
    """
    right = leaves(expected_json(question))
    value = parse_json(answer.strip(), "answer")
    valid = not isinstance(value, Refusal)
    said = leaves(value) if valid else {}
    equal = sum(said.get(path) == leaf for path, leaf in right.items())
    parts = {
        "valid": (float(valid), 1.0),
        "precision": (float(equal), float(len(said))),
        "recall": (float(equal), float(len(right))),
    }
    return Verdict(
        correct=valid and said == right,
        reason=_told(said, right) if valid else value.found.rstrip("."),
        score=2 * equal / (len(said) + len(right)),
        weight=float(len(said) + len(right)),
        parts=parts,
    )


def leaves(value: Any, path: str = "$") -> dict[str, str]:
    """Every leaf of a JSON value, by its path: `$.a[0]["b c"]`. Different paths are different texts."""
    if isinstance(value, dict) and value:
        inner = [(path + (f".{k}" if k.isidentifier() else f"[{canonical(k)}]"), v) for k, v in value.items()]
    elif isinstance(value, list) and value:
        inner = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {path: canonical(value)}
    return {p: leaf for at, v in inner for p, leaf in leaves(v, at).items()}


def _told(said: dict[str, str], right: dict[str, str]) -> str:
    kinds = {
        "differs in": [p for p in right if p in said and said[p] != right[p]],
        "lacks": [p for p in right if p not in said],
        "adds": [p for p in said if p not in right],
    }
    wrong = [
        f"{kind} {', '.join(paths[:_NAMED])}{f' and {len(paths) - _NAMED} more' if len(paths) > _NAMED else ''}"
        for kind, paths in kinds.items()
        if paths
    ]
    return "; ".join(wrong) or "all fields equal"
