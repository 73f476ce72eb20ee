"""Checkpoints are written beside the training: only the copy of what is trained holds it up."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from educe.errors import MachineError
from educe.files.atomic import abandon, begin, finish, need_space, remove, told
from educe.model.device import free_host_memory
from educe.parallel.world import ALONE, World
from educe.training.checkpoint import OPTIMIZER, WEIGHTS, newest_first, place_of, step_of
from educe.training.staging import Staging
from educe.training.state import State
from educe.training.streamed import gathered, write_safetensors

SPARE_BYTES = 64 * 2**20  # of the disk, beside a checkpoint
_SPARE_MEMORY = 4 * 2**30  # of the host, beside a copy
_LOOK_S = 0.5
# One that must be written is tried again after so many seconds each; another one after the first of these, then twice as long.
_PATIENCE_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_RETRY_S, _LONGEST_RETRY_S = 10.0, 600.0

Files = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The newest `newest` checkpoints stay, and for good those of every `every` steps."""

    newest: int = 2
    every: int | None = None


def prune(place: Path, kept: Kept, *, best: int | None = None) -> None:
    """Delete the checkpoints that need not stay."""
    for old in newest_first(place)[kept.newest :]:
        if step_of(old) != best and not (kept.every and step_of(old) % kept.every == 0):
            with contextlib.suppress(OSError):  # one too many does no harm; a disk that refuses is told of the next one
                remove(old)


