"""What `prepare` does when the data was not prepared before: parts of the files at work side by side, and their results merged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from educe.chat.engine import Engine, choose_engine
from educe.chat.settle import settle
from educe.chat.tokens import ChatTokenizer
from educe.chat.weights import POLICIES, Weighing
from educe.config import Recipe
from educe.config.recipe import Data, FileSplit
from educe.data.sources import spans_of
from educe.data.split import draw
from educe.errors import DataError
from educe.files.atomic import directory
from educe.files.jsonl import write_jsonl
from educe.model.source import Say
from educe.recipes.hands import Hand, at_work, num_hands
from educe.recipes.part import MAX_LIMIT_REFUSALS, SPLITS, Done, Part, Read, Shown, Split, Task, Wanted, ledger_bytes
from educe.seeds import derive, permute
from educe.stats import percentile
from educe.store.token_store import write_arrays

NUM_PREVIEWS = 3
NUM_SHOTS = 256
TEMPLATE = "chat_template.jinja"


def weighing_of(data: Data) -> Weighing:
    """The recipe's choice of what carries loss."""
    return Weighing(
        policy=POLICIES[data.train_on], prompt_weight=data.prompt_weight, reasoning_weight=data.reasoning_weight
    )


def build(
    recipe: Recipe, tokenizer: ChatTokenizer, files: Mapping[Split, Path], path: Path, about: dict[str, Any], say: Say
) -> None:
    """Prepare into `path`. Raises `DataError` when no row is left, `ChatError` for a template that cannot be used.

    The result does not depend on the number of parts.
    """
    sizes = {role: file.stat().st_size for role, file in files.items()}
    engine = choose_engine(tokenizer.engine_json, tokenizer.stock, about_chars=sum(sizes.values()))
    spans = [(role, span) for role, file in files.items() for span in spans_of(file, num_hands(sizes[role]))]
    alone = num_hands(max(sizes.values())) == 1
    parts = [Part(role=role, span=span, system=recipe.data.system, alone=alone) for role, span in spans]
    with at_work(parts, tokenizer, engine) as hands:
        read: list[Read] = _ask(hands)
        held = _held_out(
            recipe.data, [k for p, r in zip(parts, read, strict=True) if p.role == "train" for k in r.keys]
        )
        settled = tokenizer
        if recipe.template.settings is None:
            sample = [c for p, r in zip(parts, read, strict=True) if p.role == "train" for c in r.sample]
            found = settle(tokenizer, sample, weighing_of(recipe.data))
            settled = found.tokenizer
            if found.why:
                say(found.why)
        done = _done(hands, recipe, held, settled, say)
        ledger = [line for d in done for line in d.ledger]
        if not any(d.kept["train"] for d in done):
            raise _nothing_left(recipe.data.train, ledger)
        shown = _shown(hands, done, recipe.train.seed)
    with directory(path, about={"stage": "prepare", **about}) as place:
        _write(place, done, shown, ledger, settled)
        _dump(place / "summary.json", _summary(done, ledger, settled, engine))


def _ask(hands: Sequence[Hand], said: Sequence[Any] | None = None) -> list[Any]:
    """Say something to every hand, then wait for all answers."""
    for k, hand in enumerate(hands):
        hand.next(said[k] if said is not None else None)
    return [hand.answer() for hand in hands]


def _held_out(data: Data, keys: Sequence[str]) -> dict[str, Split]:
    """Which prompts of the train file go to which split, by their key."""
    held: dict[str, Split] = {}
    shares: tuple[tuple[int, Split, Any], ...] = ((0, "dev", data.dev), (32, "test", data.test))
    for turned, name, split in shares:
        if not isinstance(split, FileSplit):  # digits of the key that the other split does not look at
            free = {k[turned:] + k[:turned]: k for k in keys if k not in held}
            for drawn in draw(free, split.share):
                held[free[drawn]] = name
    return held


def _done(
    hands: Sequence[Hand], recipe: Recipe, held: Mapping[str, Split], tokenizer: ChatTokenizer, say: Say
) -> list[Done]:
    """Every part done. Where one is caught giving another result than the template or `tokenizers` would, all are done again
    without remembered layouts and without the engine."""
    done: list[Done] = []
    for careful in (False, True):
        task = Task(
            held=held,
            settings=dict(tokenizer.settings),
            weighing=weighing_of(recipe.data),
            max_tokens=recipe.data.max_tokens,
            careful=careful,
        )
        done = _ask(hands, [task] * len(hands))
        over = sum(d.counts["over limits"] for d in done)
        if over >= MAX_LIMIT_REFUSALS:
            first = next(line for d in done for line in d.ledger if line["code"] == "E-CHAT-103")
            found = f"is one of {over} rows on which {first['reason']}"
            raise DataError(5, str(first["where"]), found, "Stopped: each such row costs two seconds.")
        caught = next((d.caught for d in done if d.caught), "")
        if not caught:
            break
        say(f"{caught}; all rows again, each rendered by the template and encoded by tokenizers")
    return done


