"""Metrics to TensorBoard, Weights & Biases, MLflow or trackio, each through its own client. What a run needs stays in its directory:
a client that fails while it trains is left out, and said."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

from educe.config import Recipe
from educe.errors import MachineError
from educe.files.hashes import hash_json
from educe.files.run_dir import RunDir
from educe.model.source import Say
from educe.recipes.finding import Before, Finding, finding

PROJECT = "educe"  # where the client's own environment variable names no other
_STEP = ("loss", "objective", "entropy", "target_p", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_bytes")

# Lines under way at once, and how long a server of MLflow is asked again (the client's own: minutes for each line).
_BEHIND = 100
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
Outcome = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def end(self, outcome: Outcome) -> None: ...


class _TensorBoard:
    """Event files under RUN/tensorboard; what a killed process wrote of the steps that come again is purged."""

    def __init__(self, run: RunDir, recipe: Recipe, run_id: str, first: int) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(run.path / "tensorboard"), purge_step=first)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, outcome: Outcome) -> None:
        self._writer.close()


class _Wandb:
    """A run of W&B, gone on with by its id; WANDB_PROJECT, WANDB_MODE and the key are read by the client."""

    def __init__(self, run: RunDir, recipe: Recipe, run_id: str, first: int) -> None:
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

    def end(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=0 if outcome == "FINISHED" else 1)


class _Mlflow:
    """A run of MLflow, found again by a tag; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are read here or by the client. A line is
    sent beside the training; a server that is slow or away is noticed when the line is `_BEHIND` lines old, or at the end."""

    def __init__(self, run: RunDir, recipe: Recipe, run_id: str, first: int) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        self._client = _mlflow_client()
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._sent: deque[Any] = deque()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        there = self._client.get_experiment_by_name(name)
        experiment = there.experiment_id if there is not None else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.`educe.id` = '{run_id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment, tags={"educe.id": run_id}, run_name=recipe.name).info.run_id
            self._client.log_dict(self._id, recipe.model_dump(mode="json"), "recipe.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = time.time_ns() // 1_000_000
        line = [self._metric(mlflow_name(name), value, now, step) for name, value in values.items()]
        self._sent.append(self._client.log_batch(self._id, line, synchronous=False))
        if len(self._sent) > _BEHIND:
            self._sent.popleft().wait()

    def end(self, outcome: Outcome) -> None:
        while self._sent:
            self._sent.popleft().wait()
        self._client.set_terminated(self._id, status=outcome)


def mlflow_name(name: str) -> str:
    """As MLflow takes it: other signs are left out for "_", a part that is none or dots alone too, which would be another path."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    return "/".join(p if p.strip(".") else "_" * max(1, len(p)) for p in parts)[:250]


def _mlflow_client() -> Any:
    """Raises what the client raises where it has no store: the small package `mlflow-skinny` has none that it begins with."""
    return importlib.import_module("mlflow.tracking").MlflowClient()


class _Trackio:
    """A run of trackio, in its own directory (TRACKIO_DIR)."""

    def __init__(self, run: RunDir, recipe: Recipe, run_id: str, first: int) -> None:
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

    def end(self, outcome: Outcome) -> None:
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
        made |= {f"train/pairs/{name}": value for name, value in line.get("pairs", {}).items()}
    elif line["kind"] == "dev":
        made = {"dev/loss": line["loss"], "dev/kl": line.get("kl")}
        made |= {f"dev/task_loss/{task}": loss for task, loss in line.get("tasks", {}).items()}
        made |= {f"dev/pairs/{name}": value for name, value in line.get("pairs", {}).items()}
    elif line["kind"] == "score":
        of = "dev" if line["weights_step"] == line["step"] else "kept"  # the best weights, measured after the last step
        made = {f"{of}/right": line["right"] / line["rows"], f"{of}/score": line["score"]["value"]}
    return {k: float(v) for k, v in made.items() if isinstance(v, int | float) and math.isfinite(v)}


@contextlib.contextmanager
def tracking(
    recipe: Recipe, run: RunDir, started: str, first: int, say: Say
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes lines of metrics.jsonl. The same run of a client goes on where `started` and the place are the same;
    `first`: the first step that lines will be of.

    Raises `MachineError` where a client is missing or refuses to begin.
    """
    from educe.recipes.stopping import (
        Interrupted,  # loads torch and transformers; checks without a model import this file
    )

    run_id = hash_json([str(run.path.resolve()), started])[:16]
    trackers = {name: _begun(name, run, recipe, run_id, first) for name in recipe.train.log_to}

    def each(act: Callable[[Tracker], None], what: str) -> None:
        for name, tracker in list(trackers.items()):
            try:
                act(tracker)
            except Exception as e:  # whatever a client does wrong, the run is not harmed
                del trackers[name]
                say(
                    f"warning: {name} failed {what}: {type(e).__name__}: {e}. Nothing more goes there; metrics.jsonl has all."
                )

    outcome: Outcome = "FAILED"
    try:
        yield lambda line: each(lambda t: t.log(values_of(line), line["step"]), f"at step {line['step']}")
        outcome = "FINISHED"
    except (Interrupted, KeyboardInterrupt):  # the same command goes on
        outcome = "KILLED"
        raise
    finally:
        each(lambda t: t.end(outcome), "at the end")


def _begun(name: str, run: RunDir, recipe: Recipe, run_id: str, first: int) -> Tracker:
    if missing(name):
        raise MachineError(
            1, name, "is not installed.", f"pip install 'educe[{name}]', or take it out of train.log_to."
        )
    try:
        return TRACKERS[name](run, recipe, run_id, first)
    except Exception as e:  # clients raise what they like
        fix = "See its message; without it: take it out of train.log_to."
        raise MachineError(7, name, f"cannot begin: {type(e).__name__}: {e}.", fix) from e


def missing(name: str) -> bool:
    """Whether the client's package is not there. A directory of that name, as clients leave behind, is none."""
    spec = importlib.util.find_spec(name)
    return spec is None or spec.origin is None


def trackers_are_there(b: Before) -> Finding:
    """P65: the clients of train.log_to are installed, and MLflow has a store."""
    wanted = b.recipe.train.log_to
    problems = [f"{n} is not installed: pip install 'educe[{n}]'" for n in wanted if missing(n)]
    if "mlflow" in wanted and not missing("mlflow"):
        try:
            _mlflow_client()  # asks no server
        except Exception as e:  # clients raise what they like
            problems.append(f"mlflow has no store: set MLFLOW_TRACKING_URI to a server's address ({e})")
    said = "; ".join(problems) or ("installed" if wanted else "train.log_to names none; metrics.jsonl has all")
    return finding("P65", "metrics elsewhere", ", ".join(wanted) or "-", said, fail=bool(problems), skip=not wanted)
