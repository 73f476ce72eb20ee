"""Whether a run directory may be gone on with: what it was begun with, and what has changed since."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from educe.config import Recipe
from educe.config.hints import hint_of, knobs_of
from educe.errors import RunError, UsageError
from educe.files.atomic import MANIFEST, recover, told, write_json, write_text
from educe.files.run_dir import RunDir
from educe.model.source import Say
from educe.recipes.prepare import Prepared
from educe.recipes.provenance import steps_done
from educe.training.checkpoint import newest_checkpoint, newest_first, step_of

Found = tuple[Path, dict[str, Any]]
"""A checkpoint that verified, and its manifest."""

# What a checkpoint's tensors are made for: with another, they would not fit or would mean something else.
_FIXED = ("model", "tuning.")
# Follows from others: told only where it alone has changed.
_DERIVED = ("prepared",)
# Of what rows a step is made does not follow from these.
_SAME_ROWS = tuple(
    f"train.{name}"
    for name in (
        "learning_rate",
        "schedule",
        "warmup_share",
        "weight_decay",
        "betas",
        "clip_norm",
        "loss",
        "rates",
        "kl_to_base",
    )
)


def last_of(run: RunDir, say: Say) -> Found | None:
    """The newest good checkpoint, after what killed processes left behind is swept away. Only under the run's lock.

    Raises `RunError` where a finished run has none: to train it anew is for its owner to say, and not a byte of it is changed.
    """
    with told(run.path):
        recover(run.path)
        recover(run.checkpoints)
    done = ended_after(run)
    if done is None:
        return newest_checkpoint(run.checkpoints, say, quarantine=True)
    heard: list[str] = []
    found = newest_checkpoint(run.checkpoints, heard.append)
    if found is None:
        raise lost(run, done, heard)
    if not found[1]["finished"]:
        newest_checkpoint(run.checkpoints, say, quarantine=True)
        first = int(found[1]["step"]) + 1
        what = "damaged" if heard else "gone"
        say(
            f"warning: the run was finished, and its final weights are {what}: steps {first} to {done} are trained again"
        )
    return found


def ended_after(run: RunDir) -> int | None:
    """After which step a run was finished, as provenance.json says or, where that is lost, a checkpoint's manifest that need not be
    whole; None for one that was not."""
    if (done := steps_done(run)) is not None:
        return done
    for checkpoint in newest_first(run.checkpoints):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["finished"] is True:
                return step_of(checkpoint)
    return None


def lost(run: RunDir, done: int, heard: Collection[str]) -> RunError:
    """That a finished run has no whole checkpoint; `heard`: what is wrong with those that are there."""
    broken = " ".join(heard) or f"{run.checkpoints.name} is empty."
    found = f"was trained to its end, {done} steps, and its weights are lost: {broken}"
    fix = (
        f"Put {run.checkpoints} back from a copy. What was exported of the run is whole by itself. To train it anew, "
        f"give the recipe another `name:` or delete {run.path}."
    )
    return RunError(3, str(run.path), found, fix)


def planned_ranks(run: RunDir, found: Found | None, here: int, *, chosen: bool, say: Say) -> int:
    """For how many ranks the run's packs are dealt: as many as it began with, whatever number goes on with it.

    Raises `RunError` where that is not `here` and nobody chose so: other ranks round otherwise, the bits would not be the same.
    """
    began = int(found[1]["settings"]["ranks"]) if found is not None else here
    if began == here or (found is not None and found[1]["finished"]):
        return began
    if not chosen:
        is_now = f"was begun on {began} devices, and this is {here}."
        fix = f"--devices {began} goes on to the same bits; --devices {here} on the same rows, rounded otherwise."
        raise RunError(201, str(run.path), is_now, fix)
    say(f"begun on {began} devices, going on with {here}: the same rows a step and the same gradients but for rounding")
    return began


def changes_since(
    run: RunDir, found: Found | None, recipe: Recipe, settings: Mapping[str, Any], allowed: Collection[str], say: Say
) -> list[dict[str, Any]]:
    """What is to be changed in the middle of a run: fields, old and new values, the step. Empty where all is as it was.

    Raises `RunError` for a change that nobody allowed, and for one that no checkpoint could be gone on with.
    """
    for field in allowed:
        _refuse_unknown(field, settings)
    if found is None:
        return []
    old, step = found[1]["settings"], int(found[1]["step"])
    changed = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
    changed = [k for k in changed if k not in _DERIVED] or changed
    idle = [k for k in allowed if k not in changed]
    if not changed:
        if idle:
            say(f"--allow {' '.join(idle)}: that is as this run has it")
        return []
    where, finished = str(run.path), bool(found[1]["finished"])
    fixed = [k for k in changed if k.startswith(_FIXED)]
    refused = [k for k in changed if k not in allowed]
    of_code = [k for k in changed if k == "code.version"]  # of which all else may follow
    first = next(iter(of_code or fixed or refused or changed))
    what = f"{first} was {_brief(old.get(first))}, now {_brief(settings.get(first))}"
    others = [k for k in changed if k != first]
    more = f" (and {len(others)} more: {', '.join(others)})" if others else ""
    if finished or fixed or refused:
        anew = "Give the recipe another `name:`"
        flags = " ".join(f"--allow {_quoted(k)}" for k in changed)
        fix = f"{anew}, or go on with it changed: {flags}" if not (finished or fixed) else f"{anew}."
        if finished:
            fix = f"{anew}; to train these weights further, set `model: {run.path}` in that recipe."
        useless = f" (--allow {idle[0]}: that has not changed.)" if idle else ""
        began = f"was {'trained' if finished else 'begun'} with other settings: {what}{more}.{useless}"
        raise RunError(201, where, began, fix)
    rows = "" if all(k.startswith(_SAME_ROWS) for k in changed) else ". Rows may come twice or never"
    say(f"going on from step {step} with other settings, as allowed: {what}{more}{rows}")
    return [{"step": step, "field": k, "old": old.get(k), "new": settings.get(k)} for k in changed]


def _refuse_unknown(field: str, settings: Mapping[str, Any]) -> None:
    """Raises `UsageError` for a name that is never compared, with the one that is, as far as that can be told."""
    if field in settings:
        return
    whole = next((k for k in settings if field.startswith(f"{k}.")), None)
    if whole is not None:
        raise UsageError(
            101, "--allow", f"{field} is a part of {whole}, which is compared as a whole.", f"--allow {whole}"
        )
    if field in dict(knobs_of(Recipe)):
        fix = "Leave it out: it may change at any time, or what follows from it is named by the refusal."
        raise UsageError(101, "--allow", f"{field} is not compared: nothing that a run has learned depends on it.", fix)
    last = field.rpartition(".")[2]
    near = [k for k in settings if k.rpartition(".")[2] == last] or difflib.get_close_matches(
        field, list(settings), 1, 0.4
    )
    fix = hint_of(last) or (f"Did you mean {near[0]}?" if near else "It is the field that the refusal names.")
    raise UsageError(101, "--allow", f"{field!r} is no setting of a run.", fix)


def take(
    run: RunDir, recipe: Recipe, settings: dict[str, Any], text: str, file: Path | None, prepared: Prepared,
    say: Say,
) -> None:  # fmt: skip
    """Make the run directory this recipe's; `file`: where that lies."""
    old = _begun_with(run)
    changed = [k for k in {**old, **settings} if old.get(k) != settings.get(k)] if old else []
    if changed and not run.checkpoints.is_dir():
        say(f"{run.path} was begun with other settings ({changed[0]}) and holds no checkpoint: beginning anew")
    write_text(run.recipe, text)
    resolved = {"recipe": recipe.model_dump(mode="json"), "settings": settings}
    write_json(run.resolved, resolved | ({"file": str(file.absolute())} if file is not None else {}))
    write_text(run.path / "preview.json", (prepared.path / "preview.json").read_text(encoding="utf-8"))


