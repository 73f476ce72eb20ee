"""What `prepare` does when the data was not prepared before: read, split, render, prove, encode, weigh, store, account."""

from __future__ import annotations

import contextlib
import gc
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from educe.chat.engine import Engine, choose_engine
from educe.chat.examples import Distrust, Encode, Made, build_rendered, build_stream
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.tokens import ChatTokenizer
from educe.chat.view import joined, view
from educe.chat.weights import POLICIES, Weighing, answered_turn
from educe.config import Recipe
from educe.config.recipe import Data, FileSplit
from educe.data.formats import to_conversation
from educe.data.sources import read_rows
from educe.data.split import draw, prompt_key, row_key
from educe.errors import DataError, Refusal
from educe.files.atomic import directory
from educe.files.jsonl import write_jsonl
from educe.model.source import Say
from educe.seeds import derive, permute
from educe.stats import percentile
from educe.store.token_store import write_store
from educe.types import Conversation, Example, Source

SPLITS = ("train", "dev", "test")
NUM_PREVIEWS = 3
NUM_SHOTS = 256
CHUNK_ROWS = 2048
TEMPLATE = "chat_template.jinja"
# A template that exceeds its limits on so many rows is stopped: each costs two seconds.
MAX_LIMIT_REFUSALS = 3


@dataclass(slots=True)
class _Built:
    """What becomes of the rows: kept ones by split, their examples, a ledger line for each, and what was counted on the way."""

    kept: dict[str, list[Conversation]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    examples: dict[str, list[Example]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    ledger: list[dict[str, Any]] = field(default_factory=list)
    stops: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


def weighing_of(data: Data) -> Weighing:
    """The recipe's choice of what carries loss."""
    return Weighing(
        policy=POLICIES[data.train_on], prompt_weight=data.prompt_weight, reasoning_weight=data.reasoning_weight
    )


def build(
    recipe: Recipe, tokenizer: ChatTokenizer, files: Mapping[str, Path], path: Path, about: dict[str, Any], say: Say
) -> None:
    """Prepare into `path`. Raises `DataError` when no row is left, `ChatError` for a template that cannot be used."""
    with _no_garbage():
        _build(recipe, tokenizer, files, path, about, say)


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Rows are many small values without cycles: looking for cycles among them again and again takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _build(
    recipe: Recipe, tokenizer: ChatTokenizer, files: Mapping[str, Path], path: Path, about: dict[str, Any], say: Say
) -> None:
    data = recipe.data
    weighing = weighing_of(data)
    unread: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="engine") as pool:  # an engine is loaded and proved while rows are read
        size = sum(file.stat().st_size for file in files.values())
        choosing = pool.submit(choose_engine, tokenizer.engine_json, tokenizer.stock, about_chars=size)
        rows, keys = _split(data, files, unread)
        engine = choosing.result()
    settled = tokenizer
    if recipe.template.settings is None:
        found = settle(tokenizer, [c for s, c in rows if s == "train"], weighing)
        settled = found.tokenizer
        if found.why:
            say(found.why)
    built = _all(rows, settled, weighing, data.max_tokens, engine, say)
    built.ledger += unread
    order = {str(file): k for k, file in enumerate(files.values())}
    built.ledger.sort(key=lambda line: (order[line["file"]], line["line"]))
    if not built.kept["train"]:
        raise _nothing_left(data.train, built.ledger)
    with directory(path, about={"stage": "prepare", **about}) as part:
        _write(part, built, recipe, settled, weighing)
        _dump(part / "summary.json", _summary(built, keys, settled, engine))


def _write(part: Path, built: _Built, recipe: Recipe, tokenizer: ChatTokenizer, weighing: Weighing) -> None:
    for split in ("train", "dev"):
        write_store(part / split, built.examples[split])
    for name in ("dev", "test"):
        write_jsonl(part / f"{name}.jsonl", map(as_line, built.kept[name]))
    train = built.kept["train"]
    order = permute(len(train), derive(recipe.train.seed, "shots"))[:NUM_SHOTS].tolist()
    write_jsonl(part / "shots.jsonl", [as_line(train[i]) for i in order])
    (part / "ledger.jsonl").write_bytes(
        b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in built.ledger)
    )
    (part / TEMPLATE).write_text(tokenizer.template.source, encoding="utf-8")
    _dump(part / "preview.json", _previews(train[:NUM_PREVIEWS], tokenizer, weighing))


