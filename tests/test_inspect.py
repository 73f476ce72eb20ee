"""`educe inspect`: what it shows is what is stored, on the terminal and on a page; other masks are what they say they are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from html import unescape
from pathlib import Path
from typing import Any

import educe
import numpy as np
import pytest
from click.testing import CliRunner
from educe.chat.tokens import load_tokenizer
from educe.cli.inspection import shown
from educe.cli.main import cli
from educe.errors import UsageError

SMALL = {"num_hidden_layers": 1, "max_position_embeddings": 8192, "vocab_size": 200_000, "model_type": "llama"}
ROWS: list[dict[str, Any]] = [
    {"messages": [
        {"role": "system", "content": "Be brief.\tAlways.\u200b "},
        {"role": "user", "content": "2 + 2?\u00a0<|im_end|>\n   naïve 😀 𠮷\u0001"},
        {"role": "assistant", "content": "4."},
        {"role": "user", "content": "And <script>alert(1)</script>?"},
        {"role": "assistant", "content": "6.\n\n```python\nprint(3 + 3)  \n```"},
    ]},
    {"messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "reasoning_content": "they greet", "content": "hello"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "reasoning_content": "easy", "content": "4"},
    ]},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes"}]},
    {"messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 0.5},
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
    ]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "asistant", "content": "yes"}]},
    {"messages": [{"role": "user", "content": "word " * 3000}, {"role": "assistant", "content": "long text, " * 900}]},
    {"instruction": "hi", "output": "yes"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def place(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a recipe for each of two real tokenizers (beside weights that are not theirs: none are loaded)."""
    home = tmp_path_factory.mktemp("inspect")
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n", encoding="utf-8")
    for name in ("smollm2", "qwen3"):
        model = home / name
        shutil.copytree(shared / "tokenizers" / name, model)
        shutil.copy(shared / "models/stories260k/model.safetensors", model)
        config = json.loads((shared / "models/stories260k/config.json").read_text()) | SMALL
        (model / "config.json").write_text(json.dumps(config))
        text = f"name: {name}\nmodel: {model}\nruns: {home / 'runs'}\n"
        text += "data: {train: {files: rows.jsonl, format: mixed}, max_tokens: 8192}\n"
        text += "train: {batch_tokens: 8192, micro_batch_tokens: 8192}\n"
        (home / f"{name}.yaml").write_text(text, encoding="utf-8")
    return home


def run(*words: str | Path, columns: int = 120) -> tuple[int, str]:
    """A command without a terminal: exit code and what it said."""
    done = CliRunner().invoke(cli, [str(w) for w in words], env={"COLUMNS": str(columns)}, catch_exceptions=False)
    return done.exit_code, done.output


# --- the terminal --------------------------------------------------------------------------------------------------------


def test_plain_text_marks_what_is_trained_and_hides_nothing(place: Path) -> None:
    code, said = run("inspect", place / "smollm2.yaml", "--row", "1")
    assert code == 0
    assert "rows.jsonl:1: turns 2 and 4, " in said
    assert re.search(r"Be brief\.→\s+Always\.⟨U\+200B⟩·<\|im_end\|>↵", said)
    assert "[4][.][<|im_end|>]↵" in said
    assert "2 + 2?⍽<|im_end|>↵" in said
    assert "␁" in said
    assert "[··][↵]" in said
    assert "stop token: <|im_end|> (id 2), token #" in said
    assert "What a server sends before turn 2: " in said


def test_a_split_row_says_where_and_why(place: Path) -> None:
    code, said = run("inspect", place / "qwen3.yaml", "--row", "2", "--tokens")
    assert code == 0
    assert "sequence 1 of 2: turn 1, 18 tokens, 9 trained" in said
    assert "sequence 2 of 2: turn 3, 31 tokens, 8 trained" in said
    assert "split here: the template rewrites history: where '<think>" in said
    assert re.search(r"11 +20069 +they +1 +4 reasoning +1 assistant", said)
    assert re.search(r"17 +151645 +<\|im_end\|> +1 stop +7 template +1 assistant", said)


def test_weights_other_than_one_are_told(place: Path) -> None:
    _, said = run("inspect", place / "smollm2.yaml", "--row", "4")
    assert "[yes][<|im_end|>]×0.5↵" in said
    assert said.count("×0.5") == 1
    assert "×weight" in said


