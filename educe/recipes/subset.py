"""Part of the prepared training rows as prepared data of its own, so that a run on it is a run like any other."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
from jaxtyping import Int64

from educe.files.atomic import directory
from educe.files.hashes import hash_bytes, hash_json
from educe.recipes.prepare import Prepared
from educe.stats import percentile
from educe.store.token_store import open_prepared, open_store

# Bump when the same part would be described otherwise.
_VERSION = 1
_OWN = ("ledger.jsonl", "summary.json", "left_out.npy", "manifest.json")


def subset_of(prepared: Prepared, rows_R: Int64[np.ndarray, " r"]) -> Prepared:
    """Training rows `rows_R` (the ledger's lines, from 0) of what was prepared; all others are `not drawn`. Dev and test rows stay.
    Raises `ValueError` where no example is left.

    It lies beside the whole and shares its files (hard links); the same rows give the same directory. All rows give the whole.
    """
    store = prepared.store("train")
    out = np.union1d(prepared.left_out, np.flatnonzero(~np.isin(store.rows, rows_R)))
    if out.size == prepared.left_out.size:
        return prepared
    if out.size == len(store):
        raise ValueError("none of these rows is trained")
    key = hash_json([_VERSION, prepared.key, hash_bytes(np.sort(rows_R).astype("<i8").tobytes())])[:16]
    path = prepared.path.parent / key
    if open_prepared(path) is None:
        about = {"stage": "prepare", "key": key, "made_of": prepared.made_of, "whole": prepared.key}
        with directory(path, about=about) as place:
            _share(prepared.path, place)
            np.save(place / "left_out.npy", out)
            summary = _narrowed(prepared, place, set(rows_R.tolist()), out)
            (place / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    made = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return Prepared(path=path, key=key, model_dir=prepared.model_dir, tokenizer=prepared.tokenizer, summary=made)


def _share(whole: Path, place: Path) -> None:
    for file in whole.rglob("*"):
        target = place / file.relative_to(whole)
        if file.is_dir():
            target.mkdir(exist_ok=True)
        elif target.name not in _OWN:
            target.parent.mkdir(exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # a file system without hard links: the same bytes again
                shutil.copyfile(file, target)


def _narrowed(prepared: Prepared, place: Path, kept: set[int], out: Int64[np.ndarray, " n"]) -> dict[str, object]:
    """Write the ledger with all other training rows `not drawn`; the summary that fits it."""
    tasks: Counter[str] = Counter()
    aside = 0
    with (prepared.path / "ledger.jsonl").open("rb") as lines, (place / "ledger.jsonl").open("wb") as ledger:
        for n, raw in enumerate(lines):
            line = orjson.loads(raw)
            if line["status"] == "train":
                if n in kept:
                    tasks[line["task"]] += 1
                else:
                    aside += 1
                    line |= {"status": "not drawn"}
                    raw = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
            ledger.write(raw)
    store, s = open_store(prepared.path / "train"), prepared.summary
    lengths = np.delete(store.lengths, out).tolist()
    return {
        **s,
        "rows": {**s["rows"], "train": tasks.total()},
        "not_drawn": aside,
        "tasks": {name: tasks[name] if name in _trained(prepared) else n for name, n in s["tasks"].items()},
        "examples": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": int(np.delete(store.trained_of, out).sum()),
        "length": {"median": percentile(lengths, 0.5), "p95": percentile(lengths, 0.95), "max": max(lengths)},
        # Counted over all rows, which are digested no more: numbers of the whole are none of a part.
        "duplicates": None,
        "contradictions": None,
        "leaks": None,
    }


def _trained(prepared: Prepared) -> set[str]:
    """Tasks that have rows in the training store."""
    return {prepared.tasks[k] for k in np.unique(prepared.store("train").tasks).tolist()}
