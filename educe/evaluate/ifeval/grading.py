"""An answer's verdicts: strict (as it stands) and loose (some answer with its first or last line or its asterisks removed follows)."""

from __future__ import annotations

from dataclasses import dataclass

from educe.evaluate.ifeval.prompts import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """Of each instruction of a task, in its order."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def grade(task: Task, answer: str) -> Graded:
    """Both verdicts on each instruction. Loose passes wherever strict does."""
    strict = tuple(i.followed_by(answer) for i in task.instructions)
    forms = variants(answer)[1:]
    loose = tuple(
        passed or any(i.followed_by(form) for form in forms)
        for passed, i in zip(strict, task.instructions, strict=True)
    )
    return Graded(strict=strict, loose=loose)


def variants(answer: str) -> list[str]:
    """The answer; without its first line, its last, both (a remark before or after the text that was asked for); each of these
    without asterisks (Zhou et al. 2023, section 2.3). Each form once."""
    lines = answer.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return list(dict.fromkeys(form for text in (answer, *cut) for form in (text, text.replace("*", ""))))
