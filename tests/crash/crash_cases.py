"""What the crash tests share: small runs in directories of their own, and what must be equal to an undisturbed run's."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.files.jsonl import read_jsonl

import forked

CLOCK = ("tokens_per_s", "elapsed_s", "peak_memory_bytes", "rank_skew")
TRAIN = ["train", "run.yaml"]
# Last: a checkpoint after every step, two kept. Best: after every second one and every new best.
VARIANTS = {
    "last": {"checkpoint_every_steps": 1, "keep_checkpoints": 2, "measure_every_share": 0.5},
    "best": {"checkpoint_every_steps": 2, "keep_checkpoints": 2, "measure_every_share": 0.2, "keep_weights": "best"},
}


def train_in(place: Path, **job: Any) -> tuple[int, str]:
    """`educe train` in the place, as the job says, in a process that is forked for it: (exit code, what was said)."""
    process = forked.begin("crash_server:reply", [{"place": str(place), "words": TRAIN, **job}])
    out, err = process.communicate(300)
    assert process.returncode == 0, err
    reply = json.loads(out)
    return int(reply["code"]), str(reply["said"])


def make_place(place: Path, model: Path, variant: str, *, ranks: int = 1) -> Path:
    """A directory with a recipe, its rows and a way to the model."""
    place.mkdir(parents=True)
    numbers = random.Random(1)
    for name, first, count in (("train", 0, 12), ("dev", 100, 3), ("test", 200, 2)):
        rows = []
        for i in range(first, first + count):
            ask = {"role": "user", "content": f"order {1000 + i} the user said"}
            say = {"role": "assistant", "content": json.dumps({"intent": "".join(numbers.choices("abcdefgh", k=6))})}
            rows.append(json.dumps({"messages": [ask, say]}))
        (place / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    knobs = {
        "epochs": 3, "batch_tokens": 320, "micro_batch_tokens": 160, "learning_rate": 1.5e-2, "schedule": "constant",
        **VARIANTS[variant],
    }  # fmt: skip
    lines = "".join(f"  {k}: {v}\n" for k, v in knobs.items())
    (place / "run.yaml").write_text(
        f"name: run\nmodel: {model}\ndevice: cpu\ndtype: float32\ndata:\n  train: train.jsonl\n"
        "  dev: {kind: file, file: dev.jsonl}\n  test: {kind: file, file: test.jsonl}\n  max_tokens: 128\n"
        f"train:\n{lines}evaluation: {{metric: {{kind: text}}, max_new_tokens: 3, few_shot: 0}}\n",
        encoding="utf-8",
    )
    return place


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What a finished run leaves that must not depend on how often it was broken off."""

    weights: str
    optimizer: dict[str, str]
    rows: dict[str, str]
    story: list[Any]
    ledger: str
    provenance: dict[str, Any]
    files: list[str]

    def differs(self, other: End) -> list[str]:
        """Names of what is not equal."""
        return [name for name in End.__slots__ if getattr(self, name) != getattr(other, name)]


def end_of(place: Path) -> End | str:
    """What is left in the place after a run that ended well, or why that cannot be said."""
    run = place / "runs" / "run"
    found = sorted((run / "checkpoints").glob("step-*"))
    if not found:
        return "no checkpoint is left"
    notes = [json.loads(line) for line in Path(f"{place}.seen").read_text(encoding="utf-8").splitlines()]
    rows: dict[str, str] = {}
    for kind, rank, step, digest in notes:
        key = f"{rank}:{step}"
        if kind == "rows" and rows.setdefault(key, digest) != digest:
            return f"step {step} was made of other rows the second time"
    provenance = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    kept = ("plan_sha256", "steps", "steps_done", "weights_step", "trainable_parameters", "packed", "ranks")
    lines = [x for f in ("metrics", "samples") for x in read_jsonl(run / f"{f}.jsonl")]
    return End(
        weights=hashlib.sha256((found[-1] / "weights.safetensors").read_bytes()).hexdigest(),
        optimizer={str(n[1]): n[3] for n in notes if n[0] == "optimizer"},
        rows=dict(sorted(rows.items())),
        story=[{k: v for k, v in x.items() if k not in CLOCK} for x in lines],
        ledger=re.sub(f"{place.parent}/[^/]+/", "", (run / "ledger.jsonl").read_text(encoding="utf-8"))
        + (run / "preview.json").read_text(encoding="utf-8"),
        provenance={**{k: provenance[k] for k in kept}, "finished": provenance["finished"] is not None},
        files=files_of(place),
    )


