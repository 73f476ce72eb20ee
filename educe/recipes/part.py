"""One part of the data on its way from bytes to examples, in memory for one block of rows at a time.

A part knows nothing of the others and may be done in a process of its own: what it makes goes to files of its own, and what
it learned (counts, digests, samples) comes back as `Done`.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson

from educe.chat.documents import document_made
from educe.chat.engine import Engine
from educe.chat.examples import Distrust, Made, build_rendered, build_stream, made_of
from educe.chat.pairs import ANSWER, pair_made
from educe.chat.render import Renderer
from educe.chat.tokens import ChatTokenizer
from educe.chat.too_long import cut, halves
from educe.chat.view import joined, view
from educe.chat.weights import Weighing
from educe.data.reading import Group, Reading, read_row
from educe.data.sources import Span, read_span
from educe.data.split import HELD_OUT, HeldOut, Shares, asked_key, group_key, nearness, prompt_key
from educe.data.trees import joined as joined_messages
from educe.errors import Refusal
from educe.recipes.items import Item, as_line, digest_of, hashed, short, talks_of, texts_of
from educe.recipes.wanted import wanted
from educe.store.shards import Shard
from educe.types import Conversation, Document, Pair, Source

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
BLOCK_ROWS, CHUNK_ROWS = 4096, 2048
# A template that exceeds its limits on so many rows is stopped: each costs two seconds.
MAX_LIMIT_REFUSALS = 3
NUM_PREVIEWS = 3
NUM_SHOTS = 256
# Rows that are left out on purpose; any other code is a refusal.
DROPPED = frozenset({"E-DATA-201", "E-DATA-202", "E-DATA-203", "E-CHAT-310"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a data file, read as `reading` says. `role` is what the file is for: rows for training may be held out, where
    `held_out` says so."""

    number: int
    role: Split
    task: int
    span: Span
    reading: Reading
    held_out: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to do with every row. `place` is where parts put their files, `tasks` are the names of the tasks; `alone`: one
    process does them all, so that another core is free; `careful`: without remembered layouts and without the engine;
    `objective`: what is learned from the rows."""

    place: Path
    tasks: tuple[str, ...]
    settings: Mapping[str, bool | int | str]
    weighing: Weighing
    max_tokens: int
    too_long: Literal["drop", "split", "cut"]
    shares: Shares
    group: Group | None
    alone: bool
    careful: bool
    objective: str = "sft"

    def place_of(self, number: int) -> Path:
        return self.place / f"{number:06d}"


@dataclass(slots=True, kw_only=True)
class Done:
    """What the rows of a part became.

    `unread` counts the keys of rows that mean nothing; `keys` are the first 8 bytes of the keys of the rows kept in each split,
    `rows` digests of the rows kept for training, `asked` of all of them but their last answer; `near` the keys that a larger share
    would hold out first; `shots` a sample of the rows kept for training, by digest; `first_unused` the first line of each code;
    `caught` says why all must be done again more carefully ("" if not).
    """

    number: int
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    stops: Counter[int] = field(default_factory=Counter)
    keys: dict[Split, bytearray] = field(default_factory=lambda: {s: bytearray() for s in SPLITS})
    rows: bytearray = field(default_factory=bytearray)
    asked: bytearray = field(default_factory=bytearray)
    near: dict[HeldOut, list[str]] = field(default_factory=dict)
    shots: dict[bytes, bytes] = field(default_factory=dict)
    previews: list[dict[str, Any]] = field(default_factory=list)
    first_unused: dict[str, dict[str, Any]] = field(default_factory=dict)
    over_limits: list[dict[str, Any]] = field(default_factory=list)
    caught: str = ""


Row = tuple[Source, Item | Refusal, str]


def do(part: Part, job: Job, tokenizer: ChatTokenizer, engine: Engine) -> Done:
    """Do a part. What it makes of a row depends on nothing but the row and the job."""
    place = job.place_of(part.number)
    settled = tokenizer.with_settings(job.settings)
    with ExitStack() as stack:
        shards = {s: stack.enter_context(Shard(place / s)) for s in SPLITS}
        files = {n: stack.enter_context((place / f"{n}.jsonl").open("wb")) for n in ("ledger", "dev", "test")}
        work = _Work(part, job, Renderer(settled, remembers=not job.careful), engine, shards, files)
        rows = _rows(part, job, work.done.unread, work.done.counts)
        while True:
            with _no_garbage():
                block = list(islice(rows, BLOCK_ROWS))
                if not block or not work.block(block):
                    break
    return work.finish()


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


def _rows(part: Part, job: Job, unread: Counter[str], counts: Counter[str]) -> Iterator[Row]:
    """The rows, each with the key that decides about its split; keys that mean nothing are counted in `unread`."""
    for source, value in joined_messages(read_span(part.span), messages=part.reading.of_messages):
        if isinstance(value, Refusal):
            yield source, value, ""
            continue
        items = read_row(value, source, part.reading, unread)
        group = job.group.of(value) if job.group is not None else value.get("message_tree_id")
        counts["rows without a group"] += job.group is not None and group is None
        for item in items:
            at = source if isinstance(item, Refusal) else item.source
            taken = item if isinstance(item, Refusal) else wanted(item, job.objective)
            if isinstance(taken, Refusal):
                yield at, taken, ""
            elif group is not None:
                yield at, taken, group_key(group)
            else:
                talks = talks_of(taken)
                yield at, taken, prompt_key(talks[0]) if talks else group_key(texts_of(taken)[0])


class _Work:
    """A part being done. `shards` take examples, `files` ledger lines and held-out rows."""

    def __init__(
        self,
        part: Part,
        job: Job,
        renderer: Renderer,
        engine: Engine,
        shards: Mapping[Split, Shard],
        files: Mapping[str, BinaryIO],
    ) -> None:
        self._part, self._job, self._renderer, self._engine = part, job, renderer, engine
        self._shards, self._files = shards, files
        self._encode = renderer.tokenizer.encode_many if job.careful else engine.encode_flat
        self._done = Done(number=part.number)
        self._first = 0  # number of the block's first row
        self._bar = b"\xff" * 12  # digests of rows that may still be among the lowest
        self._shown: list[Conversation] = []

    @property
    def done(self) -> Done:
        return self._done

    def block(self, rows: Sequence[Row]) -> bool:
        """Do a block of rows; False where the part is given up (see `Done.caught` and `over_limits`)."""
        lines: list[dict[str, Any]] = [{}] * len(rows)
        mine: dict[Split, list[int]] = {s: [] for s in SPLITS}
        for k, (source, item, key) in enumerate(rows):
            if isinstance(item, Refusal):
                lines[k] = self._refused(source, item)
                continue
            split: Split = self._part.role
            if split == "train" and self._part.held_out:
                split = self._job.shares.of(key)
                for name in HELD_OUT:
                    self._nearer(name, key)
            mine[split].append(k)
        made: list[Made | Refusal | None] = [None] * len(rows)
        try:
            for split, numbers in mine.items():
                self._make(split, [rows[k] for k in numbers], numbers, made)
        except Distrust as e:
            self._done.caught = f"{e}: the template does not treat rows alike"
            return False
        for split, numbers in mine.items():
            self._keep(split, rows, numbers, made, lines)
        self._files["ledger"].write(b"".join([orjson.dumps(x, option=orjson.OPT_APPEND_NEWLINE) for x in lines]))
        self._first += len(rows)
        self._done.counts["rows"] += len(rows)
        return len(self._done.over_limits) < MAX_LIMIT_REFUSALS

    def finish(self) -> Done:
        if self._engine.fell_back is not None and not self._job.careful:
            self._done.caught = f"the tokenizer engine was caught in a difference: {self._engine.fell_back}"
        weighing = ANSWER if self._job.objective == "preference" else self._job.weighing
        built = build_rendered(self._shown, self._renderer, weighing) if not self._done.caught else []
        tokenizer = self._renderer.tokenizer
        self._done.previews = [
            {"row": short(c.source), "runs": joined(view(b[0], c.messages, tokenizer, weighing))}
            for c, b in zip(self._shown, built, strict=False)
            if not isinstance(b, Refusal)
        ]
        return self._done

    def _make(
        self, split: Split, rows: Sequence[Row], numbers: Sequence[int], made: list[Made | Refusal | None]
    ) -> None:
        """What each row of a split becomes, put into `made` at its number."""
        pairs = self._job.objective == "preference"
        weighing = ANSWER if split == "test" or pairs else self._job.weighing
        max_tokens = self._job.max_tokens
        talks = [c for _, item, _ in rows for c in talks_of(item)]
        chunks = (talks[i : i + CHUNK_ROWS] for i in range(0, len(talks), CHUNK_ROWS))
        of_talks: list[Made | Refusal] = []
        for chunk, proved in build_stream(chunks, self._renderer, weighing, self._encode, threaded=self._job.alone):
            for c, got in zip(chunk.rows, chunk.examples(proved, max_tokens), strict=True):
                if isinstance(got, Refusal) and got.code == "E-DATA-201" and split != "test" and not pairs:
                    got = self._shortened(c, got, weighing)
                of_talks.append(got)
        told = iter(of_talks)
        for k, (_, item, _) in zip(numbers, rows, strict=True):
            if isinstance(item, Document):
                made[k] = document_made(item.text, self._renderer.tokenizer, max_tokens)
            else:
                made[k] = pair_made(item, next(told), next(told)) if isinstance(item, Pair) else next(told)

    def _shortened(self, c: Conversation, refusal: Refusal, weighing: Weighing) -> Made | Refusal:
        """A row that is too long, by the recipe's choice: dropped, split between turns, or cut."""
        if self._job.too_long == "cut":
            whole = made_of(c, self._renderer, weighing, 2**31)
            kept = cut(whole, self._job.max_tokens) if isinstance(whole, Made) else None
            if kept is not None:
                self._done.counts.update(
                    {"cut rows": 1, "lost trained tokens": kept.num_lost, "unfinished answers": kept.num_unfinished}
                )
                return kept.made
        parts = halves(c) if self._job.too_long == "split" else None
        if parts is None:
            return refusal
        both = [made_of(p, self._renderer, weighing, self._job.max_tokens) for p in parts]
        for k, (p, got) in enumerate(zip(parts, both, strict=True)):
            if isinstance(got, Refusal) and got.code == "E-DATA-201":
                both[k] = self._shortened(p, got, weighing)
        if wrong := next((b for b in both if isinstance(b, Refusal)), None):
            return wrong
        self._done.counts["turn splits"] += 1
        one, two = (b for b in both if isinstance(b, Made))
        return Made(
            one.examples + two.examples,
            one.num_trained + two.num_trained,
            one.stops + two.stops,
            one.num_trimmed + two.num_trimmed,
        )

    def _keep(
        self,
        split: Split,
        rows: Sequence[Row],
        numbers: Iterable[int],
        made: Sequence[Made | Refusal | None],
        lines: list[dict[str, Any]],
    ) -> None:
        done, examples, of_rows = self._done, [], []
        task = self._part.task
        numbers = list(numbers)
        if split == "train":
            done.counts["control strings"] += self._num_wild([rows[k][1] for k in numbers])
        for k in numbers:
            (source, item, key), got = rows[k], made[k]
            if isinstance(got, Refusal):
                lines[k] = self._refused(source, got)
                if got.code == "E-CHAT-103":
                    done.over_limits.append(lines[k])
                continue
            assert got is not None
            assert not isinstance(item, Refusal)
            digest = digest_of(item)
            sizes = [e.ids_T.size for e in got.examples]
            lines[k] = {
                **self._line(source, split, digest),
                "tokens": sum(sizes),
                "trained_tokens": sum(got.num_trained),
            }
            done.counts[split] += 1
            done.keys[split] += bytes.fromhex(key[:16])
            examples += [replace(e, task=task) for e in got.examples] if task else got.examples
            of_rows += [self._first + k] * len(sizes)
            if split == "train":
                self._count(item, got, sizes, digest)
            else:
                self._files[split].write(b"".join(as_line(c) for c in talks_of(item)[:1]))
        self._shards[split].add(examples, of_rows)
        if len(done.shots) > NUM_SHOTS:
            done.shots = {d: done.shots[d] for d in sorted(done.shots)[:NUM_SHOTS]}
            self._bar = max(done.shots)

    def _num_wild(self, items: Sequence[Any]) -> int:
        """Rows whose text holds the text of a control token."""
        holds = self._renderer.tokenizer.holds_control
        texts = ["\ue000".join(texts_of(item)) for item in items]
        return sum(map(holds, texts)) if holds("\ue000".join(texts)) else 0

    def _count(self, item: Item, made: Made, sizes: Sequence[int], digest: bytes) -> None:
        done, counts = self._done, self._done.counts
        done.rows += digest[:8]
        done.asked += hashed(repr(asked_key(item)))[:8] if isinstance(item, Conversation) else digest[:8]
        counts[f"task {self._job.tasks[self._part.task]}"] += 1
        counts["trained tokens"] += sum(made.num_trained)
        counts["tokens"] += sum(sizes)
        done.stops.update(made.stops)
        if made.num_trimmed:
            counts["trimmed turns"] += made.num_trimmed
        talks = talks_of(item)
        if not talks:
            counts["documents"] += 1
            return
        if len(sizes) > len(talks):
            counts["split rows"] += 1
            counts["repeated tokens"] += sum(sizes[:-1]) - sum(made.num_trained[:-1])
        c = talks[0]
        if c.messages[0].role == "assistant":
            counts["opening turns"] += 1
        if c.messages[-1].role != "assistant":
            counts["unanswered ends"] += 1
        if len(self._shown) < NUM_PREVIEWS:
            self._shown += talks
        if digest < self._bar:
            done.shots[digest] = b"".join(map(as_line, talks))

    def _nearer(self, split: HeldOut, key: str) -> None:
        """Note a key if it is one of the two that a larger share would take first (the other share may need one of them)."""
        best = self._done.near.setdefault(split, [])
        if key not in best and (len(best) < 2 or nearness(key, split) < nearness(best[1], split)):
            self._done.near[split] = sorted([*best, key], key=lambda k: nearness(k, split))[:2]

    def _line(self, source: Source, status: str, digest: bytes | None) -> dict[str, Any]:
        place = {
            "file": source.file,
            "line": source.line,
            "item": source.item,
            "offset": source.offset,
            "task": self._job.tasks[self._part.task],
        }
        return {**place, "status": status, "hash": digest.hex() if digest else None, "code": None, "reason": None}

    def _refused(self, source: Source, refusal: Refusal) -> dict[str, Any]:
        status = "dropped" if refusal.code in DROPPED else "refused"
        said = {"code": refusal.code, "reason": f"{refusal.found} {refusal.fix}", "where": refusal.where}
        line = {**self._line(source, status, None), **said, "tokens": 0, "trained_tokens": 0}
        self._done.counts[status] += 1
        self._done.counts[refusal.code] += 1
        self._done.first_unused.setdefault(refusal.code, line)
        return line
