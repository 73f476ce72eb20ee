"""Checks of the model's files, the machine and the run's settings; no model is loaded."""

from __future__ import annotations

import json
import math
import re
import shutil
import stat
import tempfile
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil

from educe.chat.named import NAMED
from educe.config import Full, Lora, Recipe, Wsd
from educe.errors import EduceError, ModelError
from educe.files.atomic import existing, size_of, sized
from educe.model.describe import describe_model
from educe.model.foreign import refuse_foreign
from educe.recipes.estimate import checkpoint_bytes
from educe.recipes.finding import Before, Check, Finding, finding, refused
from educe.recipes.memory import num_trained
from educe.recipes.mixing import draw
from educe.recipes.plan import plan_run
from educe.recipes.tracking import trackers_are_there
from educe.secrets import find_secret
from educe.seeds import derive
from educe.training.schedule import learning_rate
from educe.training.watchdog import lasted

_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*>=\s*([0-9][0-9.]*)")
# Before this nothing of educe was written: a clock that says so is wrong.
_EARLIEST_S = 1_767_225_600.0  # 2026-01-01
_CLOCKS_DIFFER_S = 600.0
# Weights of trained transformers are about normal with this standard deviation.
_WEIGHT_SD = 0.02
_SLACK = 3.0  # a micro-batch may take so many times as long as is estimated


def weights_can_be_read(b: Before) -> Finding:
    """P20: safetensors only, headers that fit their files, plain numbers."""
    name = "weights on disk"
    try:
        facts = describe_model(b.facts.directory, b.recipe.model)
    except EduceError as e:
        return refused("P20", name, e)
    kinds = Counter(kind for file in facts.files for kind in _kinds(file))
    odd = {k: n for k, n in kinds.items() if k not in _PLAIN}
    said = ", ".join(f"{n:,} tensors {kind}" for kind, n in kinds.most_common())
    if odd:
        said += ": numbers that are packed are made plain ones when they are loaded"
    if facts.unread:
        said += f"; {', '.join(facts.unread[:3])} beside them: no part of the model, not read"
    number = f"{facts.num_parameters / 1e6:,.1f}M numbers"
    return finding("P20", name, number, said, warn=bool(odd) or bool(facts.unread))


def stops_agree(b: Before) -> Finding:
    """P21: ids of the tokenizer and of both configs exist in the model, and the stop tokens meet."""
    t, place, known = b.prepared.tokenizer, b.facts.directory, b.facts.vocab_size
    named = {n: _stop_ids(place / f"{n}.json") for n in ("config", "generation_config")}
    beyond = sorted(i for ids in named.values() for i in ids if i >= known)
    said = "; ".join(f"{n}.json stops at {', '.join(map(str, sorted(ids)))}" for n, ids in named.items() if ids)
    said = f"{said or 'the configs name no stop token'}; turns are trained to end with {_words(b)}"
    if beyond:
        said = f"stop token {beyond[0]} has no embedding, of which there are {known:,}. {said}"
    apart = any(named.values()) and not any(ids & set(t.stop) for ids in named.values())
    if apart:
        said += ": the model's own files name other stop tokens; the export names those that are trained"
    return finding("P21", "stop tokens", f"{len(t.stop)} ids", said, fail=bool(beyond), warn=apart)


def trained_parts(b: Before) -> Finding:
    """P22, without the model: what is trained, tied heads, new tokens."""
    config = _json(b.facts.directory / "config.json")
    tied = bool(config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False)))
    new = b.prepared.tokenizer.new_tokens
    trained = num_trained(b.facts, b.recipe.tuning)
    t = b.recipe.tuning
    how = "all weights" if isinstance(t, Full) else f"adapters of rank {t.rank}"
    if isinstance(t, Lora):
        how += {"lora": "", "rslora": " (rsLoRA)", "dora": " (DoRA)"}[t.variant]
        how += " on a base in 4 bits" if t.base_bits == 4 else ""
    said = f"{how}; the head is {'' if tied else 'not '}the embedding"
    said += f"; new tokens {' '.join(new)} are trained with them" if new else "; no new tokens"
    beyond = [w for w, i in new.items() if i >= b.facts.vocab_size + len(new)]
    return finding("P22", "what is trained", f"{trained / 1e6:,.1f}M numbers", said, fail=bool(beyond) or trained < 1)


