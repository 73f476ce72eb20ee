"""Educe against others: the characters that TRL's own `*_training.jinja` templates mark as answers, and transformers' ids.

Where TRL trains something else than educe (with the family's original template), tests/golden/trl_masks.txt says why;
`python tests/test_chat_trl.py` writes it anew. A difference that no reason covers fails.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from educe.chat.examples import build_rendered
from educe.chat.prompt import render_prompt
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.template import FIXED_DATE
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.errors import ChatError, Refusal
from educe.types import Conversation

from conftest import some
from fitting import fitting_dirs, template_files
from matrix import SHARED, rows
from oracle import inline, texts_of

GOLDEN = Path(__file__).parent / "golden" / "trl_masks.txt"
COMMAND = "python tests/test_chat_trl.py"
HEAD = f"""\
What TRL's training templates mark as answers, and what educe trains with each family's own template. Made by `{COMMAND}`.

== family (the tokenizer): "same" are shapes in which both train the same characters behind the same text
   why they differ: shapes, with the turn where it is not the last
"""
# fmt: off
CHOSEN = (
    "single", "system", "developer", "two turns", "three turns", "system, three turns", "users in a row",
    "assistants in a row", "assistant first", "ends with a user", "train false, then true", "newlines around",
    "code block", "unicode", "role names", "reasoning", "reasoning, both turns", "reasoning, first turn only",
    "reasoning, last turn only", "reasoning inline", "reasoning and tool call", "tools offered, not called",
    "one call, arguments an object", "call with content beside", "several calls in one turn",
    "call, result, answer", "two rounds of calls", "calls in a chain", "ends in a tool call",
)
# fmt: on

# Of turns that educe does not train.
UNASKED = ("TRL trains an answer that no prompt asks for", "TRL trains a turn whose weight is 0")


@dataclass(frozen=True)
class Said:
    """An answer: the text before it and what of it is trained."""

    before: str
    text: str


# --- both sides ----------------------------------------------------------------------------------------------------------


def theirs(row: Conversation, tokenizer: ChatTokenizer, source: str) -> list[Said] | str:
    """What TRL's template marks in a row; what the template said where it refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    said = [tokenizer.template._said(m) for m in row.messages]
    try:
        texts, marks = render_jinja_template(
            [said],
            tools=list(row.tools) or None,
            chat_template=_dated(source),
            return_assistant_tokens_mask=True,
            **tokenizer.template.special,
        )
    except Exception as e:
        return str(e)
    return [Said(texts[0][:first], texts[0][first:end]) for first, end in marks[0]]


def _dated(source: str) -> str:
    """A template that prints the date, with educe's."""

    def fixed(found: re.Match[str]) -> str:
        return repr(FIXED_DATE.strftime(found[2]))

    return re.sub(r"""strftime_now\((["'])(.*?)\1\)""", fixed, source)


def ours(row: Conversation, tokenizer: ChatTokenizer) -> dict[int, Said] | Refusal:
    """What educe trains, by turn."""
    settled = settle(tokenizer, [row]).tokenizer
    made = build_rendered([row], Renderer(settled))[0]
    if isinstance(made, Refusal):
        return made
    found: dict[int, Said] = {}
    for r in made:
        before, eos = "", settled.decode([settled.eos])
        for s in r.rendering.segments:
            if s.trained and s.message is not None:
                had = found.setdefault(s.message, Said(before, ""))
                found[s.message] = Said(had.before, had.text + (eos if s.part == "eos" else s.text))
            before += s.text
    return {i: found[i] for i in sorted(found)}


def _joined(spans: Sequence[Said], num: int) -> list[Said]:
    """Marks that touch, but for white space, as one, while there are more than turns."""
    made: list[Said] = []
    for s in (s for s in spans if s.text):
        gap = s.before[len(made[-1].before) + len(made[-1].text) :] if made else "-"
        if made and not gap.strip() and len(spans) > num:
            made[-1] = Said(made[-1].before, made[-1].text + gap + s.text)
        else:
            made.append(s)
    return made


# --- why they differ -----------------------------------------------------------------------------------------------------


