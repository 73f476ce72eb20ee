"""`educe prepare`: rows → proved examples on disk, with a ledger line for every row. Needs no torch and no GPU.

The result is a directory keyed by the hash of all that made it: the same rows, settings, tokenizer, template and code version
are prepared once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.chat.tokens import DEFAULT_NAME, ChatTokenizer, load_tokenizer
from educe.config import Recipe
from educe.config.recipe import Data, FileSplit, FileTemplate
from educe.data.sources import read_rows
from educe.files.hashes import hash_file, hash_json
from educe.files.jsonl import read_jsonl
from educe.model.source import Say, find_model
from educe.recipes.build import TEMPLATE, build
from educe.recipes.part import Split
from educe.store.token_store import STORE_VERSION, TokenStore, open_prepared, open_store
from educe.types import Conversation, Message, Source, ToolCall

# Bump when the same rows and settings would be prepared differently.
PREPARE_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A prepared directory, opened. `summary` is its summary.json."""

    path: Path
    key: str
    model_dir: Path
    tokenizer: ChatTokenizer
    summary: dict[str, Any]

    def store(self, split: str) -> TokenStore:
        return open_store(self.path / split)

    def conversations(self, name: str) -> list[Conversation]:
        """Rows of `dev`, `test` or `shots` (a sample of the training rows)."""
        return [_conversation(line) for line in read_jsonl(self.path / f"{name}.jsonl")]

    def previews(self) -> Any:
        return json.loads((self.path / "preview.json").read_text(encoding="utf-8"))


def prepare(recipe: Recipe, say: Say) -> Prepared:
    """Prepare the recipe's data, or open what was prepared before. Raises `DataError` when nothing can be trained on."""
    model_dir = find_model(recipe.model, say)
    tokenizer = load_tokenizer(model_dir, recipe.template)
    if recipe.template.kind == "own" and tokenizer.template_name == DEFAULT_NAME:
        say(f"{model_dir.name} has no chat template; using {DEFAULT_NAME} (<|user|>…<|end|> <|assistant|>…<|end|>)")
    if tokenizer.new_tokens:
        say(f"new control tokens, trained with the model: {' '.join(tokenizer.new_tokens)}")
    files = {s: hash_file(_present(p)) for s, p in files_of(recipe.data).items()}
    key = hash_json(
        {
            "versions": [PREPARE_VERSION, STORE_VERSION],
            "files": files,
            "data": {k: v for k, v in recipe.data.model_dump().items() if k not in ("train", "dev", "test")},
            "splits": [
                s.model_dump()["kind"] + str(getattr(s, "share", "")) for s in (recipe.data.dev, recipe.data.test)
            ],
            "seed": recipe.train.seed,
            "tokenizer": [tokenizer.tokenizer_hash, tokenizer.template_hash, sorted(tokenizer.stop)],
            "template": [dict(tokenizer.template.special), recipe.template.settings, tokenizer.eos],
        }
    )[:16]
    if open_prepared(_place(recipe, key)) is None:
        build(recipe, tokenizer, files_of(recipe.data), _place(recipe, key), {"key": key, "files": files}, say)
    return _opened(recipe, key, model_dir, tokenizer)


def open_prepared_data(recipe: Recipe, key: str, say: Say) -> Prepared | None:
    """What was prepared under `key`, whatever the data files hold by now; None where it is gone."""
    if open_prepared(_place(recipe, key)) is None:
        return None
    model_dir = find_model(recipe.model, say)
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


def files_of(data: Data) -> dict[Split, Path]:
    files: dict[Split, Path] = {"train": Path(data.train)}
    held: tuple[tuple[Split, Any], ...] = (("dev", data.dev), ("test", data.test))
    for name, split in held:
        if isinstance(split, FileSplit):
            files[name] = Path(split.file)
    return files


def _present(path: Path) -> Path:
    next(iter(read_rows(path)))  # raises the right DataError for what is no data file
    return path


def _conversation(line: dict[str, Any]) -> Conversation:
    messages = [
        Message(**{**m, "tool_calls": tuple(ToolCall(**call) for call in m["tool_calls"])}) for m in line["messages"]
    ]
    return Conversation(messages=tuple(messages), source=Source(**line["source"]), tools=tuple(line["tools"]))
