"""`educe prepare`: rows → proved examples on disk, with a ledger line for every row. Needs no torch and no GPU.

The result is a directory keyed by the hash of all that made it: the same rows, settings, tokenizer, template and code version
are prepared once.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from jaxtyping import UInt64

from educe.chat.tokens import DEFAULT_NAME, ChatTokenizer, load_tokenizer
from educe.config import Recipe
from educe.config.data import ONLY, REPLAY, Data, FileSplit, Task
from educe.config.recipe import FileTemplate
from educe.data.finding import empty_files, find_files
from educe.data.formats import FORMATS
from educe.data.reading import DOCUMENT, MIXED, Expression, Reading
from educe.data.sources import container_of
from educe.errors import DataError, RecipeError
from educe.files.atomic import MANIFEST
from educe.files.hashes import cache_dir, hash_file_once, hash_json
from educe.files.locks import one_at_a_time
from educe.model.source import Alive, Say
from educe.recipes.build import TEMPLATE, Input, build
from educe.recipes.model_of import model_of
from educe.recipes.part import Split
from educe.store.token_store import STORE_VERSION, TokenStore, open_prepared, open_store
from educe.types import Conversation, Message, Source, ToolCall

# Bump when the same rows and settings would be prepared differently.
PREPARE_VERSION = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A prepared directory, opened. `summary` is its summary.json."""

    path: Path
    key: str
    model_dir: Path
    tokenizer: ChatTokenizer
    summary: dict[str, Any]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of their numbers."""
        return tuple(self.summary["tasks"])

    @property
    def left_out(self) -> np.ndarray:
        """Examples of the training store that are never drawn."""
        return np.asarray(np.load(self.path / "left_out.npy"))

    def store(self, split: str) -> TokenStore:
        return open_store(self.path / split)

    def keys(self, split: Literal["train", "test"]) -> UInt64[np.ndarray, " k"]:
        """The first 8 bytes of the keys that rows are split by (of their prompts, or of `data.group`), each once, in order."""
        found: np.ndarray = np.load(self.path / f"{split}_keys.npy")
        return found

    def has_conversations(self, name: str) -> bool:
        """Whether `dev`, `test` or `shots` has a row that answers: a split may hold raw text alone."""
        return (self.path / f"{name}.jsonl").stat().st_size > 0

    def sources(self, name: str) -> list[Source]:
        """Where each row of `conversations` is from, without reading more of it."""
        with (self.path / f"{name}.jsonl").open("rb") as lines:
            return [Source(**orjson.loads(raw)["source"]) for raw in lines]

    def conversations(self, name: str, at: Collection[int] | None = None) -> list[Conversation]:
        """Rows of `dev`, `test` or `shots` (a sample of the training rows), or those of these numbers alone, in order."""
        with (self.path / f"{name}.jsonl").open("rb") as lines:
            return [_conversation(orjson.loads(raw)) for k, raw in enumerate(lines) if at is None or k in at]

    @property
    def made_of(self) -> list[list[str]] | None:
        """The hashes of the files it was made of; None where an earlier version made it."""
        made_of: list[list[str]] | None = self._manifest().get("made_of")
        return made_of

    @property
    def whole(self) -> str:
        """The key of what the recipe's files give: its own, unless it holds part of the training rows alone (see subset.py)."""
        return str(self._manifest().get("whole", self.key))

    def _manifest(self) -> dict[str, Any]:
        held: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        return held

    def previews(self) -> Any:
        return json.loads((self.path / "preview.json").read_text(encoding="utf-8"))


