"""What happens beside the steps, and when: metrics, held-out loss, sample answers, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from educe.files.journal import Journal
from educe.files.jsonl import read_jsonl
from educe.model.device import release_free_memory
from educe.recipes.asking import Questions
from educe.recipes.begun import Begun
from educe.recipes.job import TrainJob
from educe.recipes.measuring import HeldOut, by_name
from educe.recipes.plan import looked_at, measured_at
from educe.recipes.scoring import DevScores
from educe.recipes.trainee import Trainee
from educe.training.saver import Saver
from educe.training.state import State, StepReport

TRIM_EVERY_STEPS = 2


class Watch:
    """The hook of an SFT run. Metrics of steps that a resumed run will repeat are cut off when it begins; `about` goes into every
    checkpoint, lines of metrics to `also`."""

    def __init__(
        self,
        job: TrainJob,
        t: Trainee,
        begun: Begun,
        about: dict[str, Any],
        saver: Saver,
        also: Callable[[dict[str, Any]], None],
    ) -> None:
        self._job, self._t, self._begun, self._about, self._saver = job, t, begun, about, saver
        self._also = also
        self._metrics, self._samples = Journal(job.run.metrics, job.say, also), Journal(job.run.samples, job.say)
        self._held_out = HeldOut(job, t, self._metrics, begun.found[1]["held_out"] if begun.found is not None else [])
        self._questions = Questions(job, t.state, self._samples)
        self._keeps_best = job.recipe.train.keep_weights == "best"
        self.weights_step = 0
        self._measures = measured_at(job.recipe, t.plan.num_steps)
        self._looks = looked_at(job.recipe, t.plan.num_steps)
        self._scores = DevScores(job, t, self._metrics)

    def begin(self) -> None:
        """Before the first step of this process."""
        step, measured = self._t.state.step, dict(self._held_out.history)
        last = step if self._begun.ends else step + 1
        steps, holds = range(step + 1), {"dev": measured.keys(), "score": range(last)}
        # A run that begins again measures step 0 again; one that was killed at its end, the end.
        if self._job.world.leads:
            self._metrics.begin(
                lambda line: line["step"] <= step > 0 and line["step"] in holds.get(line["kind"], steps),
                keys={"step", "kind"},
            )
            there = len({x["step"] for x in read_jsonl(self._job.run.metrics) if x["kind"] == "step"})
            if there < step:
                gone = f"{step - there:,} of the first {step:,} steps are not in {self._job.run.metrics.name} any more"
                self._job.say(f"warning: {gone}: the run goes on, its history has a gap there")
            for line in read_jsonl(self._job.run.metrics) if self._begun.ends else ():
                if line["step"] == step:  # its lines elsewhere were taken back: some of them come again
                    self._also(line)
            self._samples.begin(lambda line: line["step"] < last and step > 0, keys={"step"})
        if step == 0:
            self._questions.answer()
            self._held_out.measure()
            self._scores.measure(len(self._measures) - 1)
        self._job.dog.beat(f"step {step + 1}")

    def on_step(self, state: State, report: StepReport) -> None:
        dog = self._job.dog
        dog.settle()
        dog.heard()  # the screen shows steps in its own time
        dog.beat(f"what follows step {report.step}")
        if self._job.world.leads:
            self._job.run.still_there()
        self._note(report)
        if report.step < self._t.plan.num_steps:
            self._look(report.step)
        dog.beat(f"step {report.step + 1}" if report.step < self._t.plan.num_steps else "the end")

    def _note(self, report: StepReport) -> None:
        line = asdict(report)
        del line["total_steps"], line["task_losses"]
        if self._job.world.size == 1:
            del line["rank_skew"]
        if report.pairs is None:
            del line["pairs"]
        line |= by_name(self._job.prepared.tasks, report.task_losses)
        if self._job.world.leads:
            self._metrics.append({"kind": "step", **line})
        self._job.screen.step(report)
        if report.step % TRIM_EVERY_STEPS == 0:
            release_free_memory()

    def _look(self, step: int) -> None:
        """After every step but the last."""
        if step in self._measures:
            self._held_out.measure()
        if self.has_stalled:
            return
        if step in self._looks:
            self._questions.answer()
        if step in self._measures:
            self._scores.measure(0)
        # A new best is a whole checkpoint: a killed run goes on from it or from a later one, never from before its best.
        is_best = self._keeps_best and self._held_out.best == step
        if is_best or step % self._job.recipe.train.checkpoint_every_steps == 0:
            self.save()

    @property
    def has_stalled(self) -> bool:
        """Whether the held-out loss has not fallen for as long as the recipe's patience."""
        return self._held_out.has_stalled

    def end(self) -> None:
        """After the last step: the final weights as soon as they are known, then held-out loss and answers."""
        found = self._begun.found
        if found is not None and self._begun.ends:  # they are stored already
            self.weights_step = found[1]["weights_step"]
        else:
            self.weights_step = self._t.state.step
            if self._keeps_best:
                self._held_out.measure()
                self.weights_step = self._held_out.take_best(self._saver)
            self.save(done=True, must=True)
        self._held_out.measure()
        self._questions.answer()
        self._scores.measure(0, self.weights_step)
        self._settle(must=True)

    def save(self, *, done: bool = False, must: bool = False) -> None:
        """A checkpoint; `must`: written when this comes back."""
        self._job.dog.beat(f"saving after step {self._t.state.step}")
        about = {**self._about, "held_out": [list(measured) for measured in self._held_out.history]}
        if done:
            about["weights_step"] = self.weights_step
        self._settle(must=False)  # a checkpoint knows no more steps than they do
        best = self._held_out.best if self._keeps_best and not done else None
        self._saver.save(self._t.state, about, finished=done, best=best, must=must)
        self._settle(must=must)

    def _settle(self, *, must: bool) -> None:
        for journal in (self._metrics, self._samples) if self._job.world.leads else ():
            journal.settle(must=must)