def files_of(place: Path) -> list[str]:
    """Names of all files but damaged checkpoints that were moved aside, of the cache only what is not finished; the number of a
    process is left out."""
    below = [p for p in (place / "runs").rglob("*") if p.is_file() and "damaged-" not in str(p)]
    names = [p.relative_to(place).as_posix() for p in [*below, *(place / "cache").rglob(".*")]]
    return sorted(re.sub(r"\.\d+\.", ".PID.", name) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """An undisturbed run and what cases begin with: nothing but data, or prepared data too. `num_events`: those of each."""

    home: Path
    end: End
    bare: Path
    prepared: Path
    num_events: dict[str, int]
    trace: list[list[Any]]

    def case(self, name: str, start: str = "bare") -> Path:
        """A fresh directory that begins so."""
        return copied(self.bare if start == "bare" else self.prepared, self.home / name)


def make_base(home: Path, model: Path, variant: str) -> Base:
    bare = make_place(home / "bare", model, variant)
    straight = copied(bare, home / "straight")
    code, said = train_in(straight, trace=True)
    assert code == 0, said
    trace = [json.loads(line) for line in Path(f"{straight}.trace").read_text(encoding="utf-8").splitlines()]
    end = end_of(straight)
    assert isinstance(end, End), end
    prepared = copied(bare, home / "prepared")
    shutil.copytree(straight / "runs" / "prepared", prepared / "runs" / "prepared")
    short = copied(prepared, home / "short")
    code, said = train_in(short, trace=True)
    assert code == 0, said
    again = end_of(short)
    assert isinstance(again, End), again
    assert again.differs(end) == []
    number = len(Path(f"{short}.trace").read_text(encoding="utf-8").splitlines())
    return Base(
        home=home,
        end=end,
        bare=bare,
        prepared=prepared,
        num_events={"bare": len(trace), "prepared": number},
        trace=trace,
    )


def copied(place: Path, target: Path) -> Path:
    """A copy of a place and of what its processes were seen to do."""
    shutil.copytree(place, target)
    seen = Path(f"{place}.seen")
    if seen.exists():
        shutil.copyfile(seen, f"{target}.seen")
    return target


def broken_off(base: Base, place: Path, jobs: list[dict[str, Any]], **always: Any) -> list[str]:
    """What is wrong after the jobs, each of which may end the run early, and then the same command undisturbed. A good place is
    removed."""
    for job in jobs:
        code, said = train_in(place, **job, **always)
        if code not in (0, 137):
            return [f"{job} ended with {code}: {said[-600:]}"]
    wrong = finish(place, base.end, **always)
    if not wrong:
        clear(place)
    return wrong


def finish(place: Path, straight: End, **job: Any) -> list[str]:
    """Run the same command again, undisturbed; what is wrong then with how it ends."""
    code, said = train_in(place, **job)
    if code:
        return [f"the same command again ended with {code}: {said[-600:]}"]
    end = end_of(place)
    return [end] if isinstance(end, str) else end.differs(straight)


def clear(place: Path) -> None:
    """Forget the place and what was written beside it."""
    shutil.rmtree(place)
    for ending in ("said", "seen", "trace"):
        Path(f"{place}.{ending}").unlink(missing_ok=True)


def tell(what: str, num_cases: int, wrong: dict[str, list[str]], good: str) -> None:
    """One line of the count, one for each case that failed; fails where one did."""
    print(f"\n{what}: {num_cases - len(wrong)} of {num_cases} {good}")
    for name, problems in wrong.items():
        print(f"  {name}: {'; '.join(problems)}")
    assert not wrong, f"{len(wrong)} of {num_cases}: {dict(list(wrong.items())[:8])}"
