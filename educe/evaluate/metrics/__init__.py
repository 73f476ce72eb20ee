"""Graders: (answer, question) → verdict. Each says why. None has a default."""

from educe.evaluate.metrics.calls import grade_tool_calls
from educe.evaluate.metrics.fields import grade_json_fields
from educe.evaluate.metrics.question import Grader, Question
from educe.evaluate.metrics.rouge import grade_rouge_l
from educe.evaluate.metrics.texts import grade_exact, grade_json, grade_label, grade_sql

__all__ = ["METRICS", "Grader", "Question"]

# The open family: one function, one line. A metric with settings of its own is bound to them where a recipe is read.
METRICS: dict[str, Grader] = {
    "exact": grade_exact,
    "json": grade_json,
    "json_fields": grade_json_fields,
    "label": grade_label,
    "rouge_l": grade_rouge_l,
    "sql": grade_sql,
    "text": grade_exact,  # free text: graded to the letter, but the verdict goes by held-out loss
    "tool_calls": grade_tool_calls,
}