class Saver:
    """Writes a run's checkpoints to `place`, one at a time. All ranks call it, rank 0 writes: the same files whatever their number.

    The ranks wait while what is trained is copied: from a GPU into the host's memory where that has room, else into files that
    nothing has flushed yet. Hashing, flushing, the new name and the deletion of older ones go on in a thread. What cannot be
    written is said and tried again; the checkpoints before it stay. `alive` is called, on every rank that waits, at each piece of
    what is copied or written.
    """

    def __init__(
        self,
        place: Path,
        kept: Kept,
        say: Callable[[str], None],
        world: World = ALONE,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._place, self._kept, self._say, self._world, self._alive = place, kept, say, world, alive
        self._pieces = 0  # that the thread has done
        self._thread: threading.Thread | None = None
        self._host: dict[str, Staging] = {}  # for a GPU's tensors, by file
        self.problem: Exception | None = None  # why the last one was not written
        self._told, self._failures, self._again_at = False, 0, 0.0
        self._written: tuple[int, bool] | None = None  # step, and whether it is the last
        self.held_up_s = self.longest_s = 0.0  # of the training; of one checkpoint, from its copy to its name
        self.held_up_beside_s = 0.0  # of the training, but for those that had to be written at once

    def save(
        self,
        state: State,
        about: dict[str, Any],
        *,
        finished: bool,
        best: int | None = None,
        must: bool = False,
        only: Collection[str] | None = None,
    ) -> Path:
        """Write `place/step-N`, return that, and delete those that need not stay; that of step `best` stays. `about` goes into the
        manifest.

        A finished run keeps its fp32 weights alone: there is nothing left to resume, and two thirds of the space is the
        optimizer's. `must`: come back when it is written; raises what went wrong where that fails for a minute.
        `only`: these tensors, which is no checkpoint to go on from.
        """
        started = time.monotonic()
        at = {"step": state.step, "finished": finished, "halvings": state.halvings, "usual_losses": state.spikes.recent}
        about = {**about, **at}
        # A stop may fall on the step of a checkpoint. Rank 0 alone knows whether that one was refused: all copy, or none.
        waits_still = self._told and not must and time.monotonic() < self._again_at
        if self._world.share(self._written != (state.step, finished) and not waits_still):
            self._begin(state, about, finished=finished, best=best, only=only)
        waits = list(_PATIENCE_S)
        while must and (problem := self._outcome()):
            if not waits:
                raise self.problem or MachineError(4, str(self._place), problem, "See what rank 0 says.")
            wait_s = waits.pop(0)
            self._tell(f"trying again in {wait_s:.0f} s")
            time.sleep(wait_s)
            self._begin(state, about, finished=finished, best=best, only=only)
        took_s = time.monotonic() - started
        self.held_up_s += took_s
        self.held_up_beside_s += 0.0 if must else took_s
        return place_of(self._place, state.step)

    def retry_now(self) -> bool:
        """On rank 0: whether a checkpoint that could not be written should be tried again now. Says, once, what went wrong."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        if self.problem is None:
            return False
        if not self._told:
            wait_s = min(_RETRY_S * 2**self._failures, _LONGEST_RETRY_S)
            self._failures, self._again_at = self._failures + 1, time.monotonic() + wait_s
            self._tell(f"training goes on, the checkpoints before it are whole; trying again in {wait_s:.0f} s")
        return time.monotonic() >= self._again_at

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until nothing is being written. On rank 0; what the others do meanwhile is not asked."""
        while self._next_piece():
            self._alive()

    def wait_together(self) -> None:
        """The same on all ranks: each piece of what rank 0 writes is a sign of life on every one."""
        while self._world.share(self._next_piece()):
            self._alive()

    def _next_piece(self) -> bool:
        """On rank 0: wait for what the thread does next; False when nothing is being written."""
        seen = self._pieces
        while self._thread is not None:
            self._thread.join(_LOOK_S)
            if not self._thread.is_alive():
                self._thread = None
            elif self._pieces != seen:
                return True
        return False

    def _piece_done(self) -> None:
        self._pieces += 1

    def _outcome(self) -> str:
        """Why the last one is not written, on every rank; empty where it is."""
        self.wait_together()
        why: str = self._world.share(f"{type(self.problem).__name__}: {self.problem}" if self.problem else "")
        if why:
            self._written = None
        return why

    def _tell(self, what_next: str) -> None:
        p, self._told = self.problem, True
        found = f"{p.where} {p.found}" if isinstance(p, MachineError) else f"{type(p).__name__}: {p}."
        if self._world.leads:
            self._say(f"warning: a checkpoint was not written: {found} {what_next[0].upper()}{what_next[1:]}.")

    def _begin(
        self,
        state: State,
        about: dict[str, Any],
        *,
        finished: bool,
        best: int | None,
        only: Collection[str] | None,
    ) -> None:
        """Copy; then write in a thread. What goes wrong is in `problem`."""
        self.wait_together()
        if self.problem is not None and not self._told:
            self._tell("trying again now")
        self.problem, self._told, self._written = None, False, (state.step, finished)
        files: dict[str, Mapping[str, Tensor]] = {WEIGHTS: state.optimizer.masters}
        if only is not None:
            files[WEIGHTS] = {n: m for n, m in state.optimizer.masters.items() if n in only}
        elif not finished:
            files[OPTIMIZER] = state.optimizer.state_tensors()
        if not self._world.leads:
            for group in files.values():
                self._give_rows(group)
            return
        target, keep = place_of(self._place, state.step), 1 if finished else self._kept.newest
        size = sum(t.numel() * t.element_size() for group in files.values() for t in group.values())
        part, left, began = None, dict(files), time.monotonic()
        copies: dict[str, Mapping[str, Tensor]] = {}
        try:
            need_space(self._place, size + SPARE_BYTES, "this checkpoint")
            part = begin(target)
            for name in files:
                staging = self._staging(name, files[name], state)
                group = left.pop(name)  # both of these give all of it, whatever happens
                if staging is not None:
                    copies[name] = staging.take(group, self._alive)
                else:
                    with told(target):
                        write_safetensors(part / name, group, self._alive)
        except Exception as e:  # told, and tried again: the other ranks wait for this one
            self._fail(e, part, target)
            for group in left.values():
                self._give_rows(group)  # the others do
            return
        self._thread = threading.Thread(
            target=self._finish, args=(part, target, about, copies, keep, best, began), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _finish(
        self, part: Path, target: Path, about: dict[str, Any], copies: Files, keep: int, best: int | None, began: float
    ) -> None:
        try:
            for name, group in copies.items():
                with told(target):
                    write_safetensors(part / name, group, self._piece_done)
            finish(part, target, about, self._piece_done)
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            prune(self._place, Kept(newest=keep, every=self._kept.every), best=best)
            self._failures = 0
        except Exception as e:  # told by the thread that trains
            self._fail(e, part, target)

    def _staging(self, name: str, group: Mapping[str, Tensor], state: State) -> Staging | None:
        """Room for a copy from a GPU, made once for a file; None where the host has none. Copied there, it is out of the way sooner
        than in a file. Beside weights in the host's memory it would be one more."""
        if name in self._host and not self._host[name].fits(group):
            del self._host[name]
        if name not in self._host:
            size = sum(t.numel() * t.element_size() for t in group.values())
            if not _copies_in_memory(state, size):
                return None
            self._host[name] = Staging(group)
        return self._host[name]

    def _give_rows(self, group: Mapping[str, Tensor]) -> None:
        """This rank's part of tensors that another rank writes."""
        for _ in gathered(group):
            self._alive()

    def _fail(self, e: Exception, part: Path | None, target: Path) -> None:
        self.problem, self._written = e, None
        if part is not None:
            try:
                abandon(part, target)
            except OSError:
                return  # the next process of the run sweeps


def _copies_in_memory(state: State, size: int) -> bool:
    return state.model.device.kind == "cuda" and free_host_memory() > size + _SPARE_MEMORY
