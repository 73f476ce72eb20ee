"""Metrics to TensorBoard, Weights & Biases, MLflow or trackio, each through its own client. What a run needs stays in its directory:
a client that fails while it trains is left out, and said."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from educe.config import Recipe
from educe.errors import MachineError
from educe.files.hashes import hash_json
from educe.files.run_dir import RunDir
from educe.model.source import Say
from educe.recipes.finding import Before, Finding, finding

PROJECT = "educe"  # where the client's own environment variable names no other
_STEP = ("loss", "objective", "entropy", "target_p", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_bytes")


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def end(self) -> None: ...


class _TensorBoard:
    """Event files under RUN/tensorboard; what a killed process wrote of later steps is purged."""

    def __init__(self, run: RunDir, recipe: Recipe, run_id: str, step: int) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of W&B, gone on with by its id; WANDB_PROJECT, WANDB_MODE and the key are read by the client."""

    def __init__(self, run: RunDir, recipe: Recipe, run_id: str, step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=recipe.name,
            id=run_id,
            resume="allow",
            dir=str(run.path),
            config=recipe.model_dump(mode="json"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of MLflow, found again by a tag; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are read here or by the client."""

    def __init__(self, run: RunDir, recipe: Recipe, run_id: str, step: int) -> None:
        importlib.import_module("mlflow")
        self._client = importlib.import_module("mlflow.tracking").MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        there = self._client.get_experiment_by_name(name)
        experiment = there.experiment_id if there is not None else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.`educe.id` = '{run_id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
        else:
            self._id = self._client.create_run(experiment, tags={"educe.id": run_id}, run_name=recipe.name).info.run_id
            self._client.log_dict(self._id, recipe.model_dump(mode="json"), "recipe.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def end(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    """A run of trackio, in its own directory (TRACKIO_DIR)."""

    def __init__(self, run: RunDir, recipe: Recipe, run_id: str, step: int) -> None:
        trackio: Any = importlib.import_module("trackio")
        config = recipe.model_dump(mode="json")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{recipe.name}-{run_id}",
            resume="allow",
            config={k: v for k, v in config.items() if not k.startswith("_")},
            embed=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self) -> None:
        self._run.finish()


# The open family: one class, one line.
TRACKERS: dict[str, Callable[[RunDir, Recipe, str, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def values_of(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as names and finite numbers."""
    made: dict[str, Any] = {}
    if line["kind"] == "step":
        made = {f"train/{name}": line.get(name) for name in _STEP}
        made |= {f"train/task_loss/{task}": loss for task, loss in line.get("tasks", {}).items()}
    elif line["kind"] == "dev":
        made = {"dev/loss": line["loss"]} | {f"dev/task_loss/{t}": loss for t, loss in line.get("tasks", {}).items()}
    elif line["kind"] == "score":
        of = "dev" if line["weights_step"] == line["step"] else "kept"  # the best weights, measured after the last step
        made = {f"{of}/right": line["right"] / line["rows"], f"{of}/score": line["score"]["value"]}
    return {k: float(v) for k, v in made.items() if isinstance(v, int | float) and math.isfinite(v)}


@contextlib.contextmanager
def tracking(
    recipe: Recipe, run: RunDir, started: str, step: int, say: Say
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes lines of metrics.jsonl. The same run of a client goes on where `started` and the place are the same.

    Raises `MachineError` where a client is missing or refuses to begin.
    """
    run_id = hash_json([str(run.path.resolve()), started])[:16]
    trackers = {name: _begun(name, run, recipe, run_id, step) for name in recipe.train.log_to}

    def each(act: Callable[[Tracker], None], what: str) -> None:
        for name, tracker in list(trackers.items()):
            try:
                act(tracker)
            except Exception as e:  # whatever a client does wrong, the run is not harmed
                del trackers[name]
                say(
                    f"warning: {name} failed {what}: {type(e).__name__}: {e}. Nothing more goes there; metrics.jsonl has all."
                )

    try:
        yield lambda line: each(lambda t: t.log(values_of(line), line["step"]), f"at step {line['step']}")
    finally:
        each(lambda t: t.end(), "at the end")


def _begun(name: str, run: RunDir, recipe: Recipe, run_id: str, step: int) -> Tracker:
    if missing(name):
        raise MachineError(
            1, name, "is not installed.", f"pip install 'educe[{name}]', or take it out of train.log_to."
        )
    try:
        return TRACKERS[name](run, recipe, run_id, step)
    except Exception as e:  # clients raise what they like
        fix = "See its message; without it: take it out of train.log_to."
        raise MachineError(7, name, f"cannot begin: {type(e).__name__}: {e}.", fix) from e


def missing(name: str) -> bool:
    """Whether the client's package is not there. A directory of that name, as clients leave behind, is none."""
    spec = importlib.util.find_spec(name)
    return spec is None or spec.origin is None


def trackers_are_there(b: Before) -> Finding:
    """P65: the clients of train.log_to are installed."""
    wanted = b.recipe.train.log_to
    gone = [name for name in wanted if missing(name)]
    said = "; ".join(f"{n} is not installed: pip install 'educe[{n}]'" for n in gone) or "installed"
    said = said if wanted else "train.log_to names none; metrics.jsonl has all"
    return finding("P65", "metrics elsewhere", ", ".join(wanted) or "-", said, fail=bool(gone), skip=not wanted)