# --- rows in -------------------------------------------------------------------------------------------------------------


def _split(
    data: Data, files: Mapping[str, Path], ledger: list[dict[str, Any]]
) -> tuple[list[tuple[str, Conversation]], dict[str, list[str]]]:
    """Every readable row with its split, and the keys of each split's prompts; rows that cannot be read go to the ledger."""
    read = {name: list(_readable(path, data.system, ledger)) for name, path in files.items()}
    keyed = {name: [prompt_key(c) for c in rows] for name, rows in read.items()}
    train, keys = read.pop("train"), keyed.pop("train")
    held: dict[str, str] = {}
    for turned, (name, split) in ((0, ("dev", data.dev)), (32, ("test", data.test))):
        if not isinstance(split, FileSplit):  # digits of the key that the other split does not look at
            free = {k[turned:] + k[:turned]: k for k in keys if k not in held}
            held |= {free[drawn]: name for drawn in draw(free, split.share)}
    rows = [(held.get(k, "train"), c) for k, c in zip(keys, train, strict=True)]
    for k in keys:
        keyed.setdefault(held.get(k, "train"), []).append(k)
    return [*rows, *((name, c) for name, cs in read.items() for c in cs)], keyed


def _readable(path: Path, system: str | None, ledger: list[dict[str, Any]]) -> Iterable[Conversation]:
    for source, row in read_rows(path):
        made = row if isinstance(row, Refusal) else to_conversation(row, source, system)
        if isinstance(made, Refusal):
            ledger.append(_refused(source, made))
        else:
            yield made


# --- rows to examples ----------------------------------------------------------------------------------------------------


def _all(
    rows: Sequence[tuple[str, Conversation]],
    tokenizer: ChatTokenizer,
    weighing: Weighing,
    max_tokens: int,
    engine: Engine,
    say: Say,
) -> _Built:
    """Try the quick way: remembered layouts, the engine. Where either is caught giving another result, all is done again without."""
    renderer = Renderer(tokenizer)
    try:
        built = _once(rows, renderer, weighing, max_tokens, engine.encode_flat)
        if engine.fell_back is None:
            return built
        say(
            f"tokenizer engine {engine.name} was caught in a difference: {engine.fell_back}; all rows again with tokenizers"
        )
    except Distrust as e:
        say(f"{e}: the template does not treat rows alike; all rows again, each rendered by the template")
        renderer = Renderer(tokenizer, remembers=False)
    return _once(rows, renderer, weighing, max_tokens, tokenizer.encode_many)


def _once(
    rows: Sequence[tuple[str, Conversation]], renderer: Renderer, weighing: Weighing, max_tokens: int, encode: Encode
) -> _Built:
    built = _Built()
    asked = Weighing(policy=answered_turn)
    for split in SPLITS:
        conversations = [c for s, c in rows if s == split]
        chunks = _chunks(conversations)
        for chunk, proved in build_stream(chunks, renderer, asked if split == "test" else weighing, encode):
            for c, made in zip(chunk.rows, chunk.examples(proved, max_tokens), strict=True):
                if isinstance(made, Refusal):
                    _refuse(built, c, made)
                else:
                    _keep(built, split, c, made)
    return built


def _chunks(rows: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]


def _refuse(built: _Built, c: Conversation, refusal: Refusal) -> None:
    if refusal.code == "E-CHAT-103":
        built.counts["over limits"] += 1
        if built.counts["over limits"] >= MAX_LIMIT_REFUSALS:
            found = f"is one of {MAX_LIMIT_REFUSALS} rows on which {refusal.found}"
            raise DataError(5, refusal.where, found, "Give another template.")
    built.ledger.append(_refused(c.source, refusal))


