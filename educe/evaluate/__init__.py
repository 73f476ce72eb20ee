"""Answers → scores with error bars. A grader has no default: what it cannot read is wrong, with the reason."""