def updates_arrive(b: Before) -> Finding:
    """P23: the share of updates that rounding would swallow."""
    low = b.recipe.train.optimizer == "adamw_8bit_bf16"
    rate = b.recipe.train.learning_rate
    without = lost_updates(rate, 8)
    how = "bf16 weights, updates rounded at random: none is lost in the mean" if low else "fp32 masters"
    share = 0.0 if low else lost_updates(rate, 24)
    said = f"{how}; bf16 weights rounded to the nearest would lose about {without:.0%} at a rate of {rate:g}"
    return finding("P23", "lost updates", f"{share:.1%}", said, fail=share > 0.5, warn=share > 0.01)


def lost_updates(rate: float, bits: int) -> float:
    """The share of weights, normal with a deviation of 0.02, whose half unit in the last place (of `bits` significant ones) is more
    than a first Adam update, which is the rate."""
    largest = rate * 2.0 ** (bits + 0.5)  # half a unit of w is w / 2^bits to w / 2^(bits + 1)
    return math.erfc(largest / _WEIGHT_SD / math.sqrt(2))


def disk_is_enough(b: Before) -> Finding:
    """P40: room for the checkpoints that are kept, one being written, and one more; and for what is to stay free beside them."""
    from educe.training.saver import SPARE_BYTES  # loads torch

    keep, each = b.recipe.train.keep_checkpoints, checkpoint_bytes(b.recipe, num_trained(b.facts, b.recipe.tuning))
    theirs = size_of(b.run.checkpoints)
    free = shutil.disk_usage(existing(b.run.path)).free + theirs
    room = max(0, free - SPARE_BYTES)
    said = f"{keep} checkpoints of {sized(each)} are kept; {sized(free)} are free or theirs, {sized(SPARE_BYTES)} stay free"
    number = f"{room // each:,.0f} checkpoints fit"
    return finding("P40", "disk", number, said, fail=room < (keep + 1) * each, warn=room < (keep + 2) * each)


def run_can_be_written(b: Before) -> Finding:
    """P42: files can be made where the run will be, and others cannot change it."""
    place = existing(b.run.path)
    try:
        with tempfile.TemporaryFile(dir=place) as f:  # it has no name that could stay
            f.write(b"x")
    except OSError as e:
        fix = "choose another place with `runs:`"
        return finding("P42", "run directory", "not writable", f"{place}: {e.strerror}; {fix}", fail=True)
    mode = stat.S_IMODE(place.stat().st_mode)
    open_to_all = bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX
    said = f"{place} can be written" + (", by every user of this machine" if open_to_all else "")
    return finding("P42", "run directory", f"mode {mode:o}", said, warn=open_to_all)


def memory_is_enough(b: Before) -> Finding:
    """P43: the memory plan against what is free, and what there is at all."""
    total, fits = b.memory.total, b.memory.fits
    most = b.memory_bytes or _all_memory(b.device)
    said = f"{b.memory.said().removeprefix('memory: ')}; the {b.device} has {most / 1e9:.1f} GB"
    return finding("P43", "memory", f"{total / 1e9:.1f} GB", said, fail=total > most, warn=not fits)


def seed_is_known(b: Before) -> Finding:
    """P44: order and packs, drawn again from the seed, are the run's; kernels are deterministic where that is asked for."""
    name, seed = "seed", str(b.recipe.train.seed)
    again = plan_run(b.recipe, b.prepared, b.facts, draw(b.recipe, b.prepared), packed=b.packed, num_ranks=b.ranks)
    if again.hash != b.plan.hash:
        said = f"drawn again, the plan of packs is {again.hash[:12]}, not {b.plan.hash[:12]}: it does not follow from the seed alone"
        return finding("P44", name, seed, said, fail=True)
    asked = b.recipe.train.deterministic
    if asked and b.settings is not None and not _deterministic():
        said = "train.deterministic is set, and torch's kernels are not deterministic"
        return finding("P44", name, seed, said, fail=True)
    bits = "the same bits each time" if asked or b.device == "cpu" else "kernels may add up in another order"
    said = f"drawn again, order and packs are the same; on this {b.device} and these threads {bits}"
    return finding("P44", name, seed, said)


def ranks_share_the_step(b: Before) -> Finding:
    """P45: the ranks' rows of the first step are together the step, none twice."""
    whole = [tuple(pack) for pack in b.plan.step(0)]
    dealt = [tuple(pack) for r in range(b.ranks) for pack in b.plan.step(0, r, b.ranks)]
    equal = Counter(whole) == Counter(dealt)
    rows = sum(map(len, whole))
    said = f"{rows:,} examples in {len(whole)} packs over {b.ranks} ranks" if b.ranks > 1 else "one rank has them all"
    said = said if equal else f"the ranks' packs are not those of the step: {len(dealt)} for {len(whole)}"
    return finding("P45", "rows of the first step", f"{rows:,} examples", said, fail=not equal)


