"""What `prepare` does when the data was not prepared before: parts of the files done side by side, and their results joined."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from jaxtyping import UInt64

from educe.chat.engine import Engine, choose_engine
from educe.chat.settle import NUM_TRIED, settle
from educe.chat.tokens import ChatTokenizer
from educe.chat.weights import POLICIES, Weighing
from educe.config import Recipe
from educe.config.data import Data, ShareSplit
from educe.data.near import Tokens, near_copies
from educe.data.opening import compression_of
from educe.data.reading import MIXED, Group, Reading, read_row, reading_for
from educe.data.sources import sample_rows, spans_of
from educe.data.split import HELD_OUT, HeldOut, Shares, nearness
from educe.errors import DataError, Refusal
from educe.files.atomic import directory
from educe.model.source import Alive, Say
from educe.recipes.hands import MOST_BYTES, done_by, num_hands
from educe.recipes.part import (
    MAX_LIMIT_REFUSALS,
    NUM_PREVIEWS,
    NUM_SHOTS,
    SPLITS,
    Done,
    Job,
    Part,
    Split,
    do,
)
from educe.stats import percentile
from educe.store.shards import join_shards
from educe.store.token_store import joined_tokens, open_store
from educe.types import Conversation, Pair

TEMPLATE = "chat_template.jinja"
MOST_FILES, MOST_KEYS = 50, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Files that are read alike: what they are for, the number of their task, and how their rows are read; `held_out`: some of
    their rows may be held out (never of what is replayed)."""

    role: Split
    task: int
    files: Sequence[Path]
    reading: Reading
    header: tuple[str, ...] = ()
    held_out: bool = True


def weighing_of(data: Data) -> Weighing:
    """The recipe's choice of what carries loss."""
    return Weighing(
        policy=POLICIES[data.train_on], prompt_weight=data.prompt_weight, reasoning_weight=data.reasoning_weight
    )


