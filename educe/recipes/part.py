"""One part of the data on its way from bytes to examples. A part knows nothing of the others: it may be in a process of its own.

`work` is a conversation with the recipe that merges the parts: it reads and yields `Read`; is sent `Task`s, and yields a `Done`
for each (a second one when the first must be done again more carefully); is sent `Wanted`, and yields a `Shown`.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from educe.chat.engine import Engine
from educe.chat.examples import Distrust, Made, build_rendered, build_stream
from educe.chat.render import Renderer
from educe.chat.settle import NUM_TRIED
from educe.chat.tokens import ChatTokenizer
from educe.chat.view import joined, view
from educe.chat.weights import Weighing, answered_turn
from educe.data.formats import to_conversation
from educe.data.sources import Span, read_span
from educe.data.split import prompt_key, row_key
from educe.errors import Refusal
from educe.types import Conversation, Example, Source

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
CHUNK_ROWS = 2048
# A template that exceeds its limits on so many rows is stopped: each costs two seconds.
MAX_LIMIT_REFUSALS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a data file. `role` is what the file is for; rows of a train file may be held out. `alone`: all parts are
    done in one process, so another core is free."""

    role: Split
    span: Span
    system: str | None
    alone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What reading gave: the keys of the rows' prompts in order, and some rows spread over the part."""

    keys: list[str]
    sample: list[Conversation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to do with the rows. `held` maps keys of prompts to the split they go to."""

    held: Mapping[str, Split]
    settings: Mapping[str, bool | int | str]
    weighing: Weighing
    max_tokens: int
    careful: bool


@dataclass(slots=True)
class Columns:
    """Examples end to end."""

    ids: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prefix_of: list[int] = field(default_factory=list)

    def add(self, examples: Sequence[Example]) -> None:
        for e in examples:
            self.ids.append(e.ids_T)
            self.weights.append(e.weights_T)
            self.lengths.append(e.ids_T.size)
            self.prefix_of.append(e.prefix_of)

    def joined(self) -> Columns:
        """The same with one array of each, quick to hand over."""
        if self.ids:
            self.ids, self.weights = [np.concatenate(self.ids)], [np.concatenate(self.weights)]
        return self


@dataclass(slots=True)
class Done:
    """What the rows of a part became. `ledger` is a line for each, in order; `kept` the keys of the rows kept in each split,
    `rows` a digest of each row kept for training; `caught` says why all must be done again more carefully ("" if not).
    """

    columns: dict[Split, Columns] = field(default_factory=lambda: {s: Columns() for s in SPLITS})
    ledger: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[Split, list[str]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    lines: dict[Split, list[dict[str, Any]]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    rows: list[bytes] = field(default_factory=list)
    stops: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    caught: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Rows kept for training, by their number in this part: as lines, and the first `previews` of them as shown."""

    lines: Sequence[int]
    previews: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    lines: list[dict[str, Any]]
    previews: list[dict[str, Any]]


Worker = Generator[Read | Done | Shown, Any, None]


def work(part: Part, tokenizer: ChatTokenizer, engine: Engine) -> Worker:
    """See the module."""
    unread: list[dict[str, Any]] = []
    with _no_garbage():
        rows = list(_readable(part, unread))
        keys = [prompt_key(c) for c in rows]
    asked: Task | Wanted = yield Read(keys=keys, sample=rows[:: max(1, len(rows) // NUM_TRIED)])
    train: list[Conversation] = []
    renderer = Renderer(tokenizer)
    while isinstance(asked, Task):
        renderer = Renderer(tokenizer.with_settings(asked.settings), remembers=not asked.careful)
        with _no_garbage():
            done, train = _do(part, rows, keys, asked, renderer, engine)
            done.ledger = sorted(done.ledger + unread, key=lambda line: int(line["line"]))
        weighing = asked.weighing
        asked = yield done
    shown = build_rendered(train[: asked.previews], renderer, weighing)
    yield Shown(
        lines=[as_line(train[i]) for i in asked.lines],
        previews=[
            {"row": _short(c.source), "runs": joined(view(b[0], c.messages, renderer.tokenizer, weighing))}
            for c, b in zip(train, shown, strict=False)
            if not isinstance(b, Refusal)
        ],
    )


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


def _readable(part: Part, ledger: list[dict[str, Any]]) -> Iterator[Conversation]:
    for source, row in read_span(part.span):
        made = row if isinstance(row, Refusal) else to_conversation(row, source, part.system)
        if isinstance(made, Refusal):
            ledger.append(_refused(source, made))
        else:
            yield made


def _do(
    part: Part, rows: Sequence[Conversation], keys: Sequence[str], task: Task, renderer: Renderer, engine: Engine
) -> tuple[Done, list[Conversation]]:
    done = Done()
    train: list[Conversation] = []
    splits: list[Split] = [task.held.get(k, "train") if part.role == "train" else part.role for k in keys]
    encode = renderer.tokenizer.encode_many if task.careful else engine.encode_flat
    for split in SPLITS:
        mine = [k for k, s in enumerate(splits) if s == split]
        weighing = Weighing(policy=answered_turn) if split == "test" else task.weighing
        chunks = ([rows[k] for k in mine[i : i + CHUNK_ROWS]] for i in range(0, len(mine), CHUNK_ROWS))
        number = iter(mine)
        try:
            for chunk, proved in build_stream(chunks, renderer, weighing, encode, threaded=part.alone):
                for c, made in zip(chunk.rows, chunk.examples(proved, task.max_tokens), strict=True):
                    key = keys[next(number)]
                    if isinstance(made, Refusal):
                        done.ledger.append(_refused(c.source, made))
                        done.counts["over limits"] += made.code == "E-CHAT-103"
                        if done.counts["over limits"] >= MAX_LIMIT_REFUSALS:
                            return done, train
                    else:
                        _keep(done, split, c, key, made)
                        if split == "train":
                            train.append(c)
        except Distrust as e:
            done.caught = f"{e}: the template does not treat rows alike"
            return done, train
    if engine.fell_back is not None and not task.careful:
        done.caught = f"the tokenizer engine was caught in a difference: {engine.fell_back}"
    done.columns = {split: columns.joined() for split, columns in done.columns.items()}
    return done, train


def _keep(done: Done, split: Split, c: Conversation, key: str, made: Made) -> None:
    done.kept[split].append(key)
    done.columns[split].add(made.examples)
    trained = sum(made.num_trained)
    sizes = [e.ids_T.size for e in made.examples]
    line = {"file": c.source.file, "line": c.source.line, "status": split, "code": None, "reason": None}
    done.ledger.append({**line, "tokens": sum(sizes), "trained_tokens": trained})
    if split != "train":
        done.lines[split].append(as_line(c))
        return
    done.rows.append(blake2b(repr(row_key(c)).encode("utf-8", "surrogatepass"), digest_size=12).digest())
    counts = done.counts
    counts["trained tokens"] += trained
    done.stops.update(made.stops)
    if made.num_trimmed:
        counts["trimmed turns"] += made.num_trimmed
    if len(sizes) > 1:
        counts["split rows"] += 1
        counts["repeated tokens"] += sum(sizes[:-1]) - sum(made.num_trained[:-1])
    if c.messages[0].role == "assistant":
        counts["opening turns"] += 1


def _refused(source: Source, refusal: Refusal) -> dict[str, Any]:
    status = "dropped" if refusal.code in ("E-DATA-201", "E-CHAT-310") else "refused"
    said = {"status": status, "code": refusal.code, "reason": f"{refusal.found} {refusal.fix}", "where": refusal.where}
    return {"file": source.file, "line": source.line, **said, "tokens": 0, "trained_tokens": 0}


def as_line(c: Conversation) -> dict[str, Any]:
    """A row as prepared data keeps it."""
    return {"source": asdict(c.source), "messages": [asdict(m) for m in c.messages], "tools": list(c.tools)}


def ledger_bytes(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join([orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines])


def _short(source: Source) -> str:
    return f"{Path(source.file).name}:{source.line}"