def hangs_are_seen(b: Before) -> Finding:
    """P46: a run that hangs ends, and says where; one that is slow does not."""
    name = "hangs"
    if b.hang_after_s is None:
        said = "no limit was given: a rank that hangs keeps the others waiting for up to 12 h" if b.ranks > 1 else ""
        return finding(
            "P46", name, "-", said or "no limit was given (--hang-after)", warn=b.ranks > 1, skip=b.ranks == 1
        )
    piece_s = b.plan.capacity_tokens / (b.tokens_per_s / b.ranks)
    said = f"so long without a sign of life, and stacks are written and it ends; a micro-batch takes about {lasted(piece_s)}"
    short = b.hang_after_s < _SLACK * piece_s
    if short:
        said += ": too little between the two. Raise --hang-after"
    return finding("P46", name, lasted(b.hang_after_s), said, fail=b.hang_after_s < piece_s, warn=short)


def rates_of_steps(recipe: Recipe, n: int) -> list[float]:
    """The learning rate of each of a run's `n` steps, as the recipe says it."""
    train, kind = recipe.train, recipe.train.schedule.kind
    decay = train.schedule.decay_share if isinstance(train.schedule, Wsd) else 0.0
    peak, warmup = train.learning_rate, train.warmup_share
    return [learning_rate(k, n, peak=peak, warmup_share=warmup, kind=kind, decay_share=decay) for k in range(n)]


def rates_are_sane(b: Before) -> Finding:
    """P47: the learning rate at ten points of the run."""
    train, n = b.recipe.train, b.plan.num_steps
    rates = rates_of_steps(b.recipe, n)
    points = sorted({round(k * (n - 1) / 9) for k in range(10)})
    said = ", ".join(f"step {k + 1} {rates[k]:.2g}" for k in points)
    bad = not all(math.isfinite(r) and 0 < r <= train.learning_rate * (1 + 1e-9) for r in rates)
    never = max(rates) < 0.9 * train.learning_rate
    if never:
        said = f"the peak, {train.learning_rate:g}, is never reached: {said}"
    return finding("P47", "learning rate", f"{max(rates):.3g} at most", said, fail=bad, warn=never)


def resume_is_clear(b: Before) -> Finding:
    """P48: a new run, or what would be gone on from, and what changed since."""
    steps = [p.name for p in b.run.checkpoints.glob("step-*")]
    if b.settings is not None and steps:  # a run asks before its first step alone, when its directory is its own
        said = f"training would begin at step 1, though {b.run.checkpoints} has {max(steps)}: those steps would be lost"
        return finding("P48", "resume", "a new run", said, fail=True)
    if not steps and not b.run.provenance.is_file():
        return finding("P48", "resume", "a new run", f"{b.run.path} holds no checkpoint")
    from educe.recipes.provenance import settings_of  # loads torch: only where there is a run
    from educe.recipes.resume import changes_since, ended_after, lost
    from educe.training.checkpoint import newest_checkpoint

    heard: list[str] = []
    found = newest_checkpoint(b.run.checkpoints, heard.append)
    if found is None and b.settings is None and (done := ended_after(b.run)) is not None:
        return refused("P48", "resume", lost(b.run, done, heard))
    if found is None:
        return finding("P48", "resume", "a new run", "; ".join(heard) or f"{b.run.path} holds no checkpoint")
    try:
        kept = found[1]["settings"]
        settings = settings_of(b.recipe, b.prepared, b.facts, int(kept["ranks"]))
        if b.stands_in:  # what it is there for may be what the run began with
            settings |= {k: kept[k] for k in ("model", "prepared") if k in kept}
        changes_since(b.run, found, b.recipe, settings, (), heard.append)
    except EduceError as e:
        return refused("P48", "resume", e)
    return finding("P48", "resume", f"after step {found[1]['step']}", "; ".join([f"goes on from {found[0]}", *heard]))


def clock_is_sane(b: Before) -> Finding:
    """P49: the clock is not before files that are there, and the random streams are the ones of every machine."""
    now = time.time()
    newest = max(p.stat().st_mtime for p in (b.prepared.path / "manifest.json", b.facts.directory / "config.json"))
    behind = newest - now
    drawn = derive(0, "order")
    wrong = drawn != 1_135_334_927_541_815_487
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if behind > _CLOCKS_DIFFER_S:
        said = f"{said} is {behind / 60:.0f} min before files that were written already"
    said = "seeds are derived otherwise than on other machines" if wrong else said
    early = now < _EARLIEST_S or behind > _CLOCKS_DIFFER_S
    return finding("P49", "clock and seeds", f"{now:.0f}", said, fail=wrong, warn=early)


