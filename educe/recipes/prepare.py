"""`educe prepare`: rows → proved examples on disk, with a ledger line for every row. Needs no torch and no GPU.

The result is a directory keyed by the hash of all that made it: the same rows, settings, tokenizer, template and code version
are prepared once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.chat.view import joined, view
from educe.chat.weights import build_examples, build_rendered
from educe.config import Recipe
from educe.config.recipe import Data, FileSplit
from educe.data.formats import to_conversation
from educe.data.sources import read_rows
from educe.data.split import draw, prompt_key, row_key
from educe.errors import DataError, Refusal
from educe.files.atomic import directory
from educe.files.hashes import hash_file, hash_json
from educe.files.jsonl import read_jsonl, write_jsonl
from educe.model.source import Say, find_model
from educe.seeds import derive, permute
from educe.stats import percentile
from educe.store.token_store import STORE_VERSION, TokenStore, open_prepared, open_store, write_store
from educe.types import Conversation, Example, Message, Source

# Bump when the same rows and settings would be prepared differently.
PREPARE_VERSION = 1
SPLITS = ("train", "dev", "test")
NUM_PREVIEWS = 3
NUM_SHOTS = 256


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
    tokenizer = load_tokenizer(model_dir)
    if tokenizer.template_is_default:
        say(f"{model_dir.name} has no chat template; using ChatML (<|im_start|>role … <|im_end|>)")
    files = {s: hash_file(_present(p)) for s, p in _files(recipe.data).items()}
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
        }
    )[:16]
    if open_prepared(_place(recipe, key)) is None:
        _build(recipe, tokenizer, _place(recipe, key), {"key": key, "files": files})
    return _opened(recipe, key, model_dir, tokenizer)


def open_prepared_data(recipe: Recipe, key: str, say: Say) -> Prepared | None:
    """What was prepared under `key`, whatever the data files hold by now; None where it is gone."""
    if open_prepared(_place(recipe, key)) is None:
        return None
    model_dir = find_model(recipe.model, say)
    return _opened(recipe, key, model_dir, load_tokenizer(model_dir))


def _place(recipe: Recipe, key: str) -> Path:
    return Path(recipe.runs) / "prepared" / key


def _opened(recipe: Recipe, key: str, model_dir: Path, tokenizer: ChatTokenizer) -> Prepared:
    path = _place(recipe, key)
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return Prepared(path=path, key=key, model_dir=model_dir, tokenizer=tokenizer, summary=summary)


def _files(data: Data) -> dict[str, Path]:
    files = {"train": Path(data.train)}
    for name, split in (("dev", data.dev), ("test", data.test)):
        if isinstance(split, FileSplit):
            files[name] = Path(split.file)
    return files


def _present(path: Path) -> Path:
    next(iter(read_rows(path)))  # raises the right DataError for what is no data file
    return path


def _build(recipe: Recipe, tokenizer: ChatTokenizer, path: Path, about: dict[str, Any]) -> None:
    data = recipe.data
    ledger: list[dict[str, Any]] = []
    rows = _split(data, ledger)
    kept: dict[str, list[Conversation]] = {s: [] for s in SPLITS}
    examples: dict[str, list[Example]] = {s: [] for s in SPLITS}
    for split, conversation in rows:
        built = build_examples(
            conversation, tokenizer, only_last=data.train_on == "last" or split == "test", max_tokens=data.max_tokens
        )
        ledger.append(_line(conversation.source, split, built))
        if not isinstance(built, Refusal):
            kept[split].append(conversation)
            examples[split] += built
    if not kept["train"]:
        raise _nothing_left(data.train, ledger)
    ledger.sort(key=lambda line: (list(map(str, _files(data).values())).index(line["file"]), line["line"]))
    with directory(path, about={"stage": "prepare", "version": PREPARE_VERSION, **about}) as part:
        for split in ("train", "dev"):
            write_store(part / split, examples[split])
        for name in ("dev", "test"):
            write_jsonl(part / f"{name}.jsonl", map(_as_line, kept[name]))
        order = permute(len(kept["train"]), derive(recipe.train.seed, "shots"))[:NUM_SHOTS].tolist()
        write_jsonl(part / "shots.jsonl", [_as_line(kept["train"][i]) for i in order])
        write_jsonl(part / "ledger.jsonl", ledger)
        _dump(part / "preview.json", _previews(kept["train"], tokenizer, data.train_on == "last"))
        _dump(part / "summary.json", _summary(kept, examples, ledger))


def _split(data: Data, ledger: list[dict[str, Any]]) -> list[tuple[str, Conversation]]:
    """Every readable row with its split; rows that cannot be read go to the ledger at once."""
    read = {name: list(_readable(path, data.system, ledger)) for name, path in _files(data).items()}
    train = read.pop("train")
    keys = [prompt_key(c) for c in train]
    held: dict[str, str] = {}
    for name, split in (("dev", data.dev), ("test", data.test)):
        if not isinstance(split, FileSplit):
            free = [hash_json([name, k]) + k for k in keys if k not in held]
            held |= {drawn[64:]: name for drawn in draw(free, split.share)}
    rows = [(held.get(k, "train"), c) for k, c in zip(keys, train, strict=True)]
    return [*rows, *((name, c) for name, cs in read.items() for c in cs)]


def _readable(path: Path, system: str | None, ledger: list[dict[str, Any]]) -> Iterable[Conversation]:
    for source, row in read_rows(path):
        made = row if isinstance(row, Refusal) else to_conversation(row, source, system)
        if isinstance(made, Refusal):
            ledger.append(_line(source, "", made))
        else:
            yield made


def _line(source: Source, split: str, built: list[Example] | Refusal) -> dict[str, Any]:
    where = {"file": source.file, "line": source.line}
    if isinstance(built, Refusal):
        status = "dropped" if built.code == "E-DATA-201" else "refused"
        said = {"status": status, "code": built.code, "reason": f"{built.found} {built.fix}", "where": built.where}
        return {**where, **said, "tokens": 0, "trained_tokens": 0}
    tokens = sum(int(e.ids_T.size) for e in built)
    trained = sum(int((e.weights_T > 0).sum()) for e in built)
    return {**where, "status": split, "code": None, "reason": None, "tokens": tokens, "trained_tokens": trained}


def _nothing_left(file: str, ledger: list[dict[str, Any]]) -> DataError:
    first = next((line for line in ledger if line["code"]), None)
    if first is None:
        return DataError(5, file, "has no row left to train on after the split.", "Give more rows.")
    found = f"has no usable row; the first is refused: {first['code']} {first['where']} {first['reason']}"
    return DataError(5, file, found, "`educe check` lists all reasons.")


def _previews(rows: list[Conversation], tokenizer: ChatTokenizer, only_last: bool) -> list[dict[str, Any]]:
    previews = []
    for c in rows[:NUM_PREVIEWS]:
        built = build_rendered(c, tokenizer, only_last)
        if not isinstance(built, Refusal):
            previews.append({"row": _short(c.source), "runs": joined(view(built[0], tokenizer))})
    return previews


def _summary(
    kept: dict[str, list[Conversation]], examples: dict[str, list[Example]], ledger: list[dict[str, Any]]
) -> dict[str, Any]:
    lengths = [int(e.ids_T.size) for e in examples["train"]]
    prompts = {s: {prompt_key(c) for c in kept[s]} for s in SPLITS}
    return {
        "rows_in": len(ledger),
        "rows": {s: len(kept[s]) for s in SPLITS},
        "dropped": sum(line["status"] == "dropped" for line in ledger),
        "refused": sum(line["status"] == "refused" for line in ledger),
        "examples": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": sum(int((e.weights_T > 0).sum()) for e in examples["train"]),
        "length": {"median": percentile(lengths, 0.5), "p95": percentile(lengths, 0.95), "max": max(lengths)},
        "duplicates": len(kept["train"]) - len({row_key(c) for c in kept["train"]}),
        "leaks": {s: len(prompts["train"] & prompts[s]) for s in ("dev", "test")},
    }


def _short(source: Source) -> str:
    return f"{Path(source.file).name}:{source.line}"


def _as_line(c: Conversation) -> dict[str, Any]:
    return {"source": asdict(c.source), "messages": [asdict(m) for m in c.messages]}


def _conversation(line: dict[str, Any]) -> Conversation:
    messages = tuple(Message(role=m["role"], content=m["content"]) for m in line["messages"])
    return Conversation(messages=messages, source=Source(**line["source"]))


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
