"""What one rank does in the tests of many, with the world in the environment as torchrun sets it.

What the jobs find is in PLACE/SIZE.RANK.pt, for the tests to compare.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from educe.config import Full, Lora
from educe.errors import MachineError, TrainError
from educe.files.atomic import verify
from educe.model.device import Device
from educe.model.load import load_model
from educe.model.saving import save_network
from educe.pack.batch import rank_step
from educe.pack.plan import PackPlan, plan_packs
from educe.parallel.world import World, join
from educe.preference.reference import reference_log_p
from educe.seeds import permute
from educe.training import saver as saver_room
from educe.training.checkpoint import load_checkpoint, newest_checkpoint
from educe.training.loop import LoopConfig, accumulate, counts_of, train
from educe.training.means import mean_of
from educe.training.optim import Adam, AdamSettings
from educe.training.saver import Kept, Saver
from educe.training.sft import SftLoss, held_out_loss, sft_loss
from educe.training.staging import Staging
from educe.training.state import State, StepReport
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from saving import saved
from test_engine import LORA, cpu, examples
from test_preference import LOSS, pairs

FULL = Full(kind="full")
STEPS = 4


def fresh(
    model_dir: Path,
    tuning: Full | Lora,
    world: World,
    dtype: Any = "float32",
    *,
    recomputed: int = 0,
    new_ids: tuple[int, ...] = (),
) -> State:
    torch.manual_seed(5)
    model = load_model(model_dir, cpu(dtype), tuning, new_ids=new_ids)
    model.recompute(recomputed)
    if isinstance(tuning, Lora):
        with torch.no_grad():
            for p in model.trainable().values():
                p.add_(
                    0.1 * torch.randn(p.shape)
                )  # second adapter matrices begin at zero: the first would have no gradient
    if world.size > 1:
        model.shard(world)
    return State(model=model, optimizer=Adam(model.trainable(), AdamSettings(betas=(0.9, 0.99), weight_decay=0.01)))


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


class Reductions(TorchDispatchMode):
    """Counts how often gradients are added up over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "reduce_scatter" in str(function)
        return function(*args, **(kwargs or {}))


def gradients(state: State, world: World, size: int, loss: SftLoss = sft_loss) -> tuple[dict[str, Tensor], int]:
    """Of one step of twelve rows in packs of `size`, and how often they were added up over the ranks, which may have unlike numbers
    of packs."""
    rows = examples(12)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    total = sum(float(e.weights_T.astype(np.float64).sum()) for e in rows)
    mine = rank_step(groups, [1.0], world.rank, world.size)
    with Reductions() as reductions:
        for k, batch in enumerate(mine):
            with state.model.gradients(synchronised=k == len(mine) - 1):
                loss(state.model, batch, total).loss.backward()
    found = whole({n: p.grad for n, p in state.model.trainable().items() if p.grad is not None})
    state.optimizer.forget_gradients()
    return found, reductions.number


def plan_of_run(num_ranks: int) -> tuple[list[Any], PackPlan]:
    rows = examples(60, seed=3)
    lengths = np.array([e.ids_T.size for e in rows], np.int64)
    order = permute(len(rows), 1)
    return rows, plan_packs(lengths, order, batch_tokens=320, capacity_tokens=80, seed=2, num_ranks=num_ranks)


def run(state: State, world: World, until: int) -> list[StepReport]:
    """Steps of a plan for four ranks, whatever the number of ranks is."""
    rows, plan = plan_of_run(4)
    reports: list[StepReport] = []

    def stop(state: State, report: StepReport) -> bool:
        reports.append(report)
        return report.step == until

    def batches_of(step: int) -> Any:
        return rank_step([[rows[i] for i in g] for g in plan.step(step)], [1.0], world.rank, world.size)

    steps = min(STEPS, plan.num_steps)
    config = LoopConfig(
        total_steps=steps, learning_rate=1e-3, warmup_share=0.2, schedule="cosine", clip_norm=1.0, seed=1
    )
    train(state, batches_of, sft_loss, [stop], config, world=world)
    return reports


def everything(state: State) -> dict[str, Tensor]:
    return whole({**{f"weight.{n}": t for n, t in state.optimizer.masters.items()}, **state.optimizer.state_tensors()})