def why(row: Conversation, i: int, mine: Said, their: Said, tokenizer: ChatTokenizer) -> Iterator[str]:
    """The reasons for which TRL's mask of a turn is another; "unexplained" where the answer itself is."""
    stops = [w for w, n in tokenizer.control.items() if n in tokenizer.stop and mine.text.endswith(w)]
    stop = max(stops, key=len, default="")
    body, (text, found, tail) = mine.text.removesuffix(stop), their.text.rpartition(stop)
    if not found:
        text, tail = tail.rstrip(), ""
        body = body.rstrip()
        other = max((w for w in tokenizer.control if text.endswith(w) and not body.endswith(w)), key=len, default="")
        text = text.removesuffix(other)
        yield (
            f"TRL trains {other} where inference needs the stop token {stop}" if other else f"TRL does not train {stop}"
        )
    core = _common_end(body, text)
    if any(w not in body[len(body) - core :] for w in _answer(row, i)):
        yield f"unexplained: TRL trains {their.text[:80]!r}, educe {mine.text[:80]!r}"
        return
    yield from _leads(row, i, body[: len(body) - core], text[: len(text) - core], mine)
    if tail:
        kind = "the white space" if not tail.strip() else repr(tail)
        yield f"TRL trains {kind} after the stop token"
    before, other = mine.before.rstrip(), their.before.rstrip()
    if not before.startswith(other) and not other.startswith(before):
        if other.count("<think>") > before.count("<think>"):
            yield "TRL keeps reasoning blocks in the history before, which inference strips"
            return
        yield f"what stands before is not what inference sends{_rewritten(mine.before, their.before, row)}"


def _answer(row: Conversation, i: int) -> list[str]:
    message = row.messages[i]
    return [inline(message.content)[1]] if message.content else [c.name for c in message.tool_calls]


def _common_end(one: str, other: str) -> int:
    most = min(len(one), len(other))
    return next((k for k in range(most) if one[-1 - k] != other[-1 - k]), most)


def _leads(row: Conversation, i: int, mine: str, their: str, said: Said) -> Iterator[str]:
    """Why one of both, or both, train something else before the answer."""
    thought = (row.messages[i].reasoning or "").strip()
    if their and said.before.endswith(their) and not mine:
        yield f"TRL trains {_short(their, row)}, which the generation prompt has written"
    elif their and mine:
        yield f"TRL trains {_short(their, row)} where inference, after {said.before[-12:]!r}, needs {_short(mine, row)}"
    elif thought and thought in their:
        yield "TRL puts reasoning into a turn where the template shows none"
    elif their:
        yield f"TRL trains {_short(their, row)} before the answer"
    elif mine:
        yield f"TRL does not train {_short(mine, row)}, which the model must write"


def _rewritten(mine: str, their: str, row: Conversation) -> str:
    at = next((k for k, (a, b) in enumerate(zip(mine, their, strict=False)) if a != b), min(len(mine), len(their)))
    for text in texts_of(row):  # the difference, not the row's own words
        if text and (mine.startswith(text, at) or their.startswith(text, at)):
            return ""
    return f": {mine[at : at + 12]!r} is {their[at : at + 12]!r}"


def _short(text: str, row: Conversation) -> str:
    for said in texts_of(row):
        text = text.replace(said, "…") if len(said) > 9 else text
    return repr(text)


def compare(row: Conversation, tokenizer: ChatTokenizer, source: str) -> dict[str, list[str]]:
    """Reasons of a row, each with its turns ("" for the last); {} where both agree."""
    mine, their = ours(row, tokenizer), theirs(row, tokenizer, source)
    if isinstance(mine, Refusal) or isinstance(their, str):
        both = isinstance(mine, Refusal) and isinstance(their, str)
        refused = mine.code if isinstance(mine, Refusal) else ""
        return {"both refuse" if both else f"educe refuses ({refused})" if refused else "TRL's template refuses": [""]}
    answers = [i for i, m in enumerate(row.messages) if m.role == "assistant"]
    their = _joined(their, len(answers))
    if len(their) != len(answers):
        return {f"unexplained: TRL marks {len(their)} of {len(answers)} turns": [""]}
    found: dict[str, list[str]] = {}
    for i, said in zip(answers, their, strict=True):
        turn = "" if i == answers[-1] else f" ({i})"
        if i in mine:
            for reason in why(row, i, mine[i], said, tokenizer):
                found.setdefault(reason, []).append(turn)
        elif said.text:
            found.setdefault(UNASKED[0] if i == 0 else UNASKED[1], []).append(turn)
    return found


# --- the golden file -----------------------------------------------------------------------------------------------------


def families(shared: Path) -> dict[str, tuple[str, str]]:
    """(original template, training template) of each family."""
    files = template_files(shared)
    names = [n.removesuffix("_training") for n in files if n.endswith("_training")]
    return {n.removeprefix("trl/"): (files[n], files[f"{n}_training"]) for n in names if n in files}


