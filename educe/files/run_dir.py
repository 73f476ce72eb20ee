"""The run directory: what is in it, who may write to it, and which one is the latest.

recipe.yaml            as given
recipe.resolved.json   every setting with its value; absolute paths; where the recipe lies
provenance.json        versions, machine, hashes of model, template and data
preflight.json         the checks before the first step and after the last
ledger.jsonl           what happened to every input row
metrics.jsonl          one line a step, one a held-out measurement
samples.jsonl          held-out prompts answered before, during and after training
checkpoints/step-N/    atomic, with a manifest
kept                   `educe curve --keep` made the run: no later curve deletes it
stacks/rank-N.txt      where a run hung that its watchdog ended
answers/NAME.jsonl     stored answers, re-gradable
scores.json            what they scored, and what was forgotten
general.jsonl          general questions answered before and after
shift.json             where the tuned model's answers leave the base model
judged/NAME.jsonl      verdicts of a judge, re-gradable; NAME.json what they add up to
suites/NAME/*.jsonl    answers to a public benchmark, re-gradable; suites/NAME.json their scores
suites/choices-NAME/   ranked options of the questions of NAME.jsonl, a line each; suites/choices-NAME.json their accuracies
report.html            one page, no network

A run of stages is a directory of such directories, one for each stage (1-NAME/, 2-NAME/ ...), and holds besides:

recipe.yaml            as given
stages.resolved.json   every setting, and the stages' directories
0-random/              the model, where it is made from scratch
measured/KEY/          what was measured of one model, row by row, and its answers
stage_scores.json      what each stage gave and took
report.html            the page of it
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shlex
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from educe.errors import RunError
from educe.files.atomic import make_private, told
from educe.files.jsonl import read_jsonl
from educe.files.locks import take

# Who writes what training does not.
_OTHERS = {
    **dict.fromkeys(("answers", "scores.json", "general.jsonl", "shift.json", "suites"), "eval"),
    "judged": "judge",
    "blend": "blend",
}


class RunDir:
    """Paths of one run. Making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.resolved = path / "recipe.resolved.json"
        self.provenance = path / "provenance.json"
        self.preflight = path / "preflight.json"
        self.ledger = path / "ledger.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.stacks = path / "stacks"
        self.answers = path / "answers"
        self.scores = path / "scores.json"
        self.general = path / "general.jsonl"
        self.shift = path / "shift.json"
        self.judged = path / "judged"
        self.suites = path / "suites"
        self.report = path / "report.html"
        self.blend = path / "blend"

    @property
    def has_ended(self) -> bool:
        """Whether it was trained to its end. Raises `RunError` where its provenance is damaged."""
        held = self.load(self.provenance) if self.provenance.is_file() else None
        return isinstance(held, dict) and held.get("finished") is not None

    @property
    def goes_on(self) -> str:
        """The command that trains it on: with the recipe it was begun with, where that is there, else with the run's copy of it."""
        try:
            given = Path(json.loads(self.resolved.read_text(encoding="utf-8"))["file"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            given = Path("RECIPE")
        if not given.is_file() and self.recipe.is_file():
            given = self.recipe.absolute()
        here = Path.cwd()
        return f"educe train {shlex.quote(str(given.relative_to(here) if given.is_relative_to(here) else given))}"

    def _made_by(self, file: Path) -> str:
        """The command that writes a file of this run."""
        part = file.relative_to(self.path).parts[0] if file.is_relative_to(self.path) else ""
        verb = _OTHERS.get(part)
        return self.goes_on if verb is None else f"educe {verb} {shlex.quote(str(self.path))}"

    def load(self, file: Path) -> Any:
        """A JSON or JSONL file of this run; `RunError` when it is not there yet."""
        try:
            return read_jsonl(file) if file.suffix == ".jsonl" else json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            raise RunError(2, str(file), "is not there yet.", f"Run `{self._made_by(file)}` first.") from e
        except (ValueError, RecursionError) as e:
            raise RunError(2, str(file), f"is damaged: {e}.", f"Run `{self._made_by(file)}` again.") from e

    @contextlib.contextmanager
    def lock(self, verb: str = "train") -> Iterator[None]:
        """Only one process may train in a run, or evaluate it. The lock dies with its process, however that ends. Raises `RunError`
        that says who holds it."""
        with told(self.path):
            make_private(self.path)
            handle = (self.path / ".lock").open("a+b", buffering=0)
        with handle:
            if not take(handle.fileno()):
                raise RunError(202, str(self.path), _holder(handle), "Wait for it, or stop it first.")
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            _note(handle, f"`educe {verb}`, process {os.getpid()} on {socket.gethostname()}, since {since}")
            try:
                yield
            finally:
                _note(handle, "")

    def still_there(self) -> None:
        """Raises `RunError` where the locked directory was deleted or moved: another process could begin in its place."""
        if not (self.path / ".lock").exists():
            found = "was deleted or moved while this process trained in it."
            raise RunError(204, str(self.path), found, "Move it back and give the same command, or begin anew.")


def _note(handle: IO[bytes], said: str) -> None:
    """Who holds the lock, for whoever is refused."""
    with contextlib.suppress(OSError):  # a disk that is full: it is locked all the same
        handle.truncate(0)
        handle.write(said.encode())


def _holder(handle: IO[bytes]) -> str:
    said = ""
    with contextlib.suppress(OSError):  # Windows lets no other process read what is locked
        handle.seek(0)
        said = handle.read(300).decode("utf-8", "replace").strip()
    return f"is in use by another process{': ' * bool(said)}{said}."


# Of a run of stages: its recipe, and the directories of its stages by name.
STAGES, STAGE_SCORES = "stages.resolved.json", "stage_scores.json"


def is_staged(path: Path) -> bool:
    """Whether a directory is one of a run of stages."""
    return (path / STAGES).is_file()


def stages_of(path: Path) -> dict[str, RunDir]:
    """The runs of a run of stages, by the stages' names, in order. Raises `RunError`."""
    held = RunDir(path).load(path / STAGES)
    places = held.get("stages") if isinstance(held, dict) else None
    if not isinstance(places, dict) or not all(
        isinstance(p, str) and re.fullmatch(r"\d+-\w[\w.-]*", p, re.ASCII) for p in places.values()
    ):
        found = "is damaged, or was written by another version."
        raise RunError(2, str(path / STAGES), found, "Give the same `educe train` again.")
    return {name: RunDir(path / place) for name, place in places.items()}


def last_stage(path: Path) -> RunDir:
    """The run that the longest chain of stages ends with. Raises `RunError` where it has not begun."""
    runs, named = stages_of(path), RunDir(path).load(path / STAGES).get("last")
    last = runs[named] if isinstance(named, str) and named in runs else list(runs.values())[-1]
    if not last.resolved.is_file():
        raise RunError(2, str(last.path), "is not trained yet.", "Give the same `educe train` again: it goes on.")
    return last


def find_run(given: Path | None, runs: Path) -> RunDir:
    """The run that `find_place` finds; a run of stages is refused, and its stages are named."""
    place = find_place(given, runs)
    if is_staged(place):
        there = [str(run.path) for run in stages_of(place).values()]
        found = "is a run of stages." if given is not None else "is the latest run, and one of stages."
        raise RunError(1, str(place), found, f"Name one of its stages: {', '.join(there)}.")
    return RunDir(place)


def find_place(given: Path | None, runs: Path) -> Path:
    """The run or run of stages at `given`, or the latest one under `runs` or under a directory of that name one level below.

    Latest by the last write of settings or metrics.
    """
    if given is not None:
        if not (given / "recipe.resolved.json").is_file() and not is_staged(given):
            raise _no_run(given, _known(runs))
        return given
    found = _known(runs)
    if not found:
        raise RunError(1, str(runs), "holds no run.", "Train one with `educe train RECIPE`, or name its directory.")
    return max(found, key=last_touched)


def _known(runs: Path) -> list[Path]:
    return [
        p.parent
        for name in ("recipe.resolved.json", STAGES)
        for p in (*runs.glob(f"*/{name}"), *runs.parent.glob(f"*/{runs.name}/*/{name}"))
    ]


def _no_run(given: Path, known: list[Path]) -> RunError:
    """What is there instead, and which run may be meant."""
    fix = "Give a directory that `educe train` made."
    near = difflib.get_close_matches(given.name, [p.name for p in known], 1, 0.6)
    if near:
        fix = f"Did you mean {next(p for p in known if p.name == near[0])}?"
    elif known:
        fix = f"Give one that `educe train` made, such as {max(known, key=last_touched)}."
    if not given.exists():
        return RunError(1, str(given), "does not exist.", fix)
    if given.is_file():
        return RunError(1, str(given), "is a file, and a run is a directory.", fix)
    if within := [p.parent for p in given.glob("*/recipe.resolved.json")]:
        fix = f"Give one of them, such as {max(within, key=last_touched)}."
        return RunError(1, str(given), "holds runs and is none itself.", fix)
    if (given / "config.json").is_file() or (given / "adapter_config.json").is_file():
        return RunError(1, str(given), "is a model, and no run.", fix)
    return RunError(1, str(given), "is not a run directory.", fix)


def last_touched(run: Path) -> float:
    """When settings or metrics were written last; of a run of stages those of any stage."""
    names = ("recipe.resolved.json", "metrics.jsonl")
    there = [f for n in names for f in ((run / n), *(run.glob(f"*/{n}") if is_staged(run) else ()))]
    return max((f.stat().st_mtime for f in [*there, run / STAGES] if f.exists()), default=0.0)
