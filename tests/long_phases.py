"""`python long_phases.py PHASE MODEL PLACE`: a phase of a run that takes far longer than a hang may, and then one that hangs in it.

PHASE: `answers`, `save`, `wait` (for what a thread writes) or `prepare`. Real parts, each piece of them slowed down.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from educe.chat.tokens import load_tokenizer
from educe.config import Full, load_recipe
from educe.model.load import load_model
from educe.recipes import build
from educe.recipes.prepare import prepare
from educe.sample.local import LocalSampler
from educe.training import saver, streamed
from educe.training.optim import Adam, AdamSettings
from educe.training.saver import Kept, Saver
from educe.training.state import State
from educe.training.watchdog import Watchdog

from test_engine import cpu

LIMIT_S, PIECE_S, PIECES = 3.0, 0.5, 18  # together three times as long as the limit
HANGS = [False]


def a_piece() -> None:
    time.sleep(1000 if HANGS[0] else PIECE_S)


def answers(model_dir: Path, place: Path, dog: Watchdog) -> Callable[[], Any]:
    model, tokenizer = (
        load_model(model_dir, cpu("float32")),
        load_tokenizer(model_dir, load_recipe(recipe(place)).template),
    )
    model.network.register_forward_pre_hook(lambda module, args: a_piece())
    sampler = LocalSampler(model, tokenizer)
    return lambda: sampler.answer([[5, 6, 7]], PIECES, alive=dog.alive)


def state_of(model_dir: Path) -> State:
    model = load_model(model_dir, cpu("float32"), Full(kind="full"))
    return State(model=model, optimizer=Adam(model.trainable(), AdamSettings()))


def save_next(writer: Saver, state: State) -> None:
    state.step += 1
    writer.save(state, {}, finished=True, must=True)


def slow_tensors(group: Any) -> Any:
    for k, pair in enumerate(real_gathered(group)):
        if k < PIECES:
            a_piece()
        yield pair


real_gathered = streamed.gathered


def save(model_dir: Path, place: Path, dog: Watchdog) -> Callable[[], Any]:
    """Tensors are written while the run waits, as on a CPU."""
    state = state_of(model_dir)
    streamed.gathered = slow_tensors
    writer = Saver(place / "checkpoints", Kept(), print, alive=dog.alive)
    return lambda: save_next(writer, state)


def wait(model_dir: Path, place: Path, dog: Watchdog) -> Callable[[], Any]:
    """Tensors are copied, as from a GPU, and written by a thread: the run waits for that."""
    state = state_of(model_dir)
    saver._copies_in_memory = lambda state, size: True
    streamed.gathered = slow_tensors  # what writes; what copies has a name of its own
    writer = Saver(place / "checkpoints", Kept(), print, alive=dog.alive)
    return lambda: save_next(writer, state)


def recipe(place: Path) -> Path:
    ask = lambda i: [{"role": "user", "content": f"item {i}"}, {"role": "assistant", "content": f"order {i}"}]  # noqa: E731
    for k in range(PIECES):
        lines = [json.dumps({"messages": ask(i)}) for i in range(5 * k, 5 * k + 5)]
        (place / f"rows-{k:02d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file = place / "recipe.yaml"
    file.write_text(
        f"name: t\nmodel: {sys.argv[2]}\nruns: {place}/runs-{HANGS[0]}\ndata: {{train: {place}/rows-*.jsonl}}\n"
    )
    return file


def preparing(model_dir: Path, place: Path, dog: Watchdog) -> Callable[[], Any]:
    real = build.do

    def slow(part: Any, **more: Any) -> Any:
        a_piece()
        return real(part, **more)

    build.do = slow
    return lambda: prepare(load_recipe(recipe(place)), print, dog.alive)


PHASES = {"answers": answers, "save": save, "wait": wait, "prepare": preparing}

if __name__ == "__main__":
    what, model_dir, place = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dog = Watchdog(LIMIT_S, print)
    run = PHASES[what](model_dir, place, dog)
    dog.guard(place / "stacks", 0, 1, what=what, first_s=0.0)
    began = time.monotonic()
    run()
    print(f"took {time.monotonic() - began:.1f}", flush=True)
    HANGS[0] = True
    run()
