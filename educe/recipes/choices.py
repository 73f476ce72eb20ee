"""`educe eval --choices FILE`: multiple-choice questions ranked by the untouched and the tuned model."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from educe.errors import EvalError
from educe.evaluate.choices import BY, Item, lines_of, option_of, read_items, score_options
from educe.files.atomic import make_private, told, write_json
from educe.files.hashes import hash_file
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.device import CLOSE_OTHERS, told_of_memory
from educe.model.source import Say
from educe.recipes.eval import models_of, recipe_of
from educe.recipes.prepare import Prepared
from educe.seeds import derive, permute
from educe.stats import mcnemar, paired_difference, wilson


@told_of_memory("evaluating", CLOSE_OTHERS)
def rank_choices(run: RunDir, file: Path, rows: int | None, say: Say) -> dict[str, Any]:
    """Both models' accuracies under each rule, with intervals and paired tests; writes suites/choices-NAME.json and its lines.

    `rows`: so many questions, drawn by the recipe's seed (None: all).
    """
    recipe = recipe_of(run)
    items = read_items(file)
    order = permute(len(items), derive(recipe.train.seed, "choices"))
    items = [items[i] for i in sorted(order[:rows].tolist())]
    both = models_of(run, say)
    prepared = both.prepared
    _check_room(items, prepared, describe_model(prepared.model_dir, recipe.model).max_positions)
    lines, seconds = {}, {}
    for name, model_of in (("untouched", both.untouched), ("tuned", both.tuned)):
        model, began = model_of(), time.perf_counter()
        lines[name] = lines_of(items, score_options(model, items, prepared.tokenizer, both.capacity_tokens))
        seconds[name] = time.perf_counter() - began
        del model
        say(f"{name}: {len(items)} questions ranked in {seconds[name]:.1f} s")
    both.drop()
    about = {"suite": "choices", "file": str(file), "sha256": hash_file(file), "num_rows": len(items)}
    scores = {**about, "chance": sum(1 / len(i.texts) for i in items) / len(items), **scores_of(lines, seconds)}
    place = run.suites / f"choices-{file.stem}"
    with told(place):
        make_private(place)
        for name, mine in lines.items():
            write_jsonl(place / f"{name}.jsonl", mine)
    write_json(run.suites / f"{place.name}.json", scores)
    return scores


def scores_of(lines: dict[str, list[dict[str, Any]]], seconds: dict[str, float]) -> dict[str, Any]:
    """Of each system and rule the accuracy (Wilson); of each rule the paired comparison (exact McNemar, Newcombe)."""
    right = {n: {by: [bool(x["correct"][by]) for x in mine] for by in BY} for n, mine in lines.items()}
    systems = {
        n: {by: asdict(wilson(sum(r), len(r))) for by, r in of.items()} | {"seconds": seconds[n]}
        for n, of in right.items()
    }
    comparisons = []
    for by in BY:
        before, after = right["untouched"][by], right["tuned"][by]
        won, lost, p = mcnemar(before, after)
        difference = asdict(paired_difference(before, after))
        comparisons.append({"measure": by, "won": won, "lost": lost, "p": p, "difference": difference})
    return {"systems": systems, "comparisons": comparisons}


def _check_room(items: list[Item], prepared: Prepared, positions: int) -> None:
    for item in items:
        longest = max(option_of(c, o, prepared.tokenizer).ids_T.size for c, o in item.texts)
        if longest > positions:
            found = f"has {longest} tokens, and the model {positions} positions."
            raise EvalError(3, item.row, found, "Leave the question out, or take a model with more positions.")