def _shown(hands: Sequence[Hand], done: Sequence[Done], seed: int) -> list[Shown]:
    """A sample of the rows kept for training, for examples in prompts, and the first ones as they are trained."""
    sizes = [len(d.kept["train"]) for d in done]
    order = permute(sum(sizes), derive(seed, "shots"))[:NUM_SHOTS].tolist()
    wanted: list[Wanted] = []
    first, previews = 0, NUM_PREVIEWS
    for size in sizes:
        lines = sorted(i - first for i in order if first <= i < first + size)
        wanted.append(Wanted(lines=lines, previews=min(size, previews)))
        first, previews = first + size, previews - min(size, previews)
    shown: list[Shown] = _ask(hands, wanted)
    return shown


# --- what is written -----------------------------------------------------------------------------------------------------


def _write(
    place: Path,
    done: Sequence[Done],
    shown: Sequence[Shown],
    ledger: Sequence[dict[str, Any]],
    tokenizer: ChatTokenizer,
) -> None:
    for split in ("train", "dev"):
        columns = [d.columns[split] for d in done]
        write_arrays(
            place / split,
            [a for c in columns for a in c.ids],
            [a for c in columns for a in c.weights],
            [n for c in columns for n in c.lengths],
            [n for c in columns for n in c.prefix_of],
        )
    for name in ("dev", "test"):
        write_jsonl(place / f"{name}.jsonl", [line for d in done for line in d.lines[name]])
    write_jsonl(place / "shots.jsonl", [line for s in shown for line in s.lines])
    (place / "ledger.jsonl").write_bytes(ledger_bytes(ledger))
    (place / TEMPLATE).write_text(tokenizer.template.source, encoding="utf-8")
    _dump(place / "preview.json", [p for s in shown for p in s.previews])


def _summary(
    done: Sequence[Done], ledger: Sequence[dict[str, Any]], tokenizer: ChatTokenizer, engine: Engine
) -> dict[str, Any]:
    lengths = [n for d in done for n in d.columns["train"].lengths]
    kept = {s: [k for d in done for k in d.kept[s]] for s in SPLITS}
    prompts = {s: set(keys) for s, keys in kept.items()}
    counts = sum((d.counts for d in done), Counter[str]())
    stops = sum((d.stops for d in done), Counter[int]())
    names = {number: word for word, number in tokenizer.control.items()}
    status = Counter(line["status"] for line in ledger)
    return {
        "rows_in": len(ledger),
        "rows": {s: len(kept[s]) for s in SPLITS},
        "dropped": status["dropped"],
        "refused": status["refused"],
        "examples": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": counts["trained tokens"],
        "length": {"median": percentile(lengths, 0.5), "p95": percentile(lengths, 0.95), "max": max(lengths)},
        "duplicates": len(kept["train"]) - len({row for d in done for row in d.rows}),
        "leaks": {s: len(prompts["train"] & prompts[s]) for s in ("dev", "test")},
        "template": tokenizer.template_name,
        "template_settings": dict(tokenizer.settings),
        "engine": engine.name if engine.fell_back is None else f"tokenizers ({engine.fell_back})",
        "engine_why": engine.reason,
        "stop": {names.get(i, tokenizer.decode([i])): n for i, n in stops.most_common()},
        "trained_turns": stops.total(),
        "trimmed_turns": counts["trimmed turns"],
        "opening_turns": counts["opening turns"],
        "split_rows": counts["split rows"],
        "repeated_tokens": counts["repeated tokens"],
    }


def _nothing_left(file: str, ledger: Sequence[dict[str, Any]]) -> DataError:
    first = next((line for line in ledger if line["code"]), None)
    if first is None:
        return DataError(5, file, "has no row left to train on after the split.", "Give more rows.")
    found = f"has no usable row; the first is refused: {first['code']} {first['where']} {first['reason']}"
    return DataError(5, file, found, "`educe check` lists all reasons.")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
