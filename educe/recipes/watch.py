"""What happens beside the steps: metrics, held-out loss, the three sample answers, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from educe.chat.prompt import expected_answer, render_prompt
from educe.config import Recipe
from educe.files.atomic import told
from educe.files.jsonl import read_jsonl, write_jsonl
from educe.files.run_dir import RunDir
from educe.model.device import release_free_memory
from educe.model.together import Together
from educe.pack.batch import build_batch, even
from educe.pack.plan import PackPlan, plan_once
from educe.parallel.world import ALONE, World
from educe.recipes.prepare import Prepared
from educe.sample.local import LocalSampler
from educe.training.checkpoint import save_checkpoint
from educe.training.sft import held_out_loss
from educe.training.state import State, StepReport
from educe.types import Batch

NUM_SAMPLES = 3
TRIM_EVERY_STEPS = 2


class Screen(Protocol):
    """Where progress is shown: a terminal, plain lines, or nothing."""

    def step(self, report: StepReport) -> None: ...

    def dev(self, step: int, loss: float) -> None: ...

    def samples(self, step: int, lines: list[dict[str, Any]]) -> None: ...


class Watch:
    """The hook of an SFT run. Metrics of steps that a resumed run will repeat are cut off when it begins.

    All ranks measure and answer together; rank 0 writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        prepared: Prepared,
        state: State,
        plan: PackPlan,
        settings: dict[str, Any],
        screen: Screen,
        *,
        packed: bool,
        world: World = ALONE,
    ) -> None:
        self._recipe, self._run, self._state, self._plan, self._settings = recipe, run, state, plan, settings
        self._screen, self._packed, self._world = screen, packed, world
        self._dev, self._tasks = prepared.store("dev"), prepared.tasks
        every = recipe.train.sample_every_share
        self._looks = {round(plan.num_steps * every * k) for k in range(1, int(1 / every) + 1)}
        self._tokenizer = prepared.tokenizer
        rows = (prepared.conversations("dev") or prepared.conversations("test"))[:NUM_SAMPLES]
        self._questions = [(c, max(i for i, m in enumerate(c.messages) if m.role == "assistant")) for c in rows]

    def begin(self) -> None:
        """Before the first step of this process."""
        for file in (self._run.metrics, self._run.samples) if self._world.leads else ():
            lines = read_jsonl(file) if file.exists() else []
            with told(file):  # a run that begins again measures step 0 again
                write_jsonl(file, [line for line in lines if line["step"] <= self._state.step > 0])
        if self._state.step == 0:
            self._answer()
            self._measure()

    def on_step(self, state: State, report: StepReport) -> None:
        line = asdict(report)
        del line["total_steps"], line["task_losses"]
        line |= self._of_tasks(report.task_losses)
        self._append(self._run.metrics, {"kind": "step", **line})
        self._screen.step(report)
        if report.step % TRIM_EVERY_STEPS == 0:
            release_free_memory()
        if report.step == self._plan.num_steps:
            return
        if report.step in self._looks:
            self._measure()
            self._answer()
        if report.step % self._recipe.train.checkpoint_every_steps == 0:
            self.save(done=False)

    def end(self) -> None:
        """After the last step: the final weights first, then held-out loss and answers."""
        self.save(done=True)
        self._measure()
        self._answer()

    def save(self, *, done: bool) -> None:
        keep = 1 if done else self._recipe.train.keep_checkpoints
        about = {"settings": self._settings, "plan": self._plan.hash}
        save_checkpoint(self._run.checkpoints, self._state, about, finished=done, keep=keep, world=self._world)

    def _measure(self) -> None:
        if len(self._dev):
            means = held_out_loss(self._state.model, self._dev_batches())
            if self._world.size > 1:
                means = means.over(self._world, len(self._tasks))
            line = {"kind": "dev", "step": self._state.step, "loss": means.mean, **self._of_tasks(means.by_task)}
            self._append(self._run.metrics, line)
            self._screen.dev(self._state.step, means.mean)

    def _of_tasks(self, losses: Mapping[int, float]) -> dict[str, dict[str, float]]:
        """Each task's own loss by name; nothing where there is one task."""
        return {"tasks": {self._tasks[k]: loss for k, loss in losses.items()}} if len(self._tasks) > 1 else {}

    def _dev_batches(self) -> Iterator[Batch]:
        """This rank's; as many as any other's."""
        capacity = self._recipe.train.micro_batch_tokens if self._packed else 1
        groups = plan_once(self._dev.lengths, capacity_tokens=capacity)
        mine = groups[self._world.rank :: self._world.size]
        for group in mine:
            yield build_batch([self._dev[i] for i in group])
        yield from even([], -(-len(groups) // self._world.size) - len(mine))

    def _answer(self) -> None:
        if not self._questions:
            return
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
            self._append(self._run.samples, line)
        self._screen.samples(self._state.step, lines)

    def _append(self, file: Path, line: dict[str, Any]) -> None:
        if self._world.leads:
            with told(file), file.open("a", encoding="utf-8", newline="\n") as f:
                f.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