CASES: dict[str, tuple[Full | Lora, dict[str, Any]]] = {
    "full": (FULL, {}),
    "lora": (LORA, {}),
}
MORE: dict[str, tuple[Full | Lora, dict[str, Any]]] = {
    "recomputed": (FULL, {"recomputed": 1}),
    "new": (LORA, {"new_ids": (509, 511), "recomputed": 2}),
    "anchored": (LORA, {"recomputed": 1}),
    "dora": (LORA.model_copy(update={"variant": "dora"}), {}),
    **({"qlora": (LORA.model_copy(update={"base_bits": 4}), {})} if find_spec("bitsandbytes") else {}),
}


def gradients_of(cases: dict[str, tuple[Full | Lora, dict[str, Any]]], model_dir: Path, world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (tuning, how) in cases.items():
        state = fresh(model_dir, tuning, world, **how)
        loss = SftLoss(beta=0.5) if name == "anchored" else sft_loss
        for size in (12, 4, 1) if name == "full" else (4,):
            found[f"{name} {size}"], found[f"{name} {size} reductions"] = gradients(state, world, size, loss)
    return found


def more(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """Gradients in more ways, and losses in low precision."""
    found = gradients_of(MORE, model_dir, world)
    for name, tuning in (("full", FULL), ("lora", LORA)):
        state = fresh(model_dir, tuning, world, "bfloat16")
        found[f"bf16 {name}"] = [r.loss for r in run(state, world, 3)]
        assert all(m.dtype == torch.float32 for m in state.optimizer.masters.values())
    return found


def steps(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """Gradients, then a run with a checkpoint in the middle, gone on with from the file."""
    found: dict[str, Any] = {"each": world.each("né" * world.rank), **gradients_of(CASES, model_dir, world)}
    state = fresh(model_dir, FULL, world)
    dev = rank_step([[e] for e in examples(5, seed=9)], [1.0], world.rank, world.size)
    found["dev"] = held_out_loss(state.model, dev).over(world, 1).mean
    reports = run(state, world, 2)
    saved(place / f"of-{world.size}", state, {}, finished=False, keep=2, world=world)
    reports += run(state, world, STEPS)
    found["reports"] = [[r.step, r.loss, r.objective, r.grad_norm, r.tokens, r.trained_tokens] for r in reports]
    found["end"] = everything(state)
    again = going_on(place / f"of-{world.size}", model_dir, world)
    found["bits"] = [n for n, t in everything(again).items() if not torch.equal(t, found["end"][n])]
    return found


def going_on(checkpoints: Path, model_dir: Path, world: World) -> State:
    torch.manual_seed(99)
    state = fresh(model_dir, FULL, world)
    there = newest_checkpoint(checkpoints, print)
    assert there is not None
    load_checkpoint(*there, state)
    assert state.step == 2
    run(state, world, STEPS)
    return state


def of_pairs(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """Gradients of five preference pairs in three packs, and what is told of them."""
    rows = [e for pair in pairs() for e in pair]
    mine = rank_step([rows[:4], rows[4:6], rows[6:]], [1.0, 0.3], world.rank, world.size)
    found: dict[str, Any] = {}
    for name, tuning in (("full", FULL), ("lora", LORA)):
        state = fresh(model_dir, tuning, world)
        outs = accumulate(state, mine, counts_of(mine, world).weight, LOSS["dpo and nll"], seed=1)
        found[f"pairs {name}"] = whole({n: p.grad for n, p in state.model.trainable().items() if p.grad is not None})
        means = mean_of(mine, outs, world, 2)
        found[f"pairs {name} means"] = [means.mean, *means.by_task.values(), *astuple(means.pairs)]
        log_p = reference_log_p(state.model, mine)
        found[f"pairs {name} reference"] = world.sum(np.array([log_p.sum(), log_p.size])).tolist()
    return found


def written(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """A model that every rank writes, each to a place of its own."""
    at = place / f"written-{world.rank}"
    save_network(load_model(model_dir, cpu("float32")).network, at)
    return {"written": sorted(p.name for p in at.iterdir())}


def resharded(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """Go on from what other numbers of ranks wrote."""
    return {"resharded": {n: everything(going_on(place / f"of-{n}", model_dir, world)) for n in (1, 4)}}


def alone_sharded(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """A process that shards with itself, on the GPU where there is one: the losses of a run, sharded and not."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    found = {}
    for dtype in ("float32", "bfloat16"):
        for sharded in (False, True):
            model = load_model(model_dir, Device(kind=kind, dtype=dtype, name="", flops=1e12, why=""), FULL)
            if sharded:
                model.shard(World())
            state = State(model=model, optimizer=Adam(model.trainable(), AdamSettings()))
            losses = [[r.loss, r.grad_norm] for r in run(state, world, STEPS)]
            saved(place / f"{dtype}-{sharded}", state, {}, finished=False, keep=1)
            found[f"{dtype} {sharded}"] = losses
    return found


def spoilt(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """The last rank's second micro-batch gives no number."""
    state = fresh(model_dir, FULL, world)
    seen: list[int] = []

    def loss(model: Any, batch: Any, denominator: float) -> Any:
        seen.append(0)
        out = sft_loss(model, batch, denominator)
        bad = world.rank == world.size - 1 and len(seen) == 2
        return dataclasses.replace(out, loss=out.loss * math.nan) if bad else out

    rows = examples(8)
    mine = rank_step([[e] for e in rows], [1.0], world.rank, world.size)
    config = LoopConfig(total_steps=2, learning_rate=1e-3, warmup_share=0.0, schedule="cosine", clip_norm=1.0, seed=1)
    try:
        train(state, lambda s: mine, loss, [], config, world=world, rows_of=lambda s, m: f"rows of {world.rank}, {m}")
    except TrainError as e:
        return {"spoilt": str(e)}
    raise AssertionError


def refused(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """A checkpoint that rank 0 cannot write, then one of the same step that must be written: first in vain, then with room."""
    saver_room._PATIENCE_S = (0.01, 0.01)
    state, at = fresh(model_dir, FULL, world), place / f"refused-{world.size}"
    if world.leads:
        at.write_text("no directory")
    writer = Saver(at, Kept(), lambda line: None, world)
    writer.save(state, {}, finished=False)
    try:
        writer.save(state, {}, finished=False, must=True)
        raise AssertionError
    except MachineError:
        world.wait()
    if world.leads:
        at.unlink()
    world.wait()
    written = writer.save(state, {}, finished=False, must=True)
    return {"refused": isinstance(verify(written), dict)}


def staged(place: Path, model_dir: Path, world: World) -> dict[str, Any]:
    """Copies in memory: rank 0 has no room for one, then fails in the middle of one; then the checkpoint is written."""
    saver_room._PATIENCE_S = (0.01, 0.01)
    saver_room._copies_in_memory = lambda state, size: True
    state, at = fresh(model_dir, FULL, world), place / f"staged-{world.size}"
    writer, made, failures = Saver(at, Kept(), lambda line: None, world), [], iter((MemoryError, OSError))

    class Failing(Staging):
        def __init__(self, tensors: Any) -> None:
            made.append(1)
            if len(made) == 1:
                raise next(failures)
            super().__init__(tensors)

        def take(self, tensors: Any, alive: Any) -> Any:
            def fail() -> None:
                if error := next(failures, None):
                    raise error

            return super().take(tensors, fail)

    saver_room.Staging = Failing
    written = writer.save(state, {}, finished=False, must=True)
    saver_room.Staging = Staging
    return {"staged": [isinstance(verify(written), dict), next(failures, None) is None or not world.leads]}


JOBS = {
    "refused": refused,
    "staged": staged,
    "written": written,
    "spoilt": spoilt,
    "steps": steps,
    "more": more,
    "pairs": of_pairs,
    "resharded": resharded,
    "alone_sharded": alone_sharded,
}


def main(jobs: str, place: str, model_dir: str) -> None:
    torch.set_num_threads(1)
    here = join("cpu")
    found: dict[str, Any] = {}
    for job in jobs.split(", "):
        found |= JOBS[job](Path(place), Path(model_dir), here)
    torch.save(found, Path(place, f"{here.size}.{here.rank}.pt"))
    here.wait()