def prepare(recipe: Recipe, say: Say, alive: Alive = lambda: None) -> Prepared:
    """Prepare the recipe's data, or open what was prepared before; `alive` is called at every piece of that. Raises `DataError` when
    nothing can be trained on."""
    model_dir = model_of(recipe.model, say)
    tokenizer = load_tokenizer(model_dir, recipe.template)
    if recipe.template.kind == "own" and tokenizer.template_name == DEFAULT_NAME:
        say(f"{model_dir.name} has no chat template; using {DEFAULT_NAME} (<|user|>…<|end|> <|assistant|>…<|end|>)")
    if tokenizer.new_tokens:
        say(f"new control tokens, trained with the model: {' '.join(tokenizer.new_tokens)}")
    inputs, names = inputs_of(recipe)
    files = _hashes(inputs, alive)
    key = _key(recipe, tokenizer, files, names)
    place = _place(recipe, key)
    if open_prepared(place) is None:
        waits = partial(say, f"another process prepares {key}: waiting for it")
        with one_at_a_time(cache_dir() / "locks" / hash_json([str(place.resolve())])[:24], waits, alive):
            if open_prepared(place) is None:
                for file in without_rows(recipe):
                    say(f"warning: {file} is empty: not read")
                build(recipe, tokenizer, inputs, names, place, {"key": key, "made_of": files}, say, alive)
    return _opened(recipe, key, model_dir, tokenizer)


def _key(recipe: Recipe, tokenizer: ChatTokenizer, files: list[list[str]], names: list[str]) -> str:
    """The hash of all that decides what is prepared."""
    return hash_json(
        {
            "versions": [PREPARE_VERSION, STORE_VERSION],
            "files": files,
            "tasks": names,
            "data": _decisive(recipe.data),
            **({} if recipe.objective.kind == "sft" else {"objective": recipe.objective.kind}),
            "tokenizer": [tokenizer.tokenizer_hash, tokenizer.template_hash, sorted(tokenizer.stop)],
            "template": [dict(tokenizer.template.special), recipe.template.settings, tokenizer.eos],
        }
    )[:16]


def key_now(recipe: Recipe, model_dir: Path) -> tuple[str, list[list[str]]]:
    """The key that the recipe's files would be prepared under now, and their hashes."""
    inputs, names = inputs_of(recipe)
    files = _hashes(inputs)
    return _key(recipe, load_tokenizer(model_dir, recipe.template), files, names), files


def inputs_of(recipe: Recipe) -> tuple[list[Input], list[str]]:
    """The files of a recipe with how they are read, in order, and the names of the tasks. Raises `DataError`."""
    data, own = recipe.data, Path(recipe.runs).resolve()
    inputs: list[Input] = []
    names: list[str] = []
    for name, rows in data.sources.items():
        found = find_files(rows.files, own, rows.header)
        per_file = isinstance(rows, Task) and rows.per_file
        called = _names_of(found) if per_file else {}
        for files in [[f] for f in found] if per_file else [found]:
            role: Split = "test" if name in data.hold_out else "train"
            reading = reading_of(name, data)
            held = name != REPLAY
            inputs.append(
                Input(role=role, task=len(names), files=files, reading=reading, header=rows.header, held_out=held)
            )
            names.append(f"{name}/{called[files[0]]}" if per_file else name)
    splits: tuple[tuple[Split, Any], ...] = (("dev", data.dev), ("test", data.test))
    for split, held in splits:
        if isinstance(held, FileSplit):
            named = next((n for n, name in enumerate(names) if held.task in (name, name.split("/")[0])), 0)
            like = held.task or next(iter(data.sources))
            rows, reading = data.sources[like], reading_of(like, data)
            files = find_files(held.file, own, rows.header)
            inputs.append(Input(role=split, task=named, files=files, reading=reading, header=rows.header))
    _refuse_shared(inputs)
    for i in inputs:
        for file in i.files:
            container_of(file)  # raises for what is no data file, before it is read through
    return inputs, names


def without_rows(recipe: Recipe) -> list[Path]:
    """Files that are left out, since they hold no row and others that were named with them do."""
    data, own = recipe.data, Path(recipe.runs).resolve()
    held = [s for s in (data.dev, data.test) if isinstance(s, FileSplit)]
    named = [(rows.files, rows.header) for rows in data.sources.values()]
    named += [(s.file, data.sources[s.task or next(iter(data.sources))].header) for s in held]
    return [file for spec, header in named for file in empty_files(spec, own, header)]


