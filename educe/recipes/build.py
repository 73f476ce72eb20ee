"""What `prepare` does when the data was not prepared before: read, split, render, prove, encode, weigh, store, account."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from educe.chat.engine import Engine, choose_engine
from educe.chat.examples import Distrust, Encode, build_rendered, build_stream, examples_of
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
from educe.files.hashes import hash_json
from educe.files.jsonl import write_jsonl
from educe.model.source import Say
from educe.seeds import derive, permute
from educe.stats import percentile
from educe.store.token_store import write_store
from educe.types import Conversation, Example, Rendered, Source

SPLITS = ("train", "dev", "test")
NUM_PREVIEWS = 3
NUM_SHOTS = 256
CHUNK_ROWS = 1024
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
    data = recipe.data
    weighing = weighing_of(data)
    unread: list[dict[str, Any]] = []
    rows = _split(data, files, unread)
    settled = tokenizer
    if recipe.template.settings is None:
        found = settle(tokenizer, [c for s, c in rows if s == "train"], weighing)
        settled = found.tokenizer
        if found.why:
            say(found.why)
    engine = choose_engine(settled.engine_json, settled.stock, about_chars=_characters(rows))
    built = _all(rows, settled, weighing, data.max_tokens, engine, say)
    built.ledger += unread
    order = {str(file): k for k, file in enumerate(files.values())}
    built.ledger.sort(key=lambda line: (order[line["file"]], line["line"]))
    if not built.kept["train"]:
        raise _nothing_left(data.train, built.ledger)
    with directory(path, about={"stage": "prepare", **about}) as part:
        _write(part, built, recipe, settled, weighing, engine)


def _write(
    part: Path, built: _Built, recipe: Recipe, tokenizer: ChatTokenizer, weighing: Weighing, engine: Engine
) -> None:
    for split in ("train", "dev"):
        write_store(part / split, built.examples[split])
    for name in ("dev", "test"):
        write_jsonl(part / f"{name}.jsonl", map(as_line, built.kept[name]))
    train = built.kept["train"]
    order = permute(len(train), derive(recipe.train.seed, "shots"))[:NUM_SHOTS].tolist()
    write_jsonl(part / "shots.jsonl", [as_line(train[i]) for i in order])
    write_jsonl(part / "ledger.jsonl", built.ledger)
    _dump(part / "preview.json", _previews(train[:NUM_PREVIEWS], tokenizer, weighing))
    _dump(part / "summary.json", _summary(built, tokenizer, engine))


# --- rows in -------------------------------------------------------------------------------------------------------------


def _split(data: Data, files: Mapping[str, Path], ledger: list[dict[str, Any]]) -> list[tuple[str, Conversation]]:
    """Every readable row with its split; rows that cannot be read go to the ledger at once."""
    read = {name: list(_readable(path, data.system, ledger)) for name, path in files.items()}
    train = read.pop("train")
    shares = [(n, s) for n, s in (("dev", data.dev), ("test", data.test)) if not isinstance(s, FileSplit)]
    keys = [prompt_key(c) for c in train] if shares else []
    held: dict[str, str] = {}
    for name, split in shares:
        assert not isinstance(split, FileSplit)
        free = [hash_json([name, k]) + k for k in keys if k not in held]
        held |= {drawn[64:]: name for drawn in draw(free, split.share)}
    rows = (
        [(held.get(k, "train"), c) for k, c in zip(keys, train, strict=True)] if keys else [("train", c) for c in train]
    )
    return [*rows, *((name, c) for name, cs in read.items() for c in cs)]


def _readable(path: Path, system: str | None, ledger: list[dict[str, Any]]) -> Iterable[Conversation]:
    for source, row in read_rows(path):
        made = row if isinstance(row, Refusal) else to_conversation(row, source, system)
        if isinstance(made, Refusal):
            ledger.append(_refused(source, made))
        else:
            yield made


def _characters(rows: Sequence[tuple[str, Conversation]]) -> int:
    return sum(len(m.content) for _, c in rows for m in c.messages)


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
        mine = asked if split == "test" else weighing
        conversations = [c for s, c in rows if s == split]
        for chunk, made in build_stream(_chunks(conversations), renderer, mine, encode):
            for c, rendered in zip(chunk, made, strict=True):
                _keep(built, split, c, rendered, renderer.tokenizer, mine, max_tokens)
    return built


def _chunks(rows: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]


def _keep(
    built: _Built,
    split: str,
    c: Conversation,
    rendered: list[Rendered] | Refusal,
    tokenizer: ChatTokenizer,
    weighing: Weighing,
    max_tokens: int,
) -> None:
    examples = rendered if isinstance(rendered, Refusal) else examples_of(c, rendered, tokenizer, weighing, max_tokens)
    if isinstance(examples, Refusal) or isinstance(rendered, Refusal):
        assert isinstance(examples, Refusal)
        if examples.code == "E-CHAT-103":
            built.counts["over limits"] += 1
            if built.counts["over limits"] >= MAX_LIMIT_REFUSALS:
                raise DataError(
                    5, examples.where, f"is the third row on which {examples.found}", "Give another template."
                )
        built.ledger.append(_refused(c.source, examples))
        return
    built.kept[split].append(c)
    built.examples[split] += examples
    tokens = sum([e.ids_T.size for e in examples])
    trained = sum([num_trained(e) for e in examples])
    line = {"file": c.source.file, "line": c.source.line, "status": split, "code": None, "reason": None}
    built.ledger.append({**line, "tokens": tokens, "trained_tokens": trained})
    if split == "train":
        _count(built, c, rendered, tokens)


def num_trained(e: Example) -> int:
    """Trained tokens of an example."""
    return int((e.weights_T > 0).sum())


def _count(built: _Built, c: Conversation, rendered: Sequence[Rendered], tokens: int) -> None:
    """Turns and the stop token of each, answers that the template trims, what splitting costs."""
    for r in rendered:
        for run in r.runs:
            if run.trained:
                built.stops[int(r.ids_T[run.end - 1])] += 1
                for s in run.segments:
                    if s.part == "content" and len(s.text) != len(c.messages[s.message or 0].content):
                        built.counts["trimmed turns"] += 1
    if len(rendered) > 1:
        built.counts["split rows"] += 1
        trained = sum(run.end - run.first for r in rendered[:-1] for run in r.runs if run.trained)
        built.counts["repeated tokens"] += tokens - rendered[-1].ids_T.size - trained
    if c.messages[0].role == "assistant":
        built.counts["opening turns"] += 1


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


def _summary(built: _Built, tokenizer: ChatTokenizer, engine: Engine) -> dict[str, Any]:
    kept, train, counts = built.kept, built.examples["train"], built.counts
    lengths = [int(e.ids_T.size) for e in train]
    prompts = {s: {prompt_key(c) for c in kept[s]} for s in SPLITS}
    names = {number: word for word, number in tokenizer.control.items()}
    return {
        "rows_in": len(built.ledger),
        "rows": {s: len(kept[s]) for s in SPLITS},
        "dropped": sum(line["status"] == "dropped" for line in built.ledger),
        "refused": sum(line["status"] == "refused" for line in built.ledger),
        "examples": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": sum(map(num_trained, train)),
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