def _keep(built: _Built, split: str, c: Conversation, made: Made) -> None:
    built.kept[split].append(c)
    built.examples[split] += made.examples
    trained = sum(made.num_trained)
    sizes = [e.ids_T.size for e in made.examples]
    line = {"file": c.source.file, "line": c.source.line, "status": split, "code": None, "reason": None}
    built.ledger.append({**line, "tokens": sum(sizes), "trained_tokens": trained})
    if split != "train":
        return
    counts = built.counts
    counts["trained tokens"] += trained
    built.stops.update(made.stops)
    if made.num_trimmed:
        counts["trimmed turns"] += made.num_trimmed
    if len(sizes) > 1:
        counts["split rows"] += 1
        counts["repeated tokens"] += sum(sizes[:-1]) - sum(made.num_trained[:-1])
    if c.messages[0].role == "assistant":
        counts["opening turns"] += 1


# --- what is written about them --------------------------------------------------------------------------------------------


def _refused(source: Source, refusal: Refusal) -> dict[str, Any]:
    status = "dropped" if refusal.code in ("E-DATA-201", "E-CHAT-310") else "refused"
    said = {"status": status, "code": refusal.code, "reason": f"{refusal.found} {refusal.fix}", "where": refusal.where}
    return {"file": source.file, "line": source.line, **said, "tokens": 0, "trained_tokens": 0}


def _nothing_left(file: str, ledger: list[dict[str, Any]]) -> DataError:
    first = next((line for line in ledger if line["code"]), None)
    if first is None:
        return DataError(5, file, "has no row left to train on after the split.", "Give more rows.")
    found = f"has no usable row; the first is refused: {first['code']} {first['where']} {first['reason']}"
    return DataError(5, file, found, "`educe check` lists all reasons.")


def _previews(rows: Sequence[Conversation], tokenizer: ChatTokenizer, weighing: Weighing) -> list[dict[str, Any]]:
    built = build_rendered(rows, Renderer(tokenizer), weighing)
    return [
        {"row": _short(c.source), "runs": joined(view(b[0], c.messages, tokenizer, weighing))}
        for c, b in zip(rows, built, strict=True)
        if not isinstance(b, Refusal)
    ]


def _summary(
    built: _Built, keys: Mapping[str, Sequence[str]], tokenizer: ChatTokenizer, engine: Engine
) -> dict[str, Any]:
    kept, train, counts = built.kept, built.examples["train"], built.counts
    lengths = [int(e.ids_T.size) for e in train]
    prompts = {s: set(keys.get(s, ())) for s in SPLITS}
    names = {number: word for word, number in tokenizer.control.items()}
    return {
        "rows_in": len(built.ledger),
        "rows": {s: len(kept[s]) for s in SPLITS},
        "dropped": sum(line["status"] == "dropped" for line in built.ledger),
        "refused": sum(line["status"] == "refused" for line in built.ledger),
        "examples": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": counts["trained tokens"],
        "length": {"median": percentile(lengths, 0.5), "p95": percentile(lengths, 0.95), "max": max(lengths)},
        "duplicates": len(kept["train"]) - len({row_key(c) for c in kept["train"]}),
        "leaks": {s: len(prompts["train"] & prompts[s]) for s in ("dev", "test")},
        "template": tokenizer.template_name,
        "template_settings": dict(tokenizer.settings),
        "engine": engine.name if engine.fell_back is None else f"tokenizers ({engine.fell_back})",
        "engine_why": engine.reason,
        "stop": {names.get(i, tokenizer.decode([i])): n for i, n in built.stops.most_common()},
        "trained_turns": built.stops.total(),
        "trimmed_turns": counts["trimmed turns"],
        "opening_turns": counts["opening turns"],
        "split_rows": counts["split rows"],
        "repeated_tokens": counts["repeated tokens"],
    }


def as_line(c: Conversation) -> dict[str, Any]:
    """A row as prepared data keeps it."""
    return {"source": asdict(c.source), "messages": [asdict(m) for m in c.messages], "tools": list(c.tools)}


def _short(source: Source) -> str:
    return f"{Path(source.file).name}:{source.line}"


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