def test_a_long_prompt_is_shortened_and_its_length_told(place: Path) -> None:
    _, said = run("inspect", place / "smollm2.yaml", "--row", "6")
    assert re.search(r"… and 13,\d{3} more characters", said)


def test_a_row_that_training_drops_is_shown_with_that_note(place: Path) -> None:
    recipe = place / "short.yaml"
    recipe.write_text((place / "smollm2.yaml").read_text().replace("max_tokens: 8192", "max_tokens: 16"))
    code, said = run("inspect", recipe, "--row", "3")
    assert code == 0
    assert "training drops this row: 33 tokens, more than data.max_tokens (16)" in said


def test_wrong_uses_are_told(place: Path) -> None:
    with pytest.raises(UsageError, match=r"'axolotl' is no mask. One of whole, trl"):
        educe.inspect(place / "smollm2.yaml", 1, diff="axolotl")
    with pytest.raises(UsageError, match=r"there is no row at line 99 of rows\.jsonl; the last is at line 8"):
        educe.inspect(place / "smollm2.yaml", 99)
    code, said = run("inspect", place / "smollm2.yaml", "--row", "5")
    assert code == 2
    assert "Refused: E-DATA-142 " in said


@pytest.mark.parametrize("text, seen", [
    ("a\nb", "a↵\nb"), ("\t", "→\t"), ("\u00a0", "⍽"), ("\x00\x1b\x7f", "␀␛␡"), ("\u200b\u202e", "⟨U+200B⟩⟨U+202E⟩"),
    ("\u2009", "⟨U+2009⟩"), ("  a  \n b", "··a··↵\n·b"), ("   ", "···"), ("", ""), ("é 😀", "é 😀"), ("\r\n", "␍↵\n"),
])  # fmt: skip
def test_nothing_stays_invisible(text: str, seen: str) -> None:
    assert shown(text, starts=True, ends=True) == seen


# --- the same as what is stored ------------------------------------------------------------------------------------------

CELLS = re.compile(r"<tr><td>(\d+)</td><td>(\d+)</td>.*?<td>([\d.e-]+)( stop)?</td>")


@pytest.mark.parametrize("name, rows", [("smollm2", (1, 3, 4, 6, 7)), ("qwen3", (1, 2, 3, 4, 8))])
def test_every_token_on_the_page_is_the_stored_one(
    place: Path, tmp_path: Path, name: str, rows: tuple[int, ...]
) -> None:
    """Ids and weights of the table against the examples that `prepare` writes."""
    recipe = place / f"all-{name}.yaml"
    lines = [json.dumps(ROWS[n - 1]) for n in rows]
    (place / f"{name}.jsonl").write_text("\n".join([*lines, *map(json.dumps, EXTRA)]) + "\n")
    text = (place / f"{name}.yaml").read_text().replace("rows.jsonl", f"{name}.jsonl")
    (place / "held.jsonl").write_text(json.dumps({"prompt": "held", "completion": "out"}) + "\n")
    shutil.copy(place / "held.jsonl", place / "more.jsonl")
    held = "dev: {kind: file, file: held.jsonl}, test: {kind: file, file: more.jsonl}, max_tokens"
    recipe.write_text(text.replace("max_tokens", held))
    store = educe.prepare(recipe).store("train")
    examples = [store[k] for k in range(len(store))]
    seen: list[tuple[list[int], list[float]]] = []
    for row in range(1, len(rows) + len(EXTRA) + 1):
        page = tmp_path / f"{row}.html"
        assert run("inspect", recipe, "--row", str(row), "--html", page)[0] == 0
        for table in re.findall(r"<tbody>(.*?)</tbody>", page.read_text(encoding="utf-8"), re.DOTALL):
            cells = CELLS.findall(table)
            assert [int(c[0]) for c in cells] == list(range(len(cells)))
            seen.append(([int(c[1]) for c in cells], [float(c[2]) for c in cells]))
    stored = [(e.ids_T.tolist(), e.weights_T.tolist()) for e in examples]
    assert sorted(seen) == sorted(stored)


EXTRA = [{"prompt": f"word {k}", "completion": f"answer {k}"} for k in range(3)]