def how_of(run: RunDir, found: Found | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier process of the run decided on this machine: device, memory plan, compiled or not, ranks. Empty where there was
    none. A checkpoint knows; before the first one, provenance.json does."""
    if found is not None:
        how: dict[str, Any] = found[1]["how"]
        return how
    if _begun_with(run) != settings:
        return {}
    try:
        earlier = run.load(run.provenance)
        return {
            k: earlier[k]
            for k in ("device", "memory", "packed", "compiled", "ranks", "packages", "threads", "started", "changes")
        }
    except (RunError, KeyError, TypeError):
        return {}


def other_bits(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What to say where a run goes on in other versions or with another number of threads: it may round otherwise."""
    before, here = ({**how.get("packages", {}), "threads": how.get("threads")} for how in (earlier, now))
    other = [f"{k} was {before[k]}, now {v}" for k, v in here.items() if k in before and before[k] not in (v, None)]
    return f"warning: the bits may differ from here on: {'; '.join(other)}" if other else ""


def refuse_other_plan(run: RunDir, found: Found, plan_hash: str, num_steps: int, changes: Collection[Any]) -> None:
    """The steps ahead must be those that the checkpoint was made for. Raises `RunError`."""
    manifest = found[1]
    if manifest["step"] >= num_steps and not manifest["finished"]:
        is_now = f"is at step {manifest['step']}, and its steps are {num_steps} now: nothing is left to train."
        raise RunError(201, str(run.path), is_now, "Give the recipe another `name:`, or a longer run.")
    if manifest["plan"] != plan_hash and not changes:
        is_now = f"was begun with another plan of packs: it was {manifest['plan'][:12]}, now {plan_hash[:12]}."
        fix = "Go on on the machine and with the versions that began it (provenance.json), or give another `name:`."
        raise RunError(201, str(run.path), is_now, fix)


def _begun_with(run: RunDir) -> dict[str, Any]:
    """The settings in recipe.resolved.json; empty where that is missing or damaged."""
    try:
        settings = run.load(run.resolved)["settings"]
    except (RunError, KeyError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _quoted(field: str) -> str:
    return field if re.fullmatch(r"[\w./-]+", field) else f"'{field}'"


def _brief(value: Any) -> str:
    """A hash by its beginning, anything else up to 60 characters."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
