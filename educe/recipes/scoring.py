"""The task metric while a run trains: a few dev rows answered and graded as the test rows will be."""

from __future__ import annotations

import time

from educe.chat.prompt import answer_in, render_prompt
from educe.errors import EvalError
from educe.evaluate.metrics import METRICS, Grader
from educe.files.journal import Journal
from educe.model.device import release_free_memory
from educe.model.together import Together
from educe.recipes.answers import Asked, questions_of
from educe.recipes.grading import check_fit, grading_of
from educe.recipes.job import TrainJob
from educe.sample.local import LocalSampler
from educe.training.state import State

# Answered at once: the cache of so few prompts is small beside what training holds.
ROWS_AT_ONCE = 8
# An answer that is much longer than every expected one is wrong already.
LONGEST, SPARE_TOKENS = 2, 32


class DevScores:
    """Lines of kind "score" in metrics.jsonl. Answers are greedy and leave nothing behind: the weights are the same bits without
    them. All ranks answer together; rank 0 writes."""

    def __init__(self, job: TrainJob, state: State, metrics: Journal) -> None:
        self._job, self._state, self._metrics = job, state, metrics
        self._asked, self._grader = _chosen(job)
        tokenizer = job.prepared.tokenizer
        self._prompts = [render_prompt(a.prompt, tokenizer, a.row.tools) for a in self._asked]
        longest = max((len(tokenizer.encode_plain(a.question.expected)) for a in self._asked), default=0)
        self._most = min(job.recipe.evaluation.max_new_tokens, LONGEST * longest + SPARE_TOKENS)

    def measure(self, times_left: int) -> None:
        """By the model as it is."""
        if not self._asked:
            return
        job, began, right = self._job, time.perf_counter(), 0
        step, model, tokenizer, metric = self._state.step, self._state.model, job.prepared.tokenizer, self._metric
        job.dog.beat(f"dev rows answered after step {step}")
        sampler = LocalSampler(model if model.sharded is None else Together(model, model.sharded), tokenizer)
        for i in range(0, len(self._asked), ROWS_AT_ONCE):
            answers = sampler.answer(self._prompts[i : i + ROWS_AT_ONCE], self._most, alive=job.dog.alive)
            for asked, answer in zip(self._asked[i : i + ROWS_AT_ONCE], answers, strict=True):
                text = answer_in(answer.text, asked.row, tokenizer)
                right += self._grader(text, asked.question).correct
        release_free_memory()
        seconds, rows = time.perf_counter() - began, len(self._asked)
        line = {"kind": "score", "step": step, "metric": metric, "right": right, "rows": rows, "took_s": seconds}
        if job.world.leads:
            self._metrics.append(line)
        cost = f" in {seconds:.1f} s; {times_left} more times while it trains (train.score_rows)" if step == 0 else ""
        job.say(f"dev rows answered right after step {step}: {right} of {rows}{cost}")

    @property
    def _metric(self) -> str:
        return self._job.recipe.evaluation.metric.kind


def _chosen(job: TrainJob) -> tuple[list[Asked], Grader]:
    """The dev rows and what grades them; no rows where the recipe asks for none, or where answers are not right or wrong."""
    recipe, metric = job.recipe, job.recipe.evaluation.metric.kind
    if not recipe.train.score_rows or metric == "text" or not job.prepared.conversations("dev"):
        return [], METRICS["exact"]
    asked = questions_of(job.prepared, recipe, "dev", recipe.train.score_rows)
    try:
        grading = grading_of(recipe.evaluation.metric, job.say, allow_code=False)
        check_fit(grading, [a.question for a in asked])
    except EvalError as e:
        job.say(f"warning: dev rows are not graded while training: {e.found}")
        return [], METRICS["exact"]
    return asked, grading.grader
