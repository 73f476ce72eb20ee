"""Held-out loss over a run, and what follows from it: which weights are kept, whether to go on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from educe.files.atomic import verify
from educe.files.journal import Journal
from educe.pack.batch import build_batch, even
from educe.pack.plan import plan_once
from educe.recipes.job import TrainJob
from educe.recipes.trainee import Trainee
from educe.training.checkpoint import load_weights, place_of
from educe.training.means import Means
from educe.training.patience import History, best_step, far_above, has_stalled
from educe.training.saver import Saver
from educe.training.sft import held_out_loss, sft_loss
from educe.types import Batch


class HeldOut:
    """The measurements of a run, `history` those up to the step that is gone on from. All ranks measure; rank 0 writes."""

    def __init__(self, job: TrainJob, t: Trainee, metrics: Journal, history: History) -> None:
        self._job, self._t, self._metrics = job, t, metrics
        self._rows = t.rows_of("dev")
        self._pairs = job.recipe.learns_pairs
        self.history = [(int(step), float(loss)) for step, loss in history]

    def measure(self) -> None:
        """The loss of the state as it is, once for each step."""
        step, world, tasks = self._t.state.step, self._job.world, self._job.prepared.tasks
        if not len(self._rows) or (self.history and self.history[-1][0] == step):
            return
        means = held_out_loss(self._t.state.model, self._batches(), self._t.loss if self._pairs else sft_loss)
        if world.size > 1:
            means = means.over(world, len(tasks))
        self.history.append((step, means.mean))
        about, unit = self._of_pairs(means)
        if world.leads:
            line = {"kind": "dev", "step": step, "loss": means.mean, **by_name(tasks, means.by_task), **about}
            self._metrics.append(line)
        self._job.screen.dev(step, means.mean, far_above(self.history), unit)

    def _of_pairs(self, means: Means) -> tuple[dict[str, Any], str]:
        """What is told of pairs besides their loss, and in words."""
        if means.pairs is None:
            return {}, "nats per token"
        about: dict[str, Any] = {"pairs": asdict(means.pairs), "num_pairs": len(self._rows) // 2}
        said = f"a pair, {means.pairs.ranked:.0%} of them ranked right"
        drift = self._t.drift
        if drift is not None:
            kl = sum(drift.drift(self._t.state.model).kl_R) / sum(drift.weights_R)
            about["kl"] = max(0.0, kl)
            said += f"; KL on chosen answers {about['kl']:.4f} nats per token"
        return about, said

    @property
    def has_stalled(self) -> bool:
        """Whether the loss has not fallen for as long as the recipe's patience."""
        patience = self._job.recipe.train.patience
        return patience is not None and has_stalled(self.history, patience)

    @property
    def best(self) -> int | None:
        """The step of the lowest loss after a step of training."""
        return best_step(self.history)

    def take_best(self, saver: Saver) -> int:
        """Put the weights of the lowest loss into the model, where they are not its own. Returns the step they are of."""
        say, losses, best, step = self._job.say, dict(self.history), self.best, self._t.state.step
        kept = step
        if best is None or best == step:
            say(
                f"the weights of the last step, {step}, are kept: their held-out loss is the lowest of the trained ones"
            )
        elif problem := self._load(best, saver):
            say(f"step {best} had the lowest held-out loss, but {problem} The weights of step {step} are kept")
        else:
            kept, loss = best, losses[best]
            say(
                f"the weights of step {best} are kept: their held-out loss, {loss:.3f}, is the lowest of the trained ones"
            )
        if best is not None and losses[best] >= losses.get(0, math.inf):
            lower = f"that of the model it began with was lower, {losses[0]:.3f}"
            say(f"warning: {lower}: training did harm, at every step that was measured")
        return kept

    def _load(self, step: int, saver: Saver) -> str:
        """Why the checkpoint of that step is not taken; empty where it was."""
        saver.wait_together()  # it may be the one that is being written
        world, checkpoints = self._job.world, self._job.run.checkpoints
        found = verify(place_of(checkpoints, step)) if world.leads else ""
        problem: str = world.share(found if isinstance(found, str) else "")  # all ranks take it, or none
        if not problem:
            load_weights(checkpoints, step, self._t.state)
        return problem

    def _batches(self) -> Iterator[Batch]:
        """This rank's; as many as any other's."""
        world = self._job.world
        capacity = self._job.recipe.train.micro_batch_tokens if self._t.packed else 1
        groups = plan_once(self._rows.lengths, capacity_tokens=capacity, pairs=self._pairs)
        mine = groups[world.rank :: world.size]
        for group in mine:
            self._job.dog.beat(f"held-out loss after step {self._t.state.step}")
            yield build_batch([self._rows[i] for i in group])
        yield from even([], -(-len(groups) // world.size) - len(mine))


def by_name(tasks: Sequence[str], losses: Mapping[int, float]) -> dict[str, dict[str, float]]:
    """Each task's own loss by name; nothing where there is one task."""
    return {"tasks": {tasks[k]: loss for k, loss in losses.items()}} if len(tasks) > 1 else {}
