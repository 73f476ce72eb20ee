"""What a check found, and what the checks without a model look at: plain values, made once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from educe.chat.examples import Made, made_of
from educe.chat.pairs import ANSWER
from educe.chat.render import Renderer
from educe.config import Recipe
from educe.errors import EduceError, Refusal
from educe.files.run_dir import RunDir
from educe.model.describe import ModelFacts
from educe.pack.plan import PackPlan
from educe.recipes.build import weighing_of
from educe.recipes.memory import MemoryPlan
from educe.recipes.prepare import Prepared, inputs_of
from educe.recipes.survey import odd_rows
from educe.seeds import derive, permute
from educe.types import Conversation, Example

NUM_SAMPLED = 64

Verdict = Literal["pass", "warn", "fail", "skip", "unchecked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's verdict, the number it goes by and what that rests on. `skip`: it does not apply here; `unchecked`: it does,
    and could not be made. `evidence` says why."""

    id: str
    name: str
    verdict: Verdict
    number: str
    evidence: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        number = "" if self.number == "-" else f"{self.number}. "
        return f"{self.id} {self.name}: {number}{self.evidence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerCounts:
    """The ledger counted again: rows by status and by code, the first place of each code, tokens of the training rows."""

    statuses: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    trained: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A training row, the examples made of it now, and those in the store."""

    row: Conversation
    made: Made | Refusal
    stored: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What is known before a model is loaded. `settings`: what decides the run's weights, where it was claimed already; `text` the
    recipe as given, `argv` the words of the command; `ranks` those that packs are dealt to; a hang
    of `hang_after_s` ends the run, None: nothing does.
    `tokens_per_s`: the estimated speed of all ranks; `packed`: documents share rows; `stands_in`: the model is there for another, of
    weights that are not known yet; `memory_bytes`: of a GPU that is planned for and not here."""

    recipe: Recipe
    run: RunDir
    prepared: Prepared
    facts: ModelFacts
    plan: PackPlan
    memory: MemoryPlan
    device: str
    ranks: int
    settings: Mapping[str, Any] | None
    text: str
    argv: Sequence[str]
    hang_after_s: float | None
    tokens_per_s: float
    packed: bool
    stands_in: bool
    memory_bytes: int | None
    ledger: LedgerCounts
    sample: Sequence[Sampled]
    odd: Sequence[str]


Check = Callable[[Before], Finding]


def finding(
    id: str, name: str, number: str, evidence: str = "", *, fail: bool = False, warn: bool = False, skip: bool = False
) -> Finding:
    """The worst that holds is the verdict."""
    verdict: Verdict = "skip" if skip else "fail" if fail else "warn" if warn else "pass"
    return Finding(id=id, name=name, verdict=verdict, number=number, evidence=evidence)


def unchecked(id: str, name: str, because: str) -> Finding:
    """A check that applies and cannot be made here: no pass."""
    return Finding(id=id, name=name, verdict="unchecked", number="-", evidence=f"not checked, because {because}")


def refused(id: str, name: str, e: EduceError) -> Finding:
    """A check that ended in an error of its own."""
    return finding(id, name, e.code, f"{e.where} {e.found} {e.fix}", fail=True)


def before(
    recipe: Recipe,
    prepared: Prepared,
    facts: ModelFacts,
    plan: PackPlan,
    memory: MemoryPlan,
    device: str,
    tokens_per_s: float,
    *,
    settings: Mapping[str, Any] | None = None,
    text: str = "",
    argv: Sequence[str] = (),
    odd: Sequence[str] | None = None,
    hang_after_s: float | None = None,
    packed: bool = True,
    stands_in: bool = False,
    memory_bytes: int | None = None,
) -> Before:
    """Read the ledger and a sample of rows. `odd`: what `odd_rows` found, where it was asked already."""
    rows = prepared.conversations("shots")
    order = permute(len(rows), derive(recipe.train.seed, "preflight"))[:NUM_SAMPLED]
    chosen = {k: rows[k] for k in order.tolist()}
    counts, numbers = _read_ledger(prepared.path / "ledger.jsonl", list(chosen.values()))
    return Before(
        recipe=recipe,
        run=RunDir(recipe.run_path()),
        prepared=prepared,
        facts=facts,
        plan=plan,
        memory=memory,
        device=device,
        ranks=plan.num_ranks,
        settings=settings,
        text=text,
        argv=argv,
        hang_after_s=hang_after_s,
        tokens_per_s=tokens_per_s,
        packed=packed,
        stands_in=stands_in,
        memory_bytes=memory_bytes,
        ledger=counts,
        sample=_sampled(recipe, prepared, chosen, numbers),
        odd=odd_rows(*inputs_of(recipe)) if odd is None else odd,
    )


def _place(c: Conversation) -> tuple[str, int, int | None]:
    return c.source.file, c.source.line, c.source.item


def _read_ledger(path: Path, rows: Sequence[Conversation]) -> tuple[LedgerCounts, dict[Any, int]]:
    """The counts, and the numbers of the lines of `rows` by their places."""
    statuses, codes = Counter[str](), Counter[str]()
    places: dict[str, str] = {}
    tokens = trained = 0
    wanted, numbers = {_place(c) for c in rows}, dict[Any, int]()
    with path.open("rb") as ledger:
        for n, raw in enumerate(ledger):
            line = orjson.loads(raw)
            statuses[line["status"]] += 1
            if line["code"]:
                codes[line["code"]] += 1
                places.setdefault(line["code"], line["where"])
            elif line["status"] == "train":
                tokens += line["tokens"]
                trained += line["trained_tokens"]
                place = (line["file"], line["line"], line["item"])
                if place in wanted:
                    numbers.setdefault(place, n)
    counts = LedgerCounts(statuses=statuses, codes=codes, places=places, tokens=tokens, trained=trained)
    return counts, numbers


def _sampled(
    recipe: Recipe, prepared: Prepared, rows: Mapping[int, Conversation], numbers: Mapping[Any, int]
) -> tuple[Sampled, ...]:
    """Rows by their numbers in the sample, where chosen and rejected answers of pairs take turns."""
    store, renderer = prepared.store("train"), Renderer(prepared.tokenizer)
    pairs = recipe.learns_pairs
    weighing = ANSWER if pairs else weighing_of(recipe.data)
    found = []
    for k, c in rows.items():
        if (n := numbers.get(_place(c))) is None:  # dropped since, as a copy of a held-out row
            continue
        try:
            numbered = np.flatnonzero(store.rows == n).tolist()
            stored = tuple(store[i] for i in (numbered[k % 2 : k % 2 + 1] if pairs else numbered))
        except ValueError:  # no example at all
            stored = ()
        found.append(Sampled(row=c, made=made_of(c, renderer, weighing, recipe.data.max_tokens), stored=stored))
    return tuple(found)