def nothing_runs(b: Before) -> Finding:
    """P60: neither code nor pickles are loaded; what lies beside is named."""
    try:
        refuse_foreign(b.facts.directory)
    except ModelError as e:
        return refused("P60", "no code in the model", e)
    return finding(
        "P60", "no code in the model", "0 found", "safetensors and JSON alone are read; no setting names code"
    )


def template_is_known(b: Before) -> Finding:
    """P61: whose template it is, that it is the one the rows were prepared with, and that it renders within its limits."""
    t = b.prepared.tokenizer
    kept = (b.prepared.path / "chat_template.jinja").read_text(encoding="utf-8")
    changed = kept != t.template.source
    same_as = next((n for n, given in NAMED.items() if given.source == t.template.source), "")
    slow = b.ledger.codes["E-CHAT-103"]
    said = f"{b.prepared.summary['template']}{f' ({same_as})' if same_as else ''}, {len(kept):,} characters"
    if changed:
        said = "the rows were prepared with another one: delete the prepared data"
    if slow:
        said += f"; it exceeds its limits of time or size on {slow:,} rows"
    return finding("P61", "chat template", t.template_hash[:12], said, fail=changed, warn=slow > 0)


def no_secrets(b: Before) -> Finding:
    """P63: nothing that looks like a key in the recipe, which the run keeps, or in the command, which every user sees."""
    places = {"the recipe": f"{b.text}\n{b.recipe.model_dump_json()}", "the command": "\n".join(b.argv)}
    found = [f"{where} holds a secret ({kind[0]})" for where, text in places.items() if (kind := find_secret(text))]
    said = "; ".join(found)
    fix = ": take it out, and give tokens by the environment (HF_TOKEN)"
    number = f"{len(found)} found"
    return finding("P63", "secrets", number, f"{said}{fix}" if found else "none in recipe or command", fail=bool(found))


def packages_fit(b: Before) -> Finding:
    """P64: what is installed is what educe asks for."""
    wanted = [m.groups() for line in _requirements() if (m := _REQUIREMENT.match(line))]
    wrong = [f"{name} {have} is older than {least}" for name, least in wanted if (have := _older(name, least))]
    said = "; ".join(wrong) or "none is older than what educe asks for"
    return finding("P64", "packages", f"{len(wanted)} looked at", said, fail=bool(wrong))


def _deterministic() -> bool:
    import torch

    return bool(torch.are_deterministic_algorithms_enabled())


def _all_memory(device: str) -> float:
    if device == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(psutil.virtual_memory().total)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _stop_ids(file: Path) -> set[int]:
    value = _json(file).get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool)}


def _words(b: Before) -> str:
    return " and ".join(b.prepared.summary["stop"]) or "none (raw text)"


def _kinds(file: Path) -> list[str]:
    """The kinds of numbers of a safetensors file's tensors."""
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return [str(t["dtype"]) for n, t in header.items() if n != "__metadata__"]


def _requirements() -> list[str]:
    """What educe needs to train; its other extras are asked for where they are used."""
    try:
        lines = requires("educe") or []
    except PackageNotFoundError:  # run from its source
        return []
    return [line for line in lines if "extra ==" not in line or re.search(r"""extra == ["']train["']""", line)]


def _older(name: str, least: str) -> str:
    """The installed version, where it is older than `least` or missing; else nothing."""
    try:
        have = version(name)
    except PackageNotFoundError:
        return "(not installed)"
    return have if _numbers(have) < _numbers(least) else ""


def _numbers(text: str) -> tuple[int, ...]:
    """1.10.2rc1 → (1, 10, 2)."""
    parts = [re.match(r"\d+", part) for part in text.split("+")[0].split(".")]
    numbers = [int(p.group()) for p in parts if p]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


MACHINE: dict[str, Check] = {
    "P20": weights_can_be_read,
    "P21": stops_agree,
    "P22": trained_parts,
    "P23": updates_arrive,
    "P40": disk_is_enough,
    "P42": run_can_be_written,
    "P43": memory_is_enough,
    "P44": seed_is_known,
    "P45": ranks_share_the_step,
    "P46": hangs_are_seen,
    "P47": rates_are_sane,
    "P48": resume_is_clear,
    "P49": clock_is_sane,
    "P60": nothing_runs,
    "P61": template_is_known,
    "P63": no_secrets,
    "P64": packages_fit,
    "P65": trackers_are_there,
}
