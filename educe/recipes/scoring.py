"""The task metric while a run trains: a few dev rows answered and graded as the test rows will be."""

from __future__ import annotations

import time
from collections.abc import Sequence

from educe.chat.prompt import completion_tokens, render_prompt
from educe.chat.tokens import ChatTokenizer
from educe.errors import EvalError
from educe.evaluate.compare import grade
from educe.evaluate.metrics import Grader
from educe.evaluate.numbers import Graded, measure
from educe.files.journal import Journal
from educe.model.device import release_free_memory
from educe.model.together import Together
from educe.recipes.answers import Asked, answers_in, questions_of
from educe.recipes.asking import said_of_room
from educe.recipes.grading import check_fit, grading_of
from educe.recipes.job import TrainJob
from educe.recipes.memory import cache_bytes
from educe.recipes.trainee import Trainee
from educe.sample.local import LocalSampler
from educe.types import Answer

# By these metrics an answer that is much longer than every expected one is wrong already; by others it may be right.
_TO_THE_LETTER = ("exact", "label")
LONGEST, SPARE_TOKENS = 2, 32


class DevScores:
    """Lines of kind "score" in metrics.jsonl. Answers are greedy and leave nothing behind: the weights are the same bits without
    them. All ranks answer together; rank 0 grades and writes."""

    def __init__(self, job: TrainJob, t: Trainee, metrics: Journal) -> None:
        self._job, self._state, self._metrics = job, t.state, metrics
        self._asked, self._grader = _chosen(job)
        tokenizer, asks = job.prepared.tokenizer, job.recipe.evaluation
        self._prompts = [render_prompt(a.prompt, tokenizer, a.row.tools) for a in self._asked]
        self._most = longest_answer(asks.metric.kind, asks.max_new_tokens, self._asked, tokenizer)
        # The cache must fit where the activations of a micro-batch were planned.
        wide = max(map(len, self._prompts), default=0) + self._most
        row_bytes = wide * cache_bytes(job.facts, t.state.model.element_bytes)
        self._at_once = max(1, int(t.memory.activations / row_bytes))
        said_of_room(job, self._prompts, self._most, "dev rows")

    def measure(self, times_left: int, weights_step: int | None = None) -> None:
        """By the model as it is; `weights_step`: the step that its weights are of, where it is not the state's."""
        if not self._asked:
            return
        job, began, step = self._job, time.perf_counter(), self._state.step
        job.dog.beat(f"dev rows answered after step {step}")
        given = answers_in(self._answers(), self._asked, job.prepared)
        release_free_memory()
        found, problem = None, ""
        if self._grader is not None:
            try:
                found = Graded.of(grade([a.question for a in self._asked], given, self._grader))
            except EvalError as e:  # a function of the user's
                problem = f"{e.where}: {e.found}"
        problem = job.world.share(problem)
        if problem:  # all ranks go on answering, or none
            job.say(f"warning: dev rows are graded no more while this process trains: {problem}")
            self._asked = []
        if found is None:
            return
        seconds, score = time.perf_counter() - began, measure(found)
        self._metrics.append(
            {
                "kind": "score",
                "step": step,
                "weights_step": step if weights_step is None else weights_step,
                "metric": job.recipe.evaluation.metric.kind,
                "score": {k: score[k] for k in ("value", "low", "high")},
                "right": found.num_correct,
                "rows": len(self._asked),
                "took_s": seconds,
            }
        )
        mean = "" if found.plain else f", mean score {score['value']:.3f}"
        cost = f" in {seconds:.1f} s; {times_left} more times while it trains (train.score_rows)" if step == 0 else ""
        job.say(f"dev rows answered right after step {step}: {found.num_correct} of {len(self._asked)}{mean}{cost}")

    def _answers(self) -> list[Answer]:
        model, alive = self._state.model, self._job.dog.alive
        asking = model if model.sharded is None else Together(model, model.sharded)
        sampler = LocalSampler(asking, self._job.prepared.tokenizer)
        answers: list[Answer] = []
        for i in range(0, len(self._prompts), self._at_once):
            answers += sampler.answer(self._prompts[i : i + self._at_once], self._most, alive=alive)
        return answers


def longest_answer(metric: str, most: int, asked: Sequence[Asked], tokenizer: ChatTokenizer) -> int:
    """Tokens after which an answer is cut: `most`, as in the test, or fewer where none so long can be right. A model that thinks
    first may think longer than the row does."""
    if metric not in _TO_THE_LETTER or any(a.row.messages[-1].reasoning for a in asked):
        return most
    lengths = [completion_tokens(a.row, tokenizer) for a in asked]
    known = [n for n in lengths if n is not None]
    return min(most, LONGEST * max(known, default=0) + SPARE_TOKENS) if len(known) == len(lengths) else most


def _chosen(job: TrainJob) -> tuple[list[Asked], Grader | None]:
    """The dev rows, and what grades them on rank 0; none where the recipe asks for none, or where answers are not right or wrong."""
    recipe, metric = job.recipe, job.recipe.evaluation.metric.kind
    if (
        recipe.objective.kind != "sft"
        or not recipe.train.score_rows
        or metric == "text"
        or not job.prepared.has_conversations("dev")
    ):
        return [], None
    asked = questions_of(job.prepared, recipe, "dev", recipe.train.score_rows)
    grader, problem = None, ""
    if job.world.leads:  # which grades alone: a function of the user's may fail on one machine and not on another
        try:
            grading = grading_of(recipe.evaluation.metric, job.say, allow_code=False)
            check_fit(grading, [a.question for a in asked])
            grader = grading.grader
        except EvalError as e:
            problem = e.found
    problem = job.world.share(problem)
    if problem:
        job.say(f"warning: dev rows are not graded while training: {problem}")
        return [], None
    return asked, grader
