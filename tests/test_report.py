"""The report page: every section, every absence, and no way for data to become markup."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from educe.files.run_dir import RunDir
from educe.report import build_report, wording
from educe.report.charts import Scale, draw_bars, draw_loss, plan_curve, smooth, thin, ticks
from educe.report.reading import read_run
from educe.report.records import Point
from educe.report.sections import sum_ledger
from educe.report.visible import shown, visible
from educe.stats import mcnemar, paired_difference, wilson
from educe.types import Interval
from hypothesis import example, given, settings
from hypothesis import strategies as st

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


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(v) + "\n" for v in value), encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")


def _recipe() -> dict[str, Any]:
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


def _provenance(steps: int) -> dict[str, Any]:
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


def _ledger() -> list[dict[str, Any]]:
    def row(file: str, line: int, status: str, code: str | None = None, reason: str | None = None) -> dict[str, Any]:
        tokens = 0 if status == "refused" else 110 if status == "dropped" else 60 + line % 30
        return {"file": file, "line": line, "status": status, "code": code, "reason": reason,
                "tokens": tokens, "trained_tokens": 20 + line % 8 if status == "train" else 0}  # fmt: skip

    rows = [row("train.jsonl", i + 1, "train") for i in range(840)]
    long = "110 tokens, at most 96 fit. Raise data.max_tokens or shorten the row."
    rows += [row("train.jsonl", 841 + i, "dropped", "E-DATA-201", long) for i in range(7)]
    rows += [row("train.jsonl", 848, "refused", "E-DATA-142", 'messages[1].role "asistant" is not a known role.')]
    rows += [row("dev.jsonl", i + 1, "dev") for i in range(60)]
    return rows + [row("test.jsonl", i + 1, "test") for i in range(240)]


def _metrics(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"kind": "dev", "step": 0, "loss": 1.62, "elapsed_s": 0.0}]
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
            rows.append({"kind": "dev", "step": i, "loss": 0.11 - 0.03 * x, "elapsed_s": 3.0 * i})
    return rows


def _samples(steps: int) -> list[dict[str, Any]]:
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
        systems["few_shot"] = _score(shots, 31.0)
    systems["tuned"] = _score(tuned, 16.6)
    pairs = [("untouched", untouched)] + ([("few_shot", shots)] if few_shot else [])
    share = f"{100 * systems['untouched']['value']:.1f} % to {100 * systems['tuned']['value']:.1f} %"
    verdict = (
        f"Tuning was worth it: right answers rose from {share}. "
        "Examples in the prompt alone do not get there, and the difference is far beyond chance."
    )
    comparisons = [_comparison(name, before, tuned) for name, before in pairs]
    scores = {"metric": "json", "num_rows": rows, "verdict": verdict, "systems": systems, "comparisons": comparisons}
    _write(run.resolved, {"recipe": _recipe()})
    _write(run.provenance, _provenance(steps))
    _write(run.ledger, _ledger())
    _write(run.metrics, _metrics(steps))
    _write(run.samples, _samples(steps))
    _write(run.path / "preview.json", _preview())
    for name, answers in (("untouched", untouched), ("few_shot", shots), ("tuned", tuned)):
        if name != "few_shot" or few_shot:
            _write(run.answers / f"{name}.jsonl", answers)
    _write(run.scores, scores)
    return run


class Page(HTMLParser):
    """Tags, attribute names and text of a page; complains about elements left open."""

    VOID = frozenset({"meta", "br", "line", "rect", "circle", "path"})
    BLOCK = frozenset({"td", "th", "li", "p", "dt", "dd", "div", "h2", "h3", "br"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.shape: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, tuple(name for name, _ in attrs)))
        if tag in self.BLOCK:
            self.words.append(" ")
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, tuple(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report(make_run(tmp_path_factory.mktemp("runs") / "orders")))


def test_page_is_well_formed_and_self_contained(page: Page, tmp_path: Path) -> None:
    html = build_report(make_run(tmp_path))
    assert html.startswith("<!doctype html>")
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    tags = {t for t, _ in page.shape}
    assert not tags & {"script", "img", "link", "iframe", "object", "form", "a", "base"}
    assert not re.search(r"url\(|@import|https?://", html)
    assert "Content-Security-Policy" in html
    assert "default-src 'none'" in html


def test_report_is_the_same_every_time(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert build_report(run) == build_report(run)


def test_verdict_and_key_figures_come_first(page: Page) -> None:
    head = page.text[: page.text.index("Before and after")]
    assert "Tuning was worth it: right answers rose from" in head
    for figure in ("1.7 % → 80.0 %", "5 min 12 s", "3.6 GB", "840"):
        assert figure in head


def test_before_and_after_is_told_in_words(page: Page) -> None:
    assert "“5-shot prompt” is the untouched model with 5 examples in its prompt" in page.text
    assert re.search(r"192 rows won, 4 lost, 44 unchanged; McNemar p < 0.001", page.text)
    assert re.search(r"\+78\.3 percentage points 95 % interval \+7\d\.?\d* to \+8\d", page.text)


def test_answers_show_each_fate_with_its_number(page: Page) -> None:
    assert "Won: wrong before tuning, right after 3 of 192 shown" in page.text
    assert "Lost: right before tuning, wrong after 3 of 4 shown" in page.text
    assert "Still wrong 3 of 44 shown" in page.text
    assert "Right before and after none" in page.text
    assert "✓ right" in page.text
    assert "✗ wrong" in page.text
    assert "Step 125 ✓ same text" in page.text


def test_mask_shows_line_ends_and_control_tokens(page: Page) -> None:
    assert "Only the highlighted text carries loss." in page.text
    assert "24 of 81 tokens carry loss" in page.text
    assert "<|im_start|>assistant↵" in page.text


def test_ledger_adds_up(page: Page, tmp_path: Path) -> None:
    assert "1,148 rows in = 840 trained + 60 dev + 240 test + 7 dropped + 1 refused" in page.text
    assert "7 dropped: row is longer than the sequence length E-DATA-201" in page.text
    assert "First five: train.jsonl:841, train.jsonl:842" in page.text
    assert "train.jsonl:846" not in page.text
    ledger = sum_ledger(read_run(make_run(tmp_path)).ledger)
    assert ledger.rows == sum(t.rows for t in ledger.terms) == 1148
    assert ledger.trained.trained_tokens == sum(20 + (i + 1) % 8 for i in range(840))


def test_a_status_the_page_does_not_know_still_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.ledger.open("a") as f:
        f.write('{"file":"train.jsonl","line":900,"status":"not drawn"}\n')
    text = Page(build_report(run)).text
    assert "1,149 rows in" in text
    assert "+ 1 not drawn" in text


def test_cost_settings_and_provenance(page: Page) -> None:
    for said in ("340 tokens/s (median step)", "126,250, 40,000 of them with loss", "2 CPU threads, bfloat16",
                 "timed matmul", "train.learning_rate 0.0003", "a1a1a1a1a1a1…", "apache-2.0", "135 million",
                 "educe train recipe.yaml"):  # fmt: skip
        assert said in page.text


FILES = ("recipe.resolved.json", "provenance.json", "ledger.jsonl", "metrics.jsonl", "samples.jsonl", "preview.json",
         "scores.json", "answers/untouched.jsonl", "answers/few_shot.jsonl", "answers/tuned.jsonl")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "not json", "another type"])
def test_no_file_is_needed(tmp_path: Path, name: str, how: str) -> None:
    run = make_run(tmp_path)
    file = run.path / name
    content = {
        "empty": "",
        "not json": "{]\n{]\n",
        "another type": "[1, null]\n" if name.endswith("n") else "1\nnull\n",
    }
    file.unlink() if how == "missing" else file.write_text(content[how])
    html = build_report(run)
    assert not Page(html).open
    if how == "not json":
        assert f"<code>{name}</code>" in html


def test_an_empty_directory_says_what_to_run(tmp_path: Path) -> None:
    text = Page(build_report(RunDir(tmp_path / "new"))).text
    assert "Not evaluated yet: run educe eval ." in text.replace("eval.", "eval .")
    assert text.count("educe train recipe.yaml") >= 6


def test_training_without_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.scores.unlink()
    for file in run.answers.iterdir():
        file.unlink()
    text = Page(build_report(run)).text
    assert "Not evaluated yet: run educe eval" in text
    assert "Held-out loss 1.62 → 0.08" in text


@pytest.mark.parametrize("shots", [0, 5])
def test_without_few_shot_the_page_admits_what_it_cannot_say(tmp_path: Path, shots: int) -> None:
    run = make_run(tmp_path, few_shot=False)
    recipe = _recipe()
    recipe["evaluation"]["few_shot"] = shots
    _write(run.resolved, {"recipe": recipe})
    text = Page(build_report(run)).text
    assert "cannot say whether examples in the prompt would have done as well" in text
    assert ("switched off" in text) == (shots == 0)


def test_unfinished_training_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    _write(run.provenance, {**_provenance(400), "finished": None, "training_s": None})
    text = Page(build_report(run)).text
    assert "Training has not finished" in text
    assert "125 of 400" in text


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 5000])
def test_any_number_of_steps(tmp_path: Path, steps: int) -> None:
    html = build_report(make_run(tmp_path, steps=steps))
    assert ("too many to draw one by one" in html) == (steps == 5000)
    assert len(html) < 400_000


def test_one_test_row_and_no_refusal(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=1)
    _write(run.ledger, [r for r in _ledger() if r["status"] == "train"])
    text = Page(build_report(run)).text
    assert "1 test row," in text
    assert "1 row won, 0 lost, 0 unchanged; McNemar p = 1." in text
    assert "No row was dropped or refused." in text


def test_losses_that_are_not_numbers_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.metrics.open("a") as f:
        f.write(
            '{"kind":"step","step":126,"loss":NaN}\n{"kind":"step","step":127,"loss":null}\n{"kind":"step","step":128,"loss":1e308}\n'
        )
    html = build_report(run)
    assert "3 steps without a finite loss (below 1e30) left out" in html
    assert "nan" not in html.lower().replace("provenance", "")


def test_all_steps_not_finite(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    _write(run.metrics, [{"kind": "step", "step": i, "loss": None} for i in (1, 2)])
    assert not Page(build_report(run)).open


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    _write(run.metrics, _metrics(125) + _metrics(125)[60:])
    assert len(read_run(run).steps) == 125


PAYLOADS = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><iframe srcdoc=x>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "<!--",
    "-->",
    "]]><x>",
    "<base href=//evil.test>",
    "<meta http-equiv=refresh content=0>",
    "{{ 7*7 }}{% include 'x' %}",
    "javascript:alert(1)",
    "&lt;b&gt;&#60;b&#62;&amp;",
    "</bdi></td></table></main><h1>Hi",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "\\u003cscript\\u003e<plaintext>",
    "</svg></desc></textarea><xmp>",
    "`${alert(1)}`<%= 1 %>",
]


_KEPT_WORDS = frozenset({"train", "dev", "test", "dropped", "refused", "full", "user", "system", "role", "template",
                         "content", "trained", "step", "file", "untouched", "few_shot", "tuned"})  # fmt: skip


def _poison(value: Any, word: str) -> Any:
    """Every text replaced by `word` and a number, apart from the few words that the page reads as choices."""
    counter = itertools.count()

    def swap(v: Any, key: str = "") -> Any:
        if isinstance(v, dict):
            renamed = key in ("packages", "recipe", "data")
            return {(f"{k}{word}" if renamed and k not in _KEPT_NAMES else k): swap(x, k) for k, x in v.items()}
        if isinstance(v, list):
            return [swap(x) for x in v]
        if isinstance(v, str) and not (key in ("kind", "role", "status", "before", "after") and v in _KEPT_WORDS):
            return f"{word}{next(counter)}" if key not in ("row", "code") else f"{v}{word}"
        return v

    return swap(value)


_KEPT_NAMES = frozenset({"name", "model", "tuning", "evaluation", "train", "data", "file"})


def poisoned(path: Path, word: str) -> RunDir:
    """A run in which all text of all files is `word`."""
    run = make_run(path, rows=30, steps=12)
    for name in FILES:
        file = run.path / name
        _write(file, _poison(run.load(file), word))
    return run


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report(poisoned(tmp_path_factory.mktemp("harmless") / "run", "plain words")))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_never_becomes_markup(tmp_path: Path, payload: str, harmless: Page) -> None:
    html = build_report(poisoned(tmp_path, payload))
    found = Page(html)
    assert found.shape == harmless.shape, "data made or broke an element"
    assert not found.open
    assert not any(a.startswith("on") or a in ("href", "src", "style") for _, names in found.shape for a in names)
    assert found.text.count(payload) > 60, "the payload must be seen, as text"


def test_bidi_zero_width_and_control_characters_are_shown(tmp_path: Path) -> None:
    bad = "a\u202eb\u200bc\u0000d\u0007e\u00adf\u2028g\ufeffh\U000e0041i\u3164j"
    html = build_report(poisoned(tmp_path, bad))
    for point in ("202E", "200B", "0000", "0007", "00AD", "2028", "FEFF", "E0041", "3164"):
        assert f"⟨U+{point}⟩" in html
    assert not set(html) & set(bad) - set("abcdefghij")
    assert not Page(html).open


def test_a_lone_surrogate_does_not_break_the_file(tmp_path: Path) -> None:
    html = build_report(poisoned(tmp_path, "half \ud83d a character"))
    assert "⟨U+D83D⟩" in html.encode("utf-8").decode()


def test_long_text_is_clamped_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    samples = _samples(125)
    samples[0]["answer"] = "x" * 10_600
    _write(run.samples, samples)
    html = build_report(run)
    assert "x" * 600 + '<span class="more">… (10,000 more characters)</span>' in html
    assert "x" * 601 not in html


@given(st.text())
def test_shown_text_comes_back_whole(text: str) -> None:
    plain = "".join(Page(f"<b>{shown(text, 10_000)}</b>").words)
    assert plain == visible(text)


FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(FINITE, FINITE, st.integers(2, 12), st.booleans())
def test_ticks_lie_inside_and_increase(a: float, b: float, most: int, whole: bool) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, most, whole)
    assert found
    assert all(low <= t <= high for t in found)
    assert all(x < y for x, y in itertools.pairwise(found))
    assert len(found) <= most
    if whole and len(found) > 1:
        assert all(t == int(t) for t in found)


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6), st.integers(4, 9))
def test_an_ordinary_axis_has_several_ticks(low: float, reach: float, most: int) -> None:
    assert len(ticks(low, low + reach, most)) >= 1
    assert len(ticks(0, reach, most)) >= 2


@given(st.floats(allow_nan=False, allow_infinity=False), FINITE, FINITE)
def test_scale_stays_between_its_ends(value: float, a: float, b: float) -> None:
    at = Scale(low=min(a, b), high=max(a, b), start=300, end=20).at(value)
    assert 20 <= at <= 300


LOSSES = st.lists(st.floats(0, 1e6, allow_nan=False), max_size=60)


def _points(losses: list[float]) -> tuple[Point, ...]:
    return tuple(Point(step=i + 1, loss=x) for i, x in enumerate(losses))


@settings(max_examples=60, deadline=None)
@given(LOSSES, LOSSES, st.booleans())
@example([5e-324], [], False)
@example([1e29] * 20, [0.0], True)
def test_everything_drawn_lies_in_the_view_box(train: list[float], dev: list[float], narrow: bool) -> None:
    svg = str(draw_loss(plan_curve(_points(train), _points(dev)), narrow))
    box = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg)
    assert box
    width, height = float(box[1]), float(box[2])
    paths = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg)
    places = [(float(x), float(y)) for x, y in paths + re.findall(r'c?x="(-?[\d.]+)" c?y="(-?[\d.]+)"', svg)]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    assert "nan" not in svg
    assert "inf" not in svg


@given(LOSSES, st.integers(1, 15))
def test_a_mean_stays_within_the_losses(losses: list[float], window: int) -> None:
    made = smooth(_points(losses), window)
    assert [p.step for p in made] == [p.step for p in _points(losses)]
    assert all(min(losses) - 1e-3 <= p.loss <= max(losses) + 1e-3 for p in made)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(4, 50))
def test_thinning_keeps_both_extremes(losses: list[float], most: int) -> None:
    kept, bucket = thin(_points(losses), most)
    assert len(kept) <= most + 2
    assert min(p.loss for p in kept) == min(losses)
    assert max(p.loss for p in kept) == max(losses)
    assert [p.step for p in kept] == sorted({p.step for p in kept})
    assert (bucket == 1) == (len(losses) <= most)


def test_bars_at_the_ends_of_the_scale() -> None:
    from educe.report.charts import Bar

    ends = (Interval(value=0, low=0, high=0.02), Interval(value=1, low=0.98, high=1))
    svg = str(draw_bars([Bar(label="<b>", kind="tuned", score=i, text="t") for i in ends]))
    assert 'width="0.0"' in svg
    assert "&lt;b&gt;" in svg


@pytest.mark.parametrize(
    "said, expected",
    [
        (wording.duration(0.5), "0.5 s"), (wording.duration(312), "5 min 12 s"), (wording.duration(59.7), "1 min"),
        (wording.duration(7500), "2 h 5 min"), (wording.duration(300_000), "3 d 11 h"), (wording.duration(None), "–"),
        (wording.size(3.6e9), "3.6 GB"), (wording.size(512), "512 bytes"), (wording.size(79e6), "79 MB"),
        (wording.number(0.000012345), "1.23e-5"), (wording.number(343.43), "343"), (wording.number(123_062), "123,000"),
        (wording.number(-0.5), "−0.5"), (wording.number(999.9), "1,000"), (wording.number(0.0003), "0.0003"),
        (wording.number(float("nan")), "–"), (wording.large(134_515_008), "135 million"), (wording.large(12), "12"),
        (wording.percent(0.7875), "78.8\u202f%"), (wording.percent(2399 / 2400), "> 99.9\u202f%"),
        (wording.percent(1), "100\u202f%"),
        (wording.percent(0.0), "0\u202f%"), (wording.p_value(1e-30), "p\u00a0<\u00a00.001"),
        (wording.p_value(0.0312), "p\u00a0=\u00a00.031"),
        (wording.p_value(0.03), "p\u00a0=\u00a00.03"), (wording.p_value(1.0), "p\u00a0=\u00a01"),
        (wording.points(Interval(value=-0.02, low=-0.05, high=0.01)), "−2.0 percentage points"),
        (wording.points_span(Interval(value=-0.02, low=-0.05, high=0.01)), "−5.0 to +1.0"),
        (wording.moment("2026-11-22T13:00:00Z"), "2026-11-22 13:00 UTC"), (wording.moment("today"), "today"),
    ],
)  # fmt: skip
def test_wording(said: str, expected: str) -> None:
    assert said == expected


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


TEXT_ON = [("ink", "paper"), ("ink", "accent-wash"), ("soft", "paper"), ("soft", "panel"), ("soft", "chip"), ("accent", "paper"),
           ("held", "paper"), ("right", "paper"), ("wrong", "paper"), ("wrong", "panel"), ("wrong", "accent-wash")]  # fmt: skip


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("text, ground", TEXT_ON)
def test_text_has_enough_contrast(text: str, ground: str, mode: str) -> None:
    css = (Path(__file__).parent.parent / "educe" / "report" / "page.css").read_text(encoding="utf-8")
    light, dark = css.split("prefers-color-scheme", 1)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", light if mode == "light" else dark))
    a, b = sorted((_luminance(colours[text]), _luminance(colours[ground])))
    assert (b + 0.05) / (a + 0.05) >= 4.5
