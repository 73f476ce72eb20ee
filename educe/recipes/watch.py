"""What happens beside the steps: metrics, held-out loss and what follows from it, the three sample answers, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from educe.chat.prompt import expected_answer, render_prompt
from educe.config import Recipe
from educe.files.atomic import verify
from educe.files.journal import Journal
from educe.files.run_dir import RunDir
from educe.model.device import release_free_memory
from educe.model.source import Say
from educe.model.together import Together
from educe.pack.batch import build_batch, even
from educe.pack.plan import PackPlan, plan_once
from educe.parallel.world import ALONE, World
from educe.recipes.prepare import Prepared
from educe.sample.local import LocalSampler
from educe.training.checkpoint import load_weights, place_of
from educe.training.patience import History, best_step, far_above, has_stalled
from educe.training.saver import Saver
from educe.training.sft import held_out_loss
from educe.training.state import State, StepReport
from educe.training.watchdog import ASLEEP, Watchdog
from educe.types import Batch

NUM_SAMPLES = 3
SAMPLES_AT = (0.34, 0.68)  # shares of the steps; and before the first and after the last
TRIM_EVERY_STEPS = 2


class Screen(Protocol):
    """Where progress is shown: a terminal, plain lines, or nothing."""

    def step(self, report: StepReport) -> None: ...

    def dev(self, step: int, loss: float, warning: str) -> None: ...

    def samples(self, step: int, lines: list[dict[str, Any]]) -> None: ...


class Watch:
    """The hook of an SFT run. Metrics of steps that a resumed run will repeat are cut off when it begins.

    `about` goes into every checkpoint; `history`: the held-out measurements up to the step that is gone on from, as its
    checkpoint has them. `ends`: no step is left, what comes after the last one may be.
    All ranks measure and answer together; rank 0 writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        prepared: Prepared,
        state: State,
        plan: PackPlan,
        about: dict[str, Any],
        saver: Saver,
        screen: Screen,
        history: History,
        say: Say,
        *,
        packed: bool,
        ends: bool = False,
        world: World = ALONE,
        dog: Watchdog = ASLEEP,
    ) -> None:
        self._recipe, self._run, self._state, self._plan, self._about = recipe, run, state, plan, about
        self._saver, self._screen, self._packed, self._world = saver, screen, packed, world
        self._dog = dog
        self._metrics, self._samples = Journal(run.metrics, say), Journal(run.samples, say)
        self._dev, self._tasks = prepared.store("dev"), prepared.tasks
        self._history = [(int(step), float(loss)) for step, loss in history]
        self._keeps_best = recipe.train.keep_weights == "best"
        self.weights_step, self._ends = 0, ends
        every = recipe.train.measure_every_share
        self._measures = {round(plan.num_steps * every * k) for k in range(1, int(1 / every) + 1)}
        self._looks = {round(plan.num_steps * share) for share in SAMPLES_AT}
        self._tokenizer = prepared.tokenizer
        rows = (prepared.conversations("dev") or prepared.conversations("test"))[:NUM_SAMPLES]
        self._questions = [(c, max(i for i, m in enumerate(c.messages) if m.role == "assistant")) for c in rows]

    def begin(self) -> None:
        """Before the first step of this process."""
        step, measured = self._state.step, dict(self._history)
        if self._world.leads:  # a run that begins again measures step 0 again; one that was killed at its end, the end
            self._metrics.begin(
                lambda line: line["step"] <= step > 0 and not (line["kind"] == "dev" and line["step"] not in measured),
                keys={"step", "kind"},
            )
            last = step if self._ends else step + 1
            self._samples.begin(lambda line: line["step"] < last and step > 0, keys={"step"})
        if step == 0:
            self._answer()
            self._measure()
        self._dog.beat(f"step {self._state.step + 1}")

    def on_step(self, state: State, report: StepReport) -> None:
        self._dog.settle()
        self._dog.heard()  # the screen shows steps in its own time
        self._beside(report)
        self._dog.beat(f"step {report.step + 1}" if report.step < self._plan.num_steps else "the end")

    def _beside(self, report: StepReport) -> None:
        self._dog.beat(f"what follows step {report.step}")
        line = asdict(report)
        del line["total_steps"], line["task_losses"]
        line |= self._of_tasks(report.task_losses)
        self._append(self._metrics, {"kind": "step", **line})
        self._screen.step(report)
        if report.step % TRIM_EVERY_STEPS == 0:
            release_free_memory()
        if report.step == self._plan.num_steps:
            return
        if report.step in self._measures:
            self._measure()
        if self.has_stalled:
            return
        if report.step in self._looks:
            self._answer()
        # A new best is a whole checkpoint: a killed run goes on from it or from a later one, never from before its best.
        if report.step % self._recipe.train.checkpoint_every_steps == 0 or (self._keeps_best and self._is_best):
            self.save()

    @property
    def has_stalled(self) -> bool:
        """Whether the held-out loss has not fallen for as long as the recipe's patience."""
        patience = self._recipe.train.patience
        return patience is not None and has_stalled(self._history, patience)

    @property
    def _is_best(self) -> bool:
        return best_step(self._history) == self._state.step

    def end(self, say: Say, weights_step: int | None = None) -> None:
        """After the last step: the final weights as soon as they are known, then held-out loss and answers. `weights_step`: these are
        the final weights, stored already, those of that step."""
        if weights_step is not None:
            self.weights_step = weights_step
        else:
            self.weights_step = self._state.step
            if self._keeps_best:
                self._measure()
                self._take_best(say)
            self.save(done=True, must=True)
        self._measure()
        self._answer()
        self._settle(must=True)

    def _take_best(self, say: Say) -> None:
        """Put the weights of the lowest held-out loss into the model, where they are not its own."""
        losses, best = dict(self._history), best_step(self._history)
        if best is None or self._is_best:
            say(
                f"the weights of the last step, {self._state.step}, are kept: their held-out loss is the lowest of the trained ones"
            )
        elif problem := self._load(best):
            say(
                f"step {best} had the lowest held-out loss, but {problem} The weights of step {self._state.step} are kept"
            )
        else:
            self.weights_step = best
            say(
                f"the weights of step {best} are kept: their held-out loss, {losses[best]:.3f}, is the lowest of the trained ones"
            )
        if best is not None and losses[best] >= losses.get(0, math.inf):
            say(
                f"warning: the untouched model's was lower, {losses[0]:.3f}: training did harm, at every step that was measured"
            )

    def _load(self, step: int) -> str | None:
        self._saver.wait()  # it may be the one that is being written
        found = verify(place_of(self._run.checkpoints, step)) if self._world.leads else ""
        problem: str = self._world.share(found if isinstance(found, str) else "")  # all ranks take it, or none
        if not problem:
            load_weights(self._run.checkpoints, step, self._state)
        return problem or None

    def save(self, *, done: bool = False, must: bool = False) -> None:
        """A checkpoint; `must`: written when this comes back."""
        self._dog.beat(f"saving after step {self._state.step}")
        about = {**self._about, "held_out": [list(measured) for measured in self._history]}
        if done:
            about["weights_step"] = self.weights_step
        self._settle(must=False)  # a checkpoint knows no more steps than they do
        best = best_step(self._history) if self._keeps_best and not done else None
        self._saver.save(self._state, about, finished=done, best=best, must=must)
        self._settle(must=must)

    def _settle(self, *, must: bool) -> None:
        for journal in (self._metrics, self._samples) if self._world.leads else ():
            journal.settle(must=must)

    def _measure(self) -> None:
        if len(self._dev) and not (self._history and self._history[-1][0] == self._state.step):
            means = held_out_loss(self._state.model, self._dev_batches())
            if self._world.size > 1:
                means = means.over(self._world, len(self._tasks))
            self._history.append((self._state.step, means.mean))
            line = {"kind": "dev", "step": self._state.step, "loss": means.mean, **self._of_tasks(means.by_task)}
            self._append(self._metrics, line)
            self._screen.dev(self._state.step, means.mean, far_above(self._history))

    def _of_tasks(self, losses: Mapping[int, float]) -> dict[str, dict[str, float]]:
        """Each task's own loss by name; nothing where there is one task."""
        return {"tasks": {self._tasks[k]: loss for k, loss in losses.items()}} if len(self._tasks) > 1 else {}

    def _dev_batches(self) -> Iterator[Batch]:
        """This rank's; as many as any other's."""
        capacity = self._recipe.train.micro_batch_tokens if self._packed else 1
        groups = plan_once(self._dev.lengths, capacity_tokens=capacity)
        mine = groups[self._world.rank :: self._world.size]
        for group in mine:
            self._dog.beat(f"held-out loss after step {self._state.step}")
            yield build_batch([self._dev[i] for i in group])
        yield from even([], -(-len(groups) // self._world.size) - len(mine))

    def _answer(self) -> None:
        if not self._questions:
            return
        self._dog.beat(f"sample answers after step {self._state.step}")
        prompts = [render_prompt(c.messages[:i], self._tokenizer, c.tools) for c, i in self._questions]
        model = self._state.model
        sampler = LocalSampler(model if model.sharded is None else Together(model, model.sharded), self._tokenizer)
        answers = sampler.answer(prompts, self._recipe.evaluation.max_new_tokens)
        release_free_memory()
        lines = [
            {
                "step": self._state.step,
                "row": f"{Path(c.source.file).name}:{c.source.line}",
                "prompt": [{"role": m.role, "content": m.content} for m in c.messages[:i]],
                "expected": expected_answer(replace(c, messages=c.messages[: i + 1]), self._tokenizer),
                "answer": a.text,
                "stopped": a.stopped,
            }
            for (c, i), a in zip(self._questions, answers, strict=True)
        ]
        for line in lines:
            self._append(self._samples, line)
        self._screen.samples(self._state.step, lines)

    def _append(self, journal: Journal, line: dict[str, Any]) -> None:
        if self._world.leads:
            journal.append(line)