def build(
    recipe: Recipe,
    tokenizer: ChatTokenizer,
    inputs: Sequence[Input],
    names: Sequence[str],
    path: Path,
    about: dict[str, Any],
    say: Say,
    alive: Alive = lambda: None,
) -> None:
    """Prepare into `path`; `names` are the tasks. Raises `DataError` when no row is left, `ChatError` for a template that
    cannot be used.

    The result does not depend on the number of parts.
    """
    size = sum(f.stat().st_size for i in inputs for f in i.files)
    engine = choose_engine(tokenizer.engine_json, tokenizer.stock, about_chars=size)
    hands = num_hands(size)
    parts = _parts(inputs, max(1, min(MOST_BYTES, -(-size // hands))))
    settled = tokenizer
    if recipe.template.settings is None:
        found = settle(tokenizer, sample_of(inputs), weighing_of(recipe.data))
        settled = found.tokenizer
        if found.why:
            say(found.why)
    with directory(path, about={"stage": "prepare", **about}, alive=alive) as place:
        job = _job(recipe, settled, place / "parts", names, alone=hands == 1)
        done = _done(parts, job, settled, engine, hands, say, alive)
        if not any(d.keys["train"] for d in done):
            raise _nothing_left(inputs, done)
        if recipe.objective.kind == "sft" and all(d.counts["documents"] == d.counts["train"] for d in done):
            raise _no_answer(inputs)
        _join(place, done, job, alive)
        alive()
        copies = _copies(place, recipe.data, alive)
        alive()
        if len(open_store(place / "train")) == np.load(place / "left_out.npy").size:
            why = "has no row left to train on: each nearly repeats a held-out row."
            fix = "Name other files for data.dev and data.test, or set data.near_copies: keep."
            raise DataError(5, str(next(i.files[0] for i in inputs if i.role == "train")), why, fix)
        counts = sum((d.counts for d in done), Counter[str]()) + _join_ledger(place, done, job, copies)
        shutil.rmtree(job.place)
        _write(place, done, settled)
        summary = _summary(place, done, counts, settled, engine, names)
        _dump(place / "summary.json", {**summary, "files": _files(parts)})


def sample_of(inputs: Sequence[Input]) -> list[Conversation]:
    """Some conversations of the training files, spread over them: template settings are chosen on these."""
    sample: list[Conversation] = []
    for i in inputs:
        if i.role == "train":
            for source, value in sample_rows(i.files, NUM_TRIED, i.header):
                items = read_row(value, source, i.reading) if not isinstance(value, Refusal) else []
                sample += [c for c in items[:NUM_TRIED] if isinstance(c, Conversation)]
                sample += [c.chosen for c in items[:NUM_TRIED] if isinstance(c, Pair)]
    return sample[:: max(1, len(sample) // NUM_TRIED)]


def _parts(inputs: Sequence[Input], about_bytes: int) -> list[Part]:
    parts: list[Part] = []
    for i in inputs:
        for file in i.files:
            reading = reading_for(i.reading, file, i.header)
            whole = reading.of_messages  # rows that need each other
            for span in spans_of(file, None if whole else about_bytes, i.header, documents=reading.documents):
                part = Part(
                    number=len(parts), role=i.role, task=i.task, span=span, reading=reading, held_out=i.held_out
                )
                parts.append(part)
    return parts


def _job(recipe: Recipe, tokenizer: ChatTokenizer, place: Path, names: Sequence[str], *, alone: bool) -> Job:
    data = recipe.data
    dev, test = (s.share if isinstance(s, ShareSplit) else 0.0 for s in (data.dev, data.test))
    return Job(
        place=place,
        tasks=tuple(names),
        settings=dict(tokenizer.settings),
        weighing=weighing_of(data),
        max_tokens=data.max_tokens,
        too_long=data.too_long,
        shares=Shares(dev=dev, test=test, forced={}),
        group=Group(data.group) if data.group is not None else None,
        alone=alone,
        careful=False,
        objective=recipe.objective.kind,
    )


def _done(
    parts: Sequence[Part], job: Job, tokenizer: ChatTokenizer, engine: Engine, hands: int, say: Say, alive: Alive
) -> list[Done]:
    """Every part done. Where one is caught giving another result than the template or `tokenizers` would, all are done again
    without remembered layouts and without the engine; where a share took no row, with the nearest one held out."""
    while True:
        done: list[Done] = []
        for part in done_by(hands, partial(do, job=job, tokenizer=tokenizer, engine=engine), parts):
            done.append(part)
            alive()
        over = [line for d in done for line in d.over_limits]
        if len(over) >= MAX_LIMIT_REFUSALS:
            found = f"is one of {len(over)} rows on which {over[0]['reason']}"
            raise DataError(5, str(over[0]["where"]), found, "Stopped: each such row costs two seconds.")
        caught = next((d.caught for d in done if d.caught), "")
        if caught:
            say(f"{caught}; all rows again, each rendered by the template and encoded by tokenizers")
            job = replace(job, careful=True)
            continue
        forced = _forced(job.shares, done)
        if not forced:
            return done
        job = replace(job, shares=replace(job.shares, forced={**job.shares.forced, **forced}))


def _forced(shares: Shares, done: Sequence[Done]) -> dict[str, HeldOut]:
    """A key to be held out for a share that took no row, while there are two different ones at least."""
    trained = np.frombuffer(b"".join(d.keys["train"] for d in done), np.uint64)
    if not trained.size or (trained == trained[0]).all():
        return {}
    for split in HELD_OUT:
        share = shares.dev if split == "dev" else shares.test
        if not share or any(d.keys[split] for d in done) or split in shares.forced.values():
            continue
        near = {k for d in done for k in d.near.get(split, ()) if k not in shares.forced}
        if near:
            return {
                min(near, key=lambda k: nearness(k, split)): split
            }  # one: the other share may have none left to take
    return {}


# --- what is written -----------------------------------------------------------------------------------------------------


def _join(place: Path, done: Sequence[Done], job: Job, alive: Alive) -> None:
    firsts = [0, *accumulate(d.counts["rows"] for d in done)]
    for split in SPLITS:
        alive()
        join_shards([job.place_of(d.number) / split for d in done], firsts[:-1], place / split)
    for split in ("dev", "test"):
        with (place / f"{split}.jsonl").open("wb") as out:
            for d in done:
                with (job.place_of(d.number) / f"{split}.jsonl").open("rb") as f:
                    shutil.copyfileobj(f, out, 1 << 20)


def _copies(place: Path, data: Data, alive: Alive) -> dict[int, int]:
    """Training rows that nearly repeat a held-out row, and that row, by their numbers; their examples are never drawn, if the
    recipe says so (see `left_out.npy`)."""
    train, dev, test = (open_store(place / s) for s in SPLITS)
    near = near_copies(Tokens(*train.tokens), Tokens(*joined_tokens([dev, test])), alive)
    rows = train.rows[near.examples]
    copies = dict(zip(rows.tolist(), np.concatenate([dev.rows, test.rows])[near.of].tolist(), strict=True))
    drop = data.near_copies == "drop"
    np.save(place / "left_out.npy", np.flatnonzero(np.isin(train.rows, rows)) if drop else np.zeros(0, np.int64))
    _dump(place / "near_copies.json", sorted(copies.items()))
    return copies if drop else {}


def _join_ledger(place: Path, done: Sequence[Done], job: Job, copies: Mapping[int, int]) -> Counter[str]:
    """Write the ledger, a line for each row in order, copies of held-out rows dropped. Returns what that changes in the counts."""
    parts = [job.place_of(d.number) / "ledger.jsonl" for d in done]
    firsts = [0, *accumulate(d.counts["rows"] for d in done)]
    wanted = set(copies.values())
    named = {n: line for part, first in zip(parts, firsts, strict=False) for n, line in _lines(part, first, wanted)}
    changed: Counter[str] = Counter()
    with (place / "ledger.jsonl").open("wb") as out:
        for part, first, end in zip(parts, firsts, firsts[1:], strict=False):
            if not any(first <= n < end for n in copies):
                with part.open("rb") as f:
                    shutil.copyfileobj(f, out, 1 << 20)
                continue
            for n, line in _lines(part, first):
                if n in copies:
                    of = named[copies[n]]
                    changed.subtract(
                        {k: line[v] for k, v in (("tokens", "tokens"), ("trained tokens", "trained_tokens"))}
                    )
                    changed.subtract({"train": 1, f"task {line['task']}": 1})
                    changed.update({"dropped": 1, "near copies": 1})
                    found = f"nearly repeats {Path(of['file']).name}:{of['line']}, a {of['status']} row."
                    fix = "To train on it all the same: data.near_copies: keep."
                    line |= {"status": "dropped", "code": "E-DATA-203", "reason": f"{found} {fix}"}
                    line |= {"where": f"{line['file']}:{line['line']}", "tokens": 0, "trained_tokens": 0}
                out.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    return changed


def _lines(part: Path, first: int, wanted: Collection[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of a part's ledger with their numbers: all, or those that are wanted."""
    if wanted is not None and not wanted:
        return
    with part.open("rb") as f:
        for n, raw in enumerate(f, first):
            if wanted is None or n in wanted:
                yield n, orjson.loads(raw)


def _write(place: Path, done: Sequence[Done], tokenizer: ChatTokenizer) -> None:
    shots = {digest: line for d in done for digest, line in d.shots.items()}
    (place / "shots.jsonl").write_bytes(b"".join([shots[d] for d in sorted(shots)[:NUM_SHOTS]]))
    (place / TEMPLATE).write_text(tokenizer.template.source, encoding="utf-8")
    _dump(place / "preview.json", [p for d in done for p in d.previews][:NUM_PREVIEWS])


_COUNTED = (
    *("trimmed turns", "opening turns", "unanswered ends", "split rows", "repeated tokens", "documents", "near copies"),
    *(
        "rows without a group",
        "control strings",
        "turn splits",
        "cut rows",
        "lost trained tokens",
        "unfinished answers",
    ),
)


def _summary(
    place: Path,
    done: Sequence[Done],
    counts: Counter[str],
    tokenizer: ChatTokenizer,
    engine: Engine,
    names: Sequence[str],
) -> dict[str, Any]:
    """What the data became, in numbers; check and the report say it. Keys of the rows are written beside it."""
    lengths = np.delete(open_store(place / "train").lengths, np.load(place / "left_out.npy")).tolist()
    keys = {s: np.frombuffer(b"".join(d.keys[s] for d in done), np.uint64) for s in SPLITS}
    for split in ("train", "test"):
        np.save(place / f"{split}_keys.npy", np.unique(keys[split]))
    rows, asked = (np.frombuffer(b"".join(getattr(d, name) for d in done), np.uint64) for name in ("rows", "asked"))
    stops = sum((d.stops for d in done), Counter[int]())
    words = {number: word for word, number in tokenizer.control.items()}
    return {
        "rows_in": counts["rows"],
        "rows": {s: counts[s] for s in SPLITS},
        "dropped": counts["dropped"],
        "refused": counts["refused"],
        "tasks": {name: counts[f"task {name}"] for name in names},
        "examples": len(lengths),
        "tokens": counts["tokens"],
        "trained_tokens": counts["trained tokens"],
        "length": {"median": percentile(lengths, 0.5), "p95": percentile(lengths, 0.95), "max": max(lengths)},
        "duplicates": rows.size - np.unique(rows).size,
        "contradictions": _contradictions(place, rows, asked),
        "leaks": {s: int(np.unique(keys[s][np.isin(keys[s], keys["train"])]).size) for s in ("dev", "test")},
        "template": tokenizer.template_name,
        "template_settings": dict(tokenizer.settings),
        "engine": engine.name if engine.fell_back is None else f"tokenizers ({engine.fell_back})",
        "engine_why": engine.reason,
        "stop": {words.get(i, tokenizer.decode([i])): n for i, n in stops.most_common()},
        "trained_turns": stops.total(),
        "unread_keys": dict(sum((d.unread for d in done), Counter[str]()).most_common(MOST_KEYS)),
        **{name.replace(" ", "_"): counts[name] for name in _COUNTED},
    }


def _contradictions(place: Path, rows: UInt64[np.ndarray, " r"], asked: UInt64[np.ndarray, " r"]) -> dict[str, Any]:
    """Prompts that are trained with more than one answer, the rows that have them, and the places of two that differ; `rows` and
    `asked` are digests of each training row and of what it asks, in the order of the ledger."""
    order = np.lexsort((rows, asked))
    rows_O, asked_O = rows[order], asked[order]
    several = np.unique(asked_O[1:][(asked_O[1:] == asked_O[:-1]) & (rows_O[1:] != rows_O[:-1])])
    at = np.flatnonzero(np.isin(asked, several))
    if not at.size:
        return {"prompts": 0, "rows": 0, "first": []}
    other = at[(asked[at] == asked[at[0]]) & (rows[at] != rows[at[0]])][0]
    numbers = np.unique(open_store(place / "train").rows)[[at[0], other]].tolist()
    lines = [line for _, line in _lines(place / "ledger.jsonl", 0, set(numbers))]
    first = [f"{Path(line['file']).name}:{line['line']}" for line in lines]
    return {"prompts": int(several.size), "rows": int(at.size), "first": first}


def _files(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What the files are, and what that was told by; the first `MOST_FILES` of them."""
    first = {part.span.path: part for part in reversed(parts)}
    return [
        {
            "file": str(path),
            "container": part.span.container,
            "compression": compression_of(path),
            "format": part.reading.format or part.reading.of_file,
            "named": part.reading.format is not None or part.reading.of_file == MIXED,
        }
        for path, part in sorted(first.items(), key=lambda kv: kv[1].number)[:MOST_FILES]
    ]


def _nothing_left(inputs: Sequence[Input], done: Sequence[Done]) -> DataError:
    file = next((str(f) for i in inputs if i.role == "train" for f in i.files), "data")
    first = {code: line for d in reversed(done) for code, line in d.first_unused.items()}
    if not first:
        return DataError(5, file, "has no row left to train on after the split.", "Give more rows.")
    counts = sum((d.counts for d in done), Counter[str]())
    return no_usable_row(file, [(counts[c], c, line["where"], line["reason"]) for c, line in first.items()])


def _no_answer(inputs: Sequence[Input]) -> DataError:
    file = next(str(f) for i in inputs if i.role == "train" for f in i.files)
    fix = "Train on it in a stage of its own: stages: [{kind: pretrain, data: ...}]; or name rows with questions and answers too."
    return DataError(5, file, "holds raw text alone, and answers are to be learned (`kind: sft`).", fix)


def no_usable_row(file: str, reasons: Sequence[tuple[int, str, str, str]]) -> DataError:
    """Why nothing can be trained on: (number of rows, code, first place, reason) for each code."""
    told = [
        f"{n:,} row{'s' * (n != 1)} {code}, first {where}: {reason}" for n, code, where, reason in sorted(reasons)[::-1]
    ]
    return DataError(5, file, "\n  ".join(["has no usable row.", *told]), f"`educe data {file}` lists more of them.")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
