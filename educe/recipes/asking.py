"""The three sample answers of a run: what the model says to a few held-out questions, as it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from educe.chat.prompt import expected_answer, render_prompt
from educe.files.journal import Journal
from educe.model.device import release_free_memory
from educe.model.together import Together
from educe.recipes.job import TrainJob
from educe.recipes.naming import row_names
from educe.sample.local import LocalSampler
from educe.training.state import State

NUM_SAMPLES = 3


def said_of_room(job: TrainJob, prompts: Sequence[list[int]], most: int, what: str) -> None:
    """A word where the model has no positions for answers of `most` tokens."""
    places = job.facts.max_positions
    short = sum(len(p) + most > places for p in prompts)
    if short:
        job.say(
            f"{short} of {len(prompts)} {what} leave fewer than {most} of the model's {places} positions: "
            "their answers are cut where those end"
        )


class Questions:
    """The first held-out rows, each up to its last answer. All ranks answer together; rank 0 writes."""

    def __init__(self, job: TrainJob, state: State, samples: Journal) -> None:
        self._job, self._state, self._samples = job, state, samples
        rows = job.prepared.conversations("dev") or job.prepared.conversations("test")
        names = row_names([c.source for c in rows])[:NUM_SAMPLES]
        self._asked = [
            (name, c, max(i for i, m in enumerate(c.messages) if m.role == "assistant"))
            for name, c in zip(names, rows, strict=False)
        ]

        tokenizer = job.prepared.tokenizer
        self._prompts = [render_prompt(c.messages[:i], tokenizer, c.tools) for _, c, i in self._asked]
        said_of_room(job, self._prompts, job.recipe.evaluation.max_new_tokens, "sample prompts")

    def answer(self) -> None:
        """By the model as it is."""
        if not self._asked:
            return
        step, model, dog, tokenizer = self._state.step, self._state.model, self._job.dog, self._job.prepared.tokenizer
        dog.beat(f"sample answers after step {step}")
        sampler = LocalSampler(model if model.sharded is None else Together(model, model.sharded), tokenizer)
        answers = sampler.answer(self._prompts, self._job.recipe.evaluation.max_new_tokens, alive=dog.alive)
        release_free_memory()
        lines = [
            {
                "step": step,
                "row": name,
                "prompt": [{"role": m.role, "content": m.content} for m in c.messages[:i]],
                "expected": expected_answer(replace(c, messages=c.messages[: i + 1]), tokenizer),
                "answer": a.text,
                "stopped": a.stopped,
            }
            for (name, c, i), a in zip(self._asked, answers, strict=True)
        ]
        for line in lines if self._job.world.leads else ():
            self._samples.append(line)
        self._job.screen.samples(step, lines)