def lines_of(shared: Path, place: Path, every: int = 1) -> Iterator[str]:
    """Of every so many families."""
    work = []
    for name, (source, training) in sorted(families(shared).items())[::every]:
        dirs = fitting_dirs(f"trl/{name}", source, shared, place)
        tokenizer = next(iter(dirs))
        work.append((str((dirs[tokenizer] / "tokenizer.json").resolve()), name, tokenizer, dirs[tokenizer], training))
    made: dict[str, list[str]] = {}
    for _, name, tokenizer, home, training in sorted(work):
        made[name] = [f"== {name} ({tokenizer})", *_family(load_tokenizer(home), training)]
    for name in sorted(made):
        yield from ("", *made[name])


def _family(tokenizer: ChatTokenizer, training: str) -> Iterator[str]:
    grouped: dict[str, list[str]] = {"same": []}
    every: list[str] = []
    for shape in CHOSEN:
        found = compare(rows()[shape], tokenizer, training)
        if not found:
            grouped["same"].append(shape)
        differ = [
            t for reason, turns in found.items() if reason not in UNASKED and "refuse" not in reason for t in turns
        ]
        every += [f"{shape}{t}" for t in dict.fromkeys(differ)]
        for reason, turns in found.items():
            grouped.setdefault(reason, []).extend(f"{shape}{t}" for t in turns)
    for reason, shapes in grouped.items():
        others = [t for t in every if t not in shapes]
        if len(shapes) > 6 and len(others) < 7 and set(shapes) <= set(every):
            but = f" but {'; '.join(others)}" if others else ""
            yield f"   {reason}: every turn that differs{but}"
        elif shapes:
            yield f"   {reason}: {'; '.join(shapes)}"


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_trained_characters_are_trls_or_it_is_known_why(shared: Path, fitted: Path, every: int) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("transformers")
    now = [*HEAD.strip().splitlines(), *lines_of(shared, fitted, every)]
    assert not [line for line in now if "unexplained" in line]
    about, legend, *sections = GOLDEN.read_text(encoding="utf-8").rstrip("\n").split("\n\n== ")
    by_name = {section.split(" (")[0]: section for section in sections}
    assert sorted(by_name) == sorted(families(shared))
    golden = "\n\n== ".join([about, legend, *(by_name[name] for name in sorted(by_name)[::every])]).splitlines()
    differ = "\n".join(difflib.unified_diff(golden, now, "golden", "now", n=1, lineterm=""))
    assert not differ, f"\n{differ}\nIf this is meant: {COMMAND}"


# --- transformers' ids ---------------------------------------------------------------------------------------------------

SERVED = {
    "smollm2": "axolotl/chatml",
    "qwen2_5": "models/Qwen-Qwen2.5-7B-Instruct",
    "qwen3": "models/Qwen-Qwen3-0.6B",
    "llama3_1": "models/meta-llama-Llama-3.1-8B-Instruct",
    "gemma2": "models/google-gemma-2-2b-it",
    "deepseek_v3": "models/deepseek-ai-DeepSeek-V3.1",
    "mistral_v3_spm": "models/mistralai-Mistral-Nemo-Instruct-2407",
    "llama2_spm": "community/llama-2-chat",
}


@pytest.mark.parametrize("name", some(SERVED, 3))
def test_ids_are_those_of_transformers(shared: Path, fitted: Path, name: str) -> None:
    """The prompt of every turn of every shape without control strings; what one refuses the other does too."""
    transformers = pytest.importorskip("transformers")
    source = template_files(shared)[SERVED[name]]
    home = fitting_dirs(SERVED[name], source, shared, fitted)[name]
    tokenizer = load_tokenizer(home)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(home)
    peer.chat_template = _dated(source)
    same = refused = 0
    for row in rows().values():
        if any(map(tokenizer.holds_control, texts_of(row))):
            continue
        for end in range(1, len(row.messages) + 1):
            messages = row.messages[:end]
            sent = _sent(peer, [tokenizer.template._said(m) for m in messages], list(row.tools) or None)
            if sent is None:
                with pytest.raises(ChatError, match="E-CHAT-102"):
                    render_prompt(messages, tokenizer, row.tools)
                refused += 1
            else:
                assert render_prompt(messages, tokenizer, row.tools) == sent, (row.source, end)
                same += 1
    assert same >= 60
    assert refused <= same


def _sent(peer: Any, messages: Sequence[Any], tools: Sequence[Any] | None) -> list[int] | None:
    try:
        ids = peer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
    except Exception:
        return None
    return list(ids)


if __name__ == "__main__":
    home = Path(tempfile.gettempdir()) / "educe-fitting"
    home.mkdir(exist_ok=True)
    GOLDEN.write_text("\n".join([*HEAD.strip().splitlines(), *lines_of(SHARED, home)]) + "\n", encoding="utf-8")