# --- other masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [1, 3, 4, 6])
def test_the_trl_mask_is_what_trl_trains(place: Path, row: int) -> None:
    """`SFTTrainer._prepare_dataset` itself, with the defaults of `SFTConfig`, on the same row."""
    _same_as_trl(place, ROWS[row - 1], educe.inspect(place / "smollm2.yaml", row, diff="trl").other)


MORE = [
    {"prompt": "Say hi.", "completion": " Hi there."},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [
        {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so?"}, {"role": "assistant", "content": "no"}]},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
                {"role": "user", "content": "v"}], "completion": [{"role": "assistant", "content": "w"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MORE)))
@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_the_trl_mask_for_its_other_formats(place: Path, tmp_path: Path, number: int, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(MORE[number]) + "\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text((place / f"{name}.yaml").read_text())
    _same_as_trl(place, MORE[number], educe.inspect(recipe, 1, diff="trl").other, name)


def _same_as_trl(place: Path, row: dict[str, Any], other: Any, name: str = "smollm2") -> None:
    trl = pytest.importorskip("trl")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    from trl.trainer.sft_trainer import SFTTrainer

    config = trl.SFTConfig(output_dir=str(place / "trl"), bf16=False, fp16=False, shuffle_dataset=False)
    trainer = object.__new__(SFTTrainer)  # the part that prepares rows; a model would be needed for the rest
    trainer._tokenizer = transformers.AutoTokenizer.from_pretrained(place / name)
    trainer.chat_template = None
    trainer.completion_only_loss = "prompt" in row and "completion" in row  # as __init__ decides by default
    rows = datasets.Dataset.from_list([row])
    prepared = trainer._prepare_dataset(rows, trainer._tokenizer, config, False, None, "train")
    if not len(prepared):
        assert other.ids == []
        assert "drops" in other.says
        return
    made = prepared[0]
    assert other.ids[: len(made["input_ids"])] == made["input_ids"]
    labels = [
        False,
        *(label != -100 for label in made["labels"][1:]),
    ]  # labels are shifted: the first is never predicted
    assert other.trained[: len(labels)] == labels
    assert not any(other.trained[len(labels) :])


def test_the_difference_is_counted_and_told(place: Path) -> None:
    found = educe.inspect(place / "smollm2.yaml", 1, diff="trl")
    assert found.other is not None
    ours = sum(s.num_trained for s in found.sequences)
    assert found.other.missed == 0
    assert found.other.extra == sum(found.other.trained) - ours == sum(found.other.extra_of.values())
    (said,) = found.other.in_words()
    assert said.startswith(f"TRL's default trains {found.other.extra} tokens that the model never has to say: ")
    assert "of the user's text" in said
    assert "of the system prompt" in said
    three = educe.inspect(place / "smollm2.yaml", 3, diff="trl").other
    assert three is not None
    assert three.in_words() == [
        "TRL's default trains 1 token that the model never has to say: 1 of the template's own text."
    ]
    long = educe.inspect(place / "smollm2.yaml", 6, diff="trl").other
    assert long is not None
    assert "cut after 1,024 tokens" in long.says
    assert long.missed > 900
    split = educe.inspect(place / "qwen3.yaml", 2, diff="whole").other
    assert split is not None
    assert split.missed == 9, "the first turn's reasoning is not in the whole conversation"


def test_alpaca_rows_are_no_rows_of_trl(place: Path) -> None:
    other = educe.inspect(place / "smollm2.yaml", 7, diff="trl").other
    assert other is not None
    assert other.says.startswith("TRL does not read this format")


# --- check: what the template does to all rows ---------------------------------------------------------------------------


def test_check_says_what_the_template_does(place: Path, tmp_path: Path) -> None:
    """Stop token, split rows, openings, trimmed answers; and none of it where there is none."""
    opened, spaced = {"role": "assistant", "content": "Welcome!"}, {"role": "assistant", "content": "\n\nfine"}
    asked = [{"role": "user", "content": f"question {k}"} for k in range(60)]
    rows = [{"messages": [opened] * (k < 20) + [asked[k], ROWS[1]["messages"][1], asked[k], spaced]} for k in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text((place / "qwen3.yaml").read_text().replace(str(place / "runs"), str(tmp_path / "runs")))
    _, said = run("check", recipe, columns=200)
    summary = educe.prepare(recipe).summary
    assert f"{summary['split_rows']} rows become {summary['examples']} sequences, +" in said
    assert f"<|im_end|>: ends {summary['trained_turns']} of {summary['trained_turns']} trained turns (100%)" in said
    assert f"{summary['opening_turns']} rows with the assistant first" in said
    assert f"{summary['trimmed_turns']} answers lose white space at their ends" in said
    assert min(summary[k] for k in ("split_rows", "opening_turns", "trimmed_turns")) > 0
    plain = [{"prompt": f"word {k}", "completion": f"answer {k}"} for k in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, plain)) + "\n")
    recipe.write_text((place / "smollm2.yaml").read_text().replace(str(place / "runs"), str(tmp_path / "runs")))
    _, said = run("check", recipe, columns=200)
    assert "template   " in said
    for word in ("split ", "context only", "trimmed"):
        assert word not in said


# --- in the browser ------------------------------------------------------------------------------------------------------

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
PROBE = """<script>
const errors = []; addEventListener("error", e => errors.push(String(e.message)));
for (const d of document.querySelectorAll("details")) d.open = true;
const outside = [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + ": " + e.textContent.slice(0, 40));
document.title = JSON.stringify({inner: innerWidth, scroll: document.documentElement.scrollWidth, outside, errors,
  paper: getComputedStyle(document.body).backgroundColor, rows: document.querySelectorAll("tbody tr").length});
parent.postMessage(document.title, "*");
</script>"""
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><script>
onmessage = e => {{ document.title = e.data; }};
</script><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on PATH, and CI must have one")
        pytest.skip("no Chromium on PATH")
    return found


def browse(chromium: str, home: Path, *args: str) -> str:
    command = [chromium, *FLAGS, f"--user-data-dir={home / 'profile'}", "--enable-logging=stderr", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return done.stdout


@pytest.mark.browser
@pytest.mark.parametrize("row, dark", [(1, False), (2, True), (5, False), (6, False), (6, True)])
def test_the_page_fits_a_phone(chromium: str, place: Path, tmp_path: Path, row: int, dark: bool) -> None:
    """375 px wide with all details open; nothing wider than the screen, nothing on the console, few seconds at most."""
    name = "qwen3" if row == 2 else "smollm2"
    page, began = tmp_path / "row.html", time.monotonic()
    run("inspect", place / f"{name}.yaml", "--row", str(row), "--diff", "trl", "--html", page)
    assert time.monotonic() - began < 20
    html = page.read_text(encoding="utf-8")
    assert "http" not in POLICY.sub("", html).replace("http-equiv", "")
    assert "<script" not in html
    browse(
        chromium, tmp_path, "--dump-dom", page.as_uri()
    )  # with its own policy: nothing is blocked, nothing complains
    (tmp_path / "page.html").write_text(POLICY.sub("", html).replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=375), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = browse(chromium, tmp_path, scheme, "--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom",
                 (tmp_path / "frame.html").as_uri())  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title, dom[:500]
    seen = json.loads(unescape(title[1]))
    assert (seen["inner"], seen["scroll"], seen["outside"], seen["errors"]) == (375, 375, [], [])
    assert seen["paper"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    found = educe.inspect(place / f"{name}.yaml", row)
    assert seen["rows"] == sum(len(s.spans) for s in found.sequences)


def test_a_refused_row_has_a_page_that_explains(place: Path, tmp_path: Path) -> None:
    code, said = run("inspect", place / "smollm2.yaml", "--row", "5", "--html", tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert code == 2
    assert "Refused. Written to" in said
    assert "E-DATA-142" in html
    assert "unknown role" in html
    assert "Did you mean" in html


def test_the_prompt_on_the_page_is_what_is_sent(place: Path, tmp_path: Path) -> None:
    run("inspect", place / "smollm2.yaml", "--row", "1", "--html", tmp_path / "r.html")
    (prompt,) = re.findall(r"<pre>(.*?)</pre>", (tmp_path / "r.html").read_text(encoding="utf-8"), re.DOTALL)
    found = educe.inspect(place / "smollm2.yaml", 1).sequences[0]
    assert unescape(prompt) == found.prompt
    tokenizer = load_tokenizer(place / "smollm2")
    assert tokenizer.decode([s.token for s in found.spans[: found.num_prompt_tokens]]) == found.prompt
    assert np.all([s.weight == 0 for s in found.spans[: found.num_prompt_tokens]])
