"""A realistic run directory and a reader of pages, for the report's tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from educe.files.run_dir import RunDir
from educe.stats import mcnemar, paired_difference, wilson

from run_forgotten import general_record, manner_record, prompt_record, shift_record

ITEMS = [
    "kettle",
    "bath mat",
    "bookcase",
    "floor lamp",
    "torque wrench",
    "model plane",
    "mattress topper",
    "oil heater",
    "mixing desk",
    "desk lamp",
]
INTENTS = ("refund", "exchange", "cancel", "track", "address")
SYSTEM = "Answer with one JSON object: intent, order, item. Use null for what is not said."


def _item(i: int) -> str:
    return ITEMS[(i + i // 10) % 10]


def _intent(i: int) -> int:
    return (i + i // 5) % 5


def _text(i: int) -> str:
    item, order = _item(i), 2000 + 37 * i
    ways = (
        f"Good morning, the {item} from order {order} leaks at the base and I want my money returned, please. Margaret",
        f"Order no. {order}: {item} arrived in grey, I need it in sage green instead.",
        f"pls stop order {order}, found a {item} at my dads house, dont send 😅",
        f"Could you tell me when my {item} will get here? The number is {order} and it was due Tuesday.",
        f"Delivery address change for {item}, ord. {order}. New house number: 48, not 84.",
    )
    return ways[_intent(i)]


def _wanted(i: int) -> str:
    return json.dumps({"intent": INTENTS[_intent(i)], "order": str(2000 + 37 * i), "item": _item(i)})


def _asked(i: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": _text(i)}]


def _answers(num_rows: int, right: Callable[[int], bool], wrong: Callable[[int], str]) -> list[dict[str, Any]]:
    return [
        {
            "row": f"test.jsonl:{i + 1}",
            "prompt": _asked(i),
            "expected": _wanted(i),
            "answer": _wanted(i) if right(i) else wrong(i),
            "num_tokens": 24,
            "stopped": right(i),
            "correct": right(i),
            "reason": "equal JSON" if right(i) else "item: another value",
        }
        for i in range(num_rows)
    ]


def _score(answers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    good, n = sum(a["correct"] for a in answers), len(answers)
    i = wilson(good, n)
    stopped = sum(a["stopped"] for a in answers) / n
    return {
        "correct": good, "value": i.value, "low": i.low, "high": i.high, "seconds": seconds,
        "stopped": stopped, "mean_tokens": 47.0 - 20 * stopped,
    }  # fmt: skip


def _comparison(name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    a, b = [x["correct"] for x in before], [x["correct"] for x in after]
    won, lost, p = mcnemar(a, b)
    d = paired_difference(a, b)
    difference = {"value": d.value, "low": d.low, "high": d.high}
    return {"before": name, "after": "tuned", "won": won, "lost": lost, "p": p, "difference": difference}


def write_file(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(v) + "\n" for v in value), encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")


def recipe_record() -> dict[str, Any]:
    held = {"kind": "file", "file": "/home/ann/orders/dev.jsonl"}
    return {
        "name": "orders-135m", "model": "HuggingFaceTB/SmolLM2-135M", "runs": "runs", "device": "auto",
        "data": {"train": "/home/ann/orders/train.jsonl", "dev": held, "test": {"kind": "share", "share": 0.1},
                 "system": SYSTEM, "train_on": "all", "max_tokens": 96},
        "tuning": {"kind": "full"},
        "train": {"epochs": 2.0, "batch_tokens": 1024, "micro_batch_tokens": 512, "learning_rate": 0.0003,
                  "schedule": "linear", "warmup_share": 0.05, "seed": 0},
        "evaluation": {"metric": {"kind": "json"}, "max_new_tokens": 48, "few_shot": 5, "max_rows": 1000},
    }  # fmt: skip


def provenance_record(steps: int) -> dict[str, Any]:
    return {
        "educe": "0.1.0", "python": "3.11.7", "platform": "Linux 6.1 x86_64",
        "packages": {"torch": "2.13.0", "transformers": "5.17.0"},
        "device": {"kind": "cpu", "dtype": "bfloat16", "name": "2 CPU threads",
                   "why": "timed matmul: bfloat16 is 1.9 times as fast as float32"},
        "model": {"name": "HuggingFaceTB/SmolLM2-135M", "directory": "/home/ann/models/smol", "licence": "apache-2.0",
                  "architecture": "LlamaForCausalLM", "parameters": 134515008, "sha256": "a1" * 32},
        "template_sha256": "b2" * 32, "tokenizer_sha256": "c3" * 32, "prepared": "d4" * 32, "plan_sha256": "e5" * 32,
        "data": {n: {"file": f"{n}.jsonl", "sha256": "f6" * 32} for n in ("train", "dev", "test")},
        "trainable_parameters": 134515008, "steps": steps, "started": "2026-11-22T13:00:00Z",
        "finished": "2026-11-22T13:06:12Z", "training_s": 312.0, "evaluation_s": 60.4,
        "peak_memory_bytes": 3_600_000_000, "packed": True,
    }  # fmt: skip


def ledger_records() -> list[dict[str, Any]]:
    def row(file: str, line: int, status: str, code: str | None = None, reason: str | None = None) -> dict[str, Any]:
        tokens = 0 if status == "refused" else 110 if status == "dropped" else 60 + line % 30
        return {"file": file, "line": line, "status": status, "code": code, "reason": reason,
                "task": "returns" if line % 4 == 0 else "orders", "draws": 2 if status == "train" else 0,
                "tokens": tokens, "trained_tokens": 20 + line % 8 if status == "train" else 0}  # fmt: skip

    rows = [row("train.jsonl", i + 1, "train") for i in range(840)]
    long = "110 tokens, at most 96 fit. Raise data.max_tokens or shorten the row."
    rows += [row("train.jsonl", 841 + i, "dropped", "E-DATA-201", long) for i in range(7)]
    rows += [row("train.jsonl", 848, "refused", "E-DATA-142", 'messages[1].role "asistant" is not a known role.')]
    rows += [row("dev.jsonl", i + 1, "dev") for i in range(60)]
    return rows + [row("test.jsonl", i + 1, "test") for i in range(240)]


def graded_line(step: int, right: int) -> dict[str, Any]:
    """What a line of dev rows that are right or wrong, 32 of them, says of the weights of a step."""
    return {"weights_step": step, "right": right, "score": asdict(wilson(right, 32))}


def metric_records(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"kind": "dev", "step": 0, "loss": 1.62, "elapsed_s": 0.0, "tasks": {"orders": 1.6, "returns": 1.64}},
        {"kind": "score", "step": 0, "metric": "json", **graded_line(0, 1), "rows": 32, "took_s": 4.0},
    ]
    for i in range(1, steps + 1):
        x = i / steps
        loss = (
            1.5 * math.exp(-14 * x) + 0.06 * (1 - x) * (1 + 0.8 * math.sin(i * 2.4) + 0.4 * math.sin(i * 7.1)) + 0.004
        )
        rows.append({
            "kind": "step", "step": i, "loss": loss, "learning_rate": 3e-4 * (1 - x) + 1e-6,
            "grad_norm": 0.4 + 3 * loss, "tokens": 1010, "trained_tokens": 320, "elapsed_s": 3.0 * i,
            "tokens_per_s": 340 + 8 * math.sin(i), "peak_memory_bytes": 3_600_000_000,
        })  # fmt: skip
        if i in (steps // 3, 2 * steps // 3, steps):
            tasks = {"orders": 0.10 - 0.03 * x, "returns": 0.13 - 0.03 * x}
            rows.append({"kind": "dev", "step": i, "loss": 0.11 - 0.03 * x, "elapsed_s": 3.0 * i, "tasks": tasks})
            right = round(32 * x * 0.8)
            rows.append(
                {"kind": "score", "step": i, "metric": "json", **graded_line(i, right), "rows": 32, "took_s": 2.5}
            )
    return rows


def sample_records(steps: int) -> list[dict[str, Any]]:
    def said(step: int, i: int) -> str:
        if step == 0:
            return "I'm sorry to hear that. Please contact customer service.\n\nI'm sorry to hear that. Please contact"
        return _wanted(i) if step > steps // 3 else _wanted(i).replace(_item(i), "order")

    return [
        {"step": step, "row": f"dev.jsonl:{i + 1}", "prompt": _asked(i), "expected": _wanted(i),
         "answer": said(step, i), "stopped": step > 0}
        for step in (0, steps // 3, 2 * steps // 3, steps) for i in range(3)
    ]  # fmt: skip


def _preview() -> list[dict[str, Any]]:
    def run(text: str, kind: str, control: bool, tokens: int = 1) -> dict[str, Any]:
        return {"text": text, "kind": kind, "control": control, "tokens": tokens}

    def turn(role: str, text: str, kind: str, n: int) -> list[dict[str, Any]]:
        end = "trained" if kind == "trained" else "template"
        return [run("<|im_start|>", "template", True), run(f"{role}\n", "template", False, 2),
                run(text, kind, False, n), run("<|im_end|>", end, True), run("\n", "template", False)]  # fmt: skip

    return [
        {"row": f"train.jsonl:{i + 1}",
         "runs": [*turn("system", SYSTEM, "content", 18), *turn("user", _text(i), "content", 25),
                  *turn("assistant", _wanted(i), "trained", 23)]}
        for i in range(3)
    ]  # fmt: skip


def check_records() -> dict[str, Any]:
    def check(id: str, name: str, verdict: str, number: str, evidence: str) -> dict[str, str]:
        return {"id": id, "name": name, "verdict": verdict, "number": number, "evidence": evidence}

    return {
        "before": [check("P01", "masks proved", "pass", "64 rows", "every trained position agrees with inference"),
                   check("P10", "rows left out", "warn", "8 of 1,148", "7 are longer than data.max_tokens"),
                   check("P31", "ranks", "skip", "-", "one device")],
        "after": [check("A01", "loss fell", "pass", "1.62 → 0.08", "held-out loss, nats per token")],
        "export": [],
    }  # fmt: skip


def judged_record() -> dict[str, Any]:
    rated = {
        "interval": {"value": 5.1, "low": 4.6, "high": 5.6},
        "mean_length": 310.0,
        "unparsed": 1,
        "lint": ["one judge only"],
    }
    return {"judge": "some/judge", "systems": {"tuned": rated}}


def suite_record() -> dict[str, Any]:
    measures = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    share = {"value": 0.4, "low": 0.35, "high": 0.45}
    system = {**dict.fromkeys(measures, share), "stopped": 0.9}
    return {
        "verdict": "Following instructions did not change.", "num_prompts": 541, "max_new_tokens": 512,
        "systems": {"untouched": system, "tuned": system},
        "comparisons": [{"measure": m, "difference": {"value": 0.0, "low": -0.02, "high": 0.02}} for m in measures],
        "kinds": [{"kind": "no_comma", "total": 66, "systems": {"untouched": {"strict": 9}, "tuned": {"strict": 9}}, "p_holm": 1.0}],
    }  # fmt: skip


def choices_record() -> dict[str, Any]:
    share = {"value": 0.4, "low": 0.35, "high": 0.45}
    by = ("sum", "per_token", "per_byte")
    return {
        "suite": "choices", "num_rows": 400, "chance": 0.25,
        "systems": {"untouched": dict.fromkeys(by, share), "tuned": dict.fromkeys(by, share)},
        "comparisons": [{"measure": m, "p": 0.5, "difference": {"value": 0.0, "low": -0.02, "high": 0.02}} for m in by],
    }  # fmt: skip


def harness_record() -> dict[str, Any]:
    systems = {name: {"value": 0.4, "stderr": 0.02} for name in ("untouched", "tuned")}
    row = {"task": "tiny", "filter": "none", "num_rows": 400, "num_in_task": 400, "shots": 3, "systems": systems}
    spread = {"value": 0.0, "low": -0.02, "high": 0.02}
    return {
        "suite": "lm-eval", "lm_eval": "0.4.13", "chat": True, "task": "tiny", "versions": {"tiny": 1},
        "systems": {"untouched": {"seconds": 1.0}, "tuned": {"seconds": 1.0}},
        "measures": [
            {**row, "measure": "acc", "higher_is_better": True, "won": 4, "lost": 4, "p": 0.5, "difference": spread, "why": ""},
            {**row, "measure": "perplexity", "higher_is_better": False, "won": None, "lost": None, "p": None, "difference": None,
             "why": "the value is not the mean of the rows"},
        ],
    }  # fmt: skip


def make_run(path: Path, *, steps: int = 125, rows: int = 240, few_shot: bool = True) -> RunDir:
    """A finished run as the other rooms write it."""
    run = RunDir(path)
    untouched = _answers(
        rows, lambda i: i % 60 == 59, lambda i: "Sure! I'd be happy to help you with your order today. " * 3
    )
    shots = _answers(rows, lambda i: i % 3 == 0, lambda i: '{"intent": "refund", "order": "1234", "item": "kettle"}')
    tuned = _answers(rows, lambda i: i % 5 != 4, lambda i: _wanted(i).replace(_item(i), "parcel"))
    systems = {"untouched": _score(untouched, 20.1)}
    if few_shot:
        systems["few_shot"] = {**_score(shots, 31.0), "prompt": prompt_record()}
    systems["tuned"] = _score(tuned, 16.6)
    pairs = [("untouched", untouched)] + ([("few_shot", shots)] if few_shot else [])
    share = f"{100 * systems['untouched']['value']:.1f} % to {100 * systems['tuned']['value']:.1f} %"
    verdict = (
        f"Tuning was worth it: right answers rose from {share}. "
        "Examples in the prompt alone do not get there, and the difference is far beyond chance."
    )
    comparisons = [_comparison(name, before, tuned) for name, before in pairs]
    for k, system in enumerate(systems.values()):
        system["manner"] = manner_record(30.0 - 8 * k)
    scores = {"metric": "json", "num_rows": rows, "verdict": verdict, "systems": systems, "comparisons": comparisons,
              "general": general_record()}  # fmt: skip
    write_file(run.resolved, {"recipe": recipe_record()})
    write_file(run.provenance, provenance_record(steps))
    write_file(run.ledger, ledger_records())
    write_file(run.metrics, metric_records(steps))
    write_file(run.samples, sample_records(steps))
    write_file(run.path / "preview.json", _preview())
    write_file(run.preflight, check_records())
    for name, answers in (("untouched", untouched), ("few_shot", shots), ("tuned", tuned)):
        if name != "few_shot" or few_shot:
            write_file(run.answers / f"{name}.jsonl", answers)
    write_file(run.scores, scores)
    write_file(run.shift, shift_record())
    write_file(run.judged / "mt_bench.json", judged_record())
    write_file(run.suites / "ifeval.json", suite_record())
    write_file(run.suites / "choices-arc.json", choices_record())
    write_file(run.suites / "lm-eval-tiny.json", harness_record())
    return run


class Page(HTMLParser):
    """Tags, attribute names and text of a page; complains about elements left open."""

    VOID = frozenset({"meta", "br"})
    BLOCK = frozenset({"td", "th", "li", "p", "dt", "dd", "div", "h2", "h3", "br"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.shape: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, tuple(name for name, _ in attrs)))
        if tag in self.BLOCK:
            self.words.append(" ")
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, tuple(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())
