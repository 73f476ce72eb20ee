"""`educe init`: a data file to a commented recipe, each default derived from the data, the model and the machine, with the reason."""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from educe.chat.examples import build_examples
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.config import parse_recipe
from educe.data.finding import HUB, find_files
from educe.data.reading import PLAIN, read_row, reading_for, to_conversation
from educe.data.sources import read_rows
from educe.data.trees import joined
from educe.errors import Refusal, UsageError
from educe.files.atomic import write_text
from educe.model.describe import describe_model
from educe.model.source import DEFAULT_MODEL, Say
from educe.recipes.advise import Looked, recipe_text
from educe.recipes.build import no_usable_row
from educe.recipes.init_stage import seen, stage_text
from educe.recipes.model_of import model_of
from educe.types import Conversation, Document, Pair

# Rows that are looked at: enough for lengths and forms, quick for a file of any size.
SAMPLE_ROWS = 5000
_SAMPLE_OTHERS = 500  # of raw text or pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Suited:
    """A model of the table below: what full tuning or LoRA of it needs."""

    model: str
    memory_gb: float
    why: str


# Largest that fits wins. Sizes: LoRA in bf16 holds 2 bytes a parameter and some room for activations; on a CPU time decides.
_GPU_MODELS = (
    Suited(model="Qwen/Qwen2.5-7B-Instruct", memory_gb=40, why="7.6B parameters with LoRA"),
    Suited(model="HuggingFaceTB/SmolLM2-1.7B-Instruct", memory_gb=10, why="1.7B parameters with LoRA"),
    Suited(model="Qwen/Qwen2.5-0.5B-Instruct", memory_gb=6, why="0.5B parameters"),
)


def init(
    data: str,
    model: str | None,
    out: Path,
    say: Say,
    dev: str | None = None,
    test: str | None = None,
    name: str = "",
) -> Path:
    """Write a recipe beside nothing that exists: an existing file is never overwritten. Returns its path."""
    if out.exists() or out.is_symlink():
        raise UsageError(101, str(out), "exists.", "Give another --out, or delete it.")
    chosen, why_model = (model, "as asked") if model else suit_model()
    say(f"model: {chosen} ({why_model})")
    model_dir = model_of(chosen, say)
    facts = describe_model(model_dir, chosen)
    tokenizer = load_tokenizer(model_dir)
    run_name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).name.split(".")[0]).strip("-.") or "run"
    if (other := _no_talk(data)) is not None:
        _refuse_files(dev, test)
        about = seen(*other, tokenizer)
        text = stage_text(about, facts, name=run_name, model=(chosen, why_model), train=_from(out, data))
        parse_recipe(text, str(out))
        write_text(out, text)
        return out
    looked = _look(data, tokenizer, facts.max_positions)
    held = [_look(file, tokenizer, facts.max_positions) for file in (dev, test) if file is not None]
    memory = _gpu_memory_gb() * 1e9 or psutil.virtual_memory().available
    text = recipe_text(
        replace(looked, held=held),
        facts,
        memory,
        _gpu_memory_gb() == 0,
        name=run_name,
        model=(chosen, why_model),
        train=_from(out, data),
        dev=_from(out, dev) if dev is not None else None,
        test=_from(out, test) if test is not None else None,
    )
    parse_recipe(text, str(out))
    write_text(out, text)
    return out


def _no_talk(data: str) -> tuple[int, list[Document | Pair]] | None:
    """The number of rows and some of them, where the first that can be read is raw text or a preference pair."""
    rows, sample = 0, list[Document | Pair]()
    for file in find_files(data):
        reading = reading_for(PLAIN, file)
        for source, row in joined(read_rows(file), messages=reading.of_messages):
            rows += 1
            for item in read_row(row, source, reading) if not isinstance(row, Refusal) else ():
                if isinstance(item, Conversation) and not sample:
                    return None
                if isinstance(item, Document | Pair) and len(sample) < _SAMPLE_OTHERS:
                    sample.append(item)
    return (rows, sample) if sample else None


def _refuse_files(dev: str | None, test: str | None) -> None:
    if dev is not None or test is not None:
        option = "--dev" if dev is not None else "--test"
        found = "is for conversations; these rows are raw text or pairs."
        raise UsageError(101, option, found, "Leave it out, and write data.dev or data.test {kind: file, file: ...}.")


def suit_model() -> tuple[str, str]:
    """The model that fits this machine's memory and a sensible time, and why."""
    gpu_gb = _gpu_memory_gb()
    for s in _GPU_MODELS:
        if gpu_gb >= s.memory_gb:
            return s.model, f"{s.why} fits the GPU's {gpu_gb:.0f} GB"
    memory = psutil.virtual_memory().total / 1e9
    return (
        DEFAULT_MODEL,
        f"no GPU of 6 GB or more here, {memory:.0f} GB of memory: 135M parameters train in minutes on a CPU",
    )


def _gpu_memory_gb() -> float:
    try:
        import torch
    except ImportError:
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0.0


def _from(out: Path, files: str) -> str:
    """`files` as the recipe should name them: relative to the recipe where they lie below it."""
    if files == "-" or files.startswith(HUB) or (not Path(files).exists() and not set("*?[") & set(files)):
        return files
    path, base = Path(files).resolve(), out.resolve().parent
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def _look(data: str, tokenizer: ChatTokenizer, positions: int) -> Looked:
    """Look at a sample of the rows, the same ones every time; no more than it is held in memory."""
    rows = 0
    sample: list[tuple[float, int, Conversation]] = []  # a heap: the rows with the lowest draws
    draws = np.random.default_rng(0)
    reasons: dict[str, tuple[int, Refusal]] = {}
    for file in find_files(data):
        reading = reading_for(PLAIN, file)
        for source, row in joined(read_rows(file), messages=reading.of_messages):
            rows += 1
            made = row if isinstance(row, Refusal) else to_conversation(row, source, reading)
            if isinstance(made, Refusal):
                reasons[made.code] = reasons.get(made.code, (0, made))[0] + 1, reasons.get(made.code, (0, made))[1]
                continue
            drawn = (-float(draws.random()), -rows, made)
            (heapq.heappush if len(sample) < SAMPLE_ROWS else heapq.heappushpop)(sample, drawn)
    kept = [c for _, _, c in sorted(sample, key=lambda d: -d[1])]
    lengths, answers, answer_tokens = [], [], []
    renderer = Renderer(settle(tokenizer, kept).tokenizer)
    too_long = 0
    for c, built in zip(kept, build_examples(kept, renderer, max_tokens=positions), strict=True):
        if isinstance(built, Refusal):
            too_long += built.code == "E-DATA-201"
            reasons[built.code] = reasons.get(built.code, (0, built))[0] + 1, reasons.get(built.code, (0, built))[1]
            continue
        lengths += [int(e.ids_T.size) for e in built]
        answers.append(next(m.content for m in reversed(c.messages) if m.role == "assistant"))
        answer_tokens.append(int((built[-1].weights_T > 0).sum()))
    if not lengths:
        raise no_usable_row(data, [(n, code, r.where, f"{r.found} {r.fix}") for code, (n, r) in reasons.items()])
    return Looked(
        rows=rows,
        num_sampled=len(kept),
        num_too_long=too_long,
        lengths=lengths,
        answers=answers,
        answer_tokens=answer_tokens,
    )