def _names_of(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file: its own without endings where that is enough, else with the directories that tell it apart."""
    short = {f: f.name.split(".")[0] for f in files}
    if len(set(short.values())) == len(files):
        return short
    base = Path(os.path.commonpath([f.parent for f in files]))
    return {f: f.relative_to(base).as_posix() for f in files}


def _refuse_shared(inputs: Sequence[Input]) -> None:
    """No file both trains and tests."""
    roles: dict[Path, Split] = {}
    for i in inputs:
        for file in i.files:
            role = roles.setdefault(file.resolve(), i.role)
            if role != i.role:
                found = f"is named for {role} and for {i.role}."
                fix = "Hold rows out of it: data.dev and data.test {kind: share, share: 0.1}."
                raise DataError(12, str(file), found, fix)


def named_twice(inputs: Sequence[Input]) -> list[Path]:
    """Files that are read more than once: their rows count as often."""
    counts = Counter(file.resolve() for i in inputs for file in i.files)
    return [file for file, n in counts.items() if n > 1]


def reading_of(name: str, data: Data) -> Reading:
    """How the rows of a task are read. Raises `RecipeError` for a format or an expression that is none."""
    rows = data.sources[name]
    place = "data.train" if data.train is not None and name == ONLY else f"data.tasks.{name}"
    place = "data.replay" if name == REPLAY else place
    known = (*FORMATS, DOCUMENT, MIXED)
    if rows.format is not None and rows.format not in known:
        near = difflib.get_close_matches(rows.format, known, 1, 0.5)
        fix = f"Did you mean {near[0]!r}?" if near else f"One of {', '.join(known)}."
        raise RecipeError(103, f"{place}.format", f"{rows.format!r} is no format.", fix)
    return Reading(
        format={MIXED: None, DOCUMENT: "text"}.get(rows.format or "", rows.format),
        documents=rows.format == DOCUMENT,
        of_file=MIXED if rows.format == MIXED else None,
        columns={key: Expression(text, f"{place}.columns.{key}") for key, text in rows.columns.items()},
        where=Expression(rows.where, f"{place}.where") if rows.where is not None else None,
        roles=rows.roles,
        system=data.system,
        best=rows.trees.paths == "best",
        max_rank=rows.trees.max_rank,
    )


def _hashes(inputs: Sequence[Input], alive: Alive = lambda: None) -> list[list[str]]:
    """What the files hold, and as what they are read: a name can decide that."""

    def told(file: Path) -> str:
        alive()
        return f"{container_of(file)} {hash_file_once(file, alive)}"

    return [[i.role, *map(told, i.files)] for i in inputs]


def _decisive(data: Data) -> dict[str, Any]:
    """The settings that decide what is prepared: all but how tasks are mixed and weighed, and where files lie."""
    mixing = {"rate", "cap", "loss_weight", "files", "share"}
    tasks = {name: rows.model_dump(exclude=mixing) for name, rows in data.sources.items()}
    splits = [s.model_dump(exclude={"file"}) for s in (data.dev, data.test)]
    others = data.model_dump(exclude={"train", "tasks", "rates", "loss_mean", "replay", "dev", "test", "max_unused"})
    return {**others, "tasks": tasks, "splits": splits}


def open_prepared_data(recipe: Recipe, key: str, say: Say) -> Prepared | None:
    """What was prepared under `key`, whatever the data files hold by now; None where it is gone."""
    if open_prepared(_place(recipe, key)) is None:
        return None
    model_dir = model_of(recipe.model, say)
    choice = recipe.template
    if isinstance(choice, FileTemplate):  # as it was then
        choice = choice.model_copy(update={"file": str(_place(recipe, key) / TEMPLATE)})
    return _opened(recipe, key, model_dir, load_tokenizer(model_dir, choice))


def _place(recipe: Recipe, key: str) -> Path:
    return Path(recipe.runs) / "prepared" / key


def _opened(recipe: Recipe, key: str, model_dir: Path, tokenizer: ChatTokenizer) -> Prepared:
    path = _place(recipe, key)
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    settled = tokenizer.with_settings(summary["template_settings"])
    return Prepared(path=path, key=key, model_dir=model_dir, tokenizer=settled, summary=summary)


def _conversation(line: dict[str, Any]) -> Conversation:
    messages = [
        Message(**{**m, "tool_calls": tuple(ToolCall(**call) for call in m["tool_calls"])}) for m in line["messages"]
    ]
    return Conversation(messages=tuple(messages), source=Source(**line["source"]), tools=tuple(line["tools"]))
