"""`educe blend`: the base model and the tuned one mixed in several shares, each measured on dev and on text that nobody tuned for.

Nothing is trained and no test row is read. What is found lies in RUN/blend/.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from educe.config import Recipe
from educe.errors import RecipeError, RunError, UsageError
from educe.evaluate.blends import Choice, Point, choose
from educe.evaluate.compare import grade
from educe.evaluate.drift import Drift, Texts
from educe.files.atomic import directory, verify, write_json, write_text
from educe.files.run_dir import RunDir
from educe.model.blended import Blend, blended, read_packed
from educe.model.device import CLOSE_OTHERS, Device, release_free_memory, told_of_memory
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.recipes.answers import Asked, answered, questions_of
from educe.recipes.eval import answering_device, data_of, final_weights, recipe_of
from educe.recipes.export import export, refuse_early
from educe.recipes.export_card import base_name
from educe.recipes.forgetting import general_texts
from educe.recipes.grading import grading_of
from educe.recipes.prepare import Prepared
from educe.recipes.wanted import metric_of, refuse
from educe.report.blend_page import build_blend_page
from educe.seeds import derive, permute
from educe.stats import paired_means, wilson
from educe.training.checkpoint import WEIGHTS, newest_first, step_of

ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)
MOST_ROWS = 500


class BlendScreen(Protocol):
    """Where blending shows its progress."""

    def answers(self, label: str, done: int, total: int) -> None: ...

    def measured(self, point: Point) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for. No `alphas`: the usual ones, or 1 with an `average`, which is "last:3" or "40,80". `general`: a text file
    in place of the package's own. At most `rows` dev rows. `out`: the chosen blend is exported there as `form`."""

    alphas: tuple[float, ...] = ()
    average: str = ""
    general: Path | None = None
    rows: int = MOST_ROWS
    out: Path | None = None
    form: str = "merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """What every blend is measured on."""

    recipe: Recipe
    prepared: Prepared
    device: Device
    packs: bool
    dev: Texts
    general: Texts
    bytes_R: tuple[float, ...]
    asked: list[Asked]
    source: str


@told_of_memory("blending", CLOSE_OTHERS)
def blend(run: RunDir, wish: Wish, say: Say, screen: BlendScreen) -> Choice:
    """Measure, choose, write RUN/blend/, export where asked. Raises `RunError` for an unfinished run, `UsageError`, `RecipeError`
    without dev rows."""
    recipe = recipe_of(run)
    refuse(
        recipe,
        "preference",
        "blends are chosen by the loss of answers",
        "`educe eval {chain}` shows what it gave and took.",
    )
    alphas = _alphas(wish)
    own = final_weights(run, say)
    steps, files = _averaged(run, wish.average) if wish.average else ((), (own,))
    if wish.out is not None:
        refuse_early(recipe, wish.out, wish.form, Blend(alpha=min(a for a in alphas if a), weights=files))
    device = answering_device(recipe, run, say)
    scale = _scale(run, recipe, wish, device, say)
    blends = [(Blend(alpha=a, weights=files), steps if a else ()) for a in alphas]
    if steps:  # beside a mean, the run's own weights
        blends.append((Blend(alpha=1, weights=(own,)), ()))
    say(_announced(scale, len(blends), steps))
    points = _points(scale, blends, screen)
    named = next(p for p in points if p.alpha == wish.alphas[0]) if len(wish.alphas) == 1 else None
    choice = choose(points, named)
    _write(run, scale, points, choice)
    if wish.out is not None:
        if choice.point is None:
            found = "on dev no blend is better than the base model: nothing was exported."
            raise UsageError(101, "--out", found, "Name one to export all the same: --alpha 0.5 --out DIR")
        chosen, of = blends[points.index(choice.point)]
        export(run, wish.out, say, wish.form, blend=chosen if chosen.alpha < 1 or of else None, asked=False)
    return choice


def _alphas(wish: Wish) -> tuple[float, ...]:
    """Those asked for, by size, and the base model, which all are compared with."""
    given = wish.alphas or ((1.0,) if wish.average else ALPHAS)
    if not all(0 <= a <= 1 for a in given):
        wrong = next(a for a in given if not 0 <= a <= 1)
        raise UsageError(101, "--alpha", f"{wrong:g} is not between 0 and 1.", "0 is the base model, 1 the tuned one.")
    if wish.out is not None and set(given) == {0.0}:
        raise UsageError(101, "--alpha", "0 is the base model itself.", "Name another to export.")
    ends = () if wish.average else (1.0,)
    return tuple(sorted({0.0, *given, *ends}))


def _averaged(run: RunDir, which: str) -> tuple[tuple[int, ...], tuple[Path, ...]]:
    """Steps and weights files of the checkpoints asked for, all of them whole. Raises `UsageError`, `RunError`."""
    there = {step_of(p): p for p in newest_first(run.checkpoints)}
    kind, _, count = which.partition(":")
    if kind == "last" and count.isdecimal() and int(count) > 0:
        wanted = sorted(there)[-int(count) :]
        missing = int(count) - len(wanted)
    else:
        try:
            wanted = sorted({int(s) for s in which.split(",")})
        except ValueError as e:
            found = f"{which[:40]!r} names no checkpoints."
            raise UsageError(101, "--average", found, "Such as last:3, or steps: 40,80,120.") from e
        missing = len(set(wanted) - there.keys())
    if missing:
        found = f"has the checkpoints of steps {', '.join(map(str, sorted(there)))}; {missing} of those asked for are not there."
        fix = (
            "A finished run keeps its last one alone. Train again with, say, train.checkpoint_every_steps: 50 and "
            "train.keep_every_steps: 50: then those of steps 50, 100, ... stay too."
        )
        raise RunError(2, str(run.checkpoints), found, fix)
    for step in wanted:
        fault = verify(there[step])
        if isinstance(fault, str):
            raise RunError(2, str(there[step]), f"is damaged: {fault}", "Average others.")
    return tuple(wanted), tuple(there[s] / WEIGHTS for s in wanted)


def _scale(run: RunDir, recipe: Recipe, wish: Wish, device: Device, say: Say) -> _Scale:
    prepared = data_of(run, recipe, say)
    store = prepared.store("dev")
    all_rows = np.unique(store.rows)
    if all_rows.size < 2:
        raise RecipeError(201, "data.dev", "has fewer than 2 rows to compare blends on.", "Give it a file or a share.")
    chosen = np.sort(all_rows[permute(all_rows.size, derive(recipe.train.seed, "blend"))[: max(2, wish.rows)]])
    examples = np.flatnonzero(np.isin(store.rows, chosen))
    packs = bool(run.load(run.provenance)["packed"])
    capacity = recipe.train.micro_batch_tokens if packs else 1
    general, bytes_R = general_texts(prepared, recipe, wish.general, packs=packs)
    asked: list[Asked] = []
    if metric_of(recipe).kind == "pass_at_k":
        say("programs of the model are not run here: blends go by dev loss alone")
    elif metric_of(recipe).kind != "text":
        asked = questions_of(prepared, recipe, "dev", wish.rows)
    return _Scale(
        recipe=recipe,
        prepared=prepared,
        device=device,
        packs=packs,
        dev=Texts([store[int(i)] for i in examples], np.searchsorted(chosen, store.rows[examples]).tolist(), capacity),
        general=general,
        bytes_R=bytes_R,
        asked=asked,
        source=wish.general.name if wish.general is not None else "",
    )


def _announced(scale: _Scale, num: int, steps: Sequence[int]) -> str:
    of = f" of the mean of steps {', '.join(map(str, steps))}" if steps else ""
    answers = f"{len(scale.asked)} dev rows, drawn apart, to answer, " if scale.asked else ""
    text = scale.source or "educe's own general text"
    return (
        f"{num} blends{of}, each measured on {scale.dev.num_rows} dev rows, {answers}and "
        f"{sum(scale.bytes_R) / 1000:.0f} kB of {text}; {scale.device.kind}, {scale.device.dtype}. No test row is read"
    )


def _points(scale: _Scale, blends: Sequence[tuple[Blend, tuple[int, ...]]], screen: BlendScreen) -> list[Point]:
    """Every blend measured, the base model first; one model in memory at a time."""
    points: list[Point] = []
    at_base: tuple[Drift, Drift] | None = None
    new_ids = scale.prepared.tokenizer.new_tokens.values()
    for b, steps in blends:
        began = time.perf_counter()
        model = blended(scale.prepared.model_dir, b, scale.recipe.tuning, scale.device, new_ids=new_ids)
        read_packed(model, scale.packs)
        if at_base is None:
            scale.dev.remember(model)
            scale.general.remember(model)
        found = scale.dev.drift(model), scale.general.drift(model)
        at_base = at_base or found
        right = _right(scale, model, f"{b.alpha:g}", screen) if scale.asked else None
        del model
        release_free_memory()
        points.append(
            Point(
                alpha=b.alpha,
                steps=steps,
                **_numbers(scale, found, at_base),
                right=right,
                asked=len(scale.asked),
                seconds=round(time.perf_counter() - began, 3),
            )
        )
        screen.measured(points[-1])
    return points


def _numbers(scale: _Scale, found: tuple[Drift, Drift], base: tuple[Drift, Drift]) -> dict[str, Any]:
    weights_R, tokens, size = scale.dev.weights_R, sum(scale.general.weights_R), sum(scale.bytes_R)
    bits, base_bits = ([n / math.log(2) for n in d[1].nll_R] for d in (found, base))
    gained = paired_means(found[0].nll_R, base[0].nll_R, weights_R)
    return {
        "loss": math.fsum(found[0].nll_R) / math.fsum(weights_R),
        "gained": gained,
        "kl": math.fsum(found[0].kl_R) / math.fsum(weights_R),
        "general": math.fsum(bits) / size,
        "lost": paired_means(base_bits, bits, scale.bytes_R),
        "general_kl": math.fsum(found[1].kl_R) / tokens,
    }


def _right(scale: _Scale, model: CausalLM, label: str, screen: BlendScreen) -> int:
    """How many of the dev questions are answered right."""
    given = answered(
        model, scale.prepared, scale.recipe, scale.asked, label, lambda name, n, of: screen.answers(name, n, of)
    )
    grading = grading_of(scale.recipe.evaluation.metric, lambda _: None, allow_code=False)
    lines = grade([a.question for a in scale.asked], given, grading.grader)
    return sum(bool(line["correct"]) for line in lines)


def _write(run: RunDir, scale: _Scale, points: Sequence[Point], choice: Choice) -> None:
    """blend.json and blend.html, both or neither."""
    provenance = run.load(run.provenance)
    about: dict[str, Any] = {
        "name": scale.recipe.name,
        "model": base_name(scale.recipe),
        "tuning": scale.recipe.tuning.model_dump(),
        "steps": provenance["weights_step"],
        "device": {"kind": scale.device.kind, "dtype": scale.device.dtype, "name": scale.device.name},
        "metric": metric_of(scale.recipe).kind,
        "dev_rows": scale.dev.num_rows,
        "general": {"file": scale.source or None, "bytes": int(sum(scale.bytes_R)), "passages": len(scale.bytes_R)},
        "points": [_as_json(p) for p in points],
        "choice": {"alpha": choice.point.alpha if choice.point else None, "by": choice.by, "text": choice.text,
                   "point": points.index(choice.point) if choice.point else None},
    }  # fmt: skip
    with directory(run.blend, about={"stage": "blend", "run": run.path.name}) as part:
        write_json(part / "blend.json", about)
        write_text(part / "blend.html", build_blend_page(about))


def _as_json(p: Point) -> dict[str, Any]:
    score = asdict(wilson(p.right, p.asked)) if p.right is not None else None
    return {**asdict(p), "label": p.label, "score": score}
