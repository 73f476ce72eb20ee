"""Every chat template there is × the tokenizers that fit it × every shape of conversation: what becomes of each row.

`python tests/matrix.py` writes tests/golden/chat_matrix.txt anew; test_chat_matrix_a.py and _b.py compare with it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from educe.chat.examples import build_rendered
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.template import Forms
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.chat.weights import weigh
from educe.data.reading import to_conversation
from educe.errors import Refusal
from educe.types import Conversation, Source

from fitting import fitting_dirs, template_files
from judge import judge_proved, judge_refused
from shapes import CONTENTS, REASONING, SHAPES, TOOLS, TURNS

GOLDEN = Path(__file__).parent / "golden" / "chat_matrix.txt"
COMMAND = "python tests/matrix.py"
SHARED = Path(__file__).parents[2] / "shared" / "data"
KINDS = {"turns": TURNS, "contents": CONTENTS, "reasoning": REASONING, "tools": TOOLS}
LEARNED = "gpt2+marks, ends learned"  # no generation_config.json: turn ends are learned from the template
# What the judge minds and is no fault of educe, as "template, tokenizer: what": why.
EXPLAINED: dict[str, str] = {}
HEAD = f"""\
Every chat template × the tokenizers that fit it × {len(SHAPES)} shapes (tests/shapes.py). Made by `{COMMAND}`.

== template [= others of the same text]
-- tokenizer: short hashes of all ids and weights of the shapes in {", ".join(KINDS)}; tokens that end a turn, (learned) those
   that no file names; user→X: the next user's message writes X; how reasoning is closed; forms other than the usual ones
   outcome: shapes ("proved 2": two sequences of one row); settings: shapes for which they are not the template's defaults
   !! what tests/judge.py says is wrong
"""


@dataclass
class Cell:
    """A template with a tokenizer: outcome and settings of each shape, what is wrong, hashes by kind of shape."""

    outcomes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    hashes: str = ""
    habits: str = ""

    def head(self, tokenizer: str) -> str:
        return f"-- {tokenizer}: {self.hashes}; {self.habits}"

    def body(self) -> list[str]:
        """The lines that say it."""
        lines = []
        for what, given in (("settings ", self.settings), ("", self.outcomes)):
            grouped: dict[str, list[str]] = {}
            for shape, outcome in given.items():
                grouped.setdefault(outcome, []).append(shape)
            largest = max(grouped, key=lambda g: len(grouped[g])) if grouped and not what else None
            for outcome, shapes in sorted(grouped.items()):
                rest = "the other" if len(grouped) > 1 else "all"
                listed = f"{rest} {len(shapes)}" if outcome == largest and len(shapes) > 10 else _listed(shapes)
                lines.append(f"   {what}{outcome}: {listed}")
        return lines + [f"   !! {shape}: {w}" for shape, found in self.wrong.items() for w in found]


def _listed(shapes: Sequence[str]) -> str:
    """Names of shapes; most of a group by the group's name."""
    left, said = list(shapes), []
    groups = {f"all {kind}": list(members) for kind, members in KINDS.items()}
    groups["all with calls"] = [n for n, row in rows().items() if any(m.tool_calls for m in row.messages)]
    groups["all with reasoning"] = [n for n, row in rows().items() if any(m.reasoning for m in row.messages)]
    for name, members in groups.items():
        absent = [m for m in members if m not in left]
        if len(members) - len(absent) > 4 and len(absent) < 4:
            said.append(f"{name} ({len(members) - len(absent)})" + (f" but {', '.join(absent)}" if absent else ""))
            left = [s for s in left if s not in members]
    return "; ".join([*said, *left])


@cache
def rows() -> dict[str, Conversation]:
    made = {name: to_conversation(row, Source(file=name, line=1)) for name, row in SHAPES.items()}
    return {name: row for name, row in made.items() if isinstance(row, Conversation)}


@cache
def templates() -> dict[str, tuple[str, list[str]]]:
    """Source and other names of each; trl's training templates have a test of their own."""
    found: dict[str, tuple[str, list[str]]] = {}
    by_text: dict[str, str] = {}
    for name, source in template_files(SHARED).items():
        if source in by_text:
            found[by_text[source]][1].append(name)
        elif not name.endswith("_training"):
            by_text[source] = name
            found[name] = (source, [])
    return found


def dirs_of(name: str, source: str, place: Path) -> dict[str, Path]:
    """Model directories by tokenizer, one of them without turn ends in its files."""
    found = fitting_dirs(name, source, SHARED, place)
    if "gpt2+marks" not in found:
        return found
    home = found["gpt2+marks"]
    made = home.with_name("gpt2+marks-learned")
    made.mkdir(exist_ok=True)
    for file in home.iterdir():
        if file.name != "generation_config.json" and not (made / file.name).exists():
            (made / file.name).symlink_to(file.resolve())
    return {"gpt2+marks": home, LEARNED: made, "qwen2_5+marks": found["qwen2_5+marks"]}


def fill_cell(tokenizer: ChatTokenizer) -> Cell:
    """All shapes before one template, each judged."""
    cell = Cell(habits=_habits(tokenizer))
    seen = {kind: hashlib.sha256() for kind in KINDS}
    for name, row in rows().items():
        settled = settle(tokenizer, [row]).tokenizer
        made = build_rendered([row], Renderer(settled))[0]
        if isinstance(made, Refusal):
            cell.outcomes[name] = f"{made.code} {_short(made.found)}"
            wrong = judge_refused(row, made, settled)
        else:
            cell.outcomes[name] = f"proved {len(made)}"
            wrong = judge_proved(row, made, settled)
            kind = next(k for k, shapes in KINDS.items() if name in shapes)
            for r in made:
                seen[kind].update(r.ids_T.tobytes() + weigh(r, row.messages, settled).tobytes())
        if wrong:
            cell.wrong[name] = wrong
        if settled.settings:
            cell.settings[name] = json.dumps(dict(settled.settings))
    cell.hashes = " ".join(h.hexdigest()[:8] for h in seen.values())
    return cell


def _short(found: str) -> str:
    """A reason without what differs from row to row."""
    found = re.sub(r"\b(turn|message) \d+", r"\1 N", found.removesuffix("."))
    found = re.sub(r"(the tool) \w+$", r"\1 F", found)
    found = re.sub(r" where history says .*", " and history has other text", found)
    return re.sub(r"\s+", " ", found)[:150]


def _habits(t: ChatTokenizer) -> str:
    habits, forms, usual = t.habits, t.template.forms, Forms()
    learned = {t.control[w] for w in habits.ends} - t.known_stop
    stops = [w + " (learned)" * (i in learned) for w, i in sorted(t.control.items(), key=lambda c: c[1]) if i in t.stop]
    said = [f"stop {' '.join(stops)}", *(f"{role}→{w}" for role, w in habits.written_by_next.items())]
    if habits.closing is not None:
        said.append(f"reasoning in {habits.opening!r} … {habits.closing!r}")
    names = ("reasoning_key", "arguments", "no_content", "content")
    said += [f"{n}={getattr(forms, n)}" for n in names if getattr(forms, n) != getattr(usual, n)]
    return "; ".join(said)


# --- all of them ---------------------------------------------------------------------------------------------------------


def part_of(name: str) -> str:
    """Half of the work, for two processes."""
    return "a" if name.startswith("trl/") else "b"


def fill(part: str, place: Path, *, every: bool) -> dict[tuple[str, str], Cell]:
    """Cells of one half, by template and tokenizer, in the order of the tokenizer files: every one, or one of every 18th template."""
    work = []
    mine = [name for name in templates() if part_of(name) == part]
    for name in mine if every else mine[::18]:
        homes = dirs_of(name, templates()[name][0], place)
        chosen = sorted(homes) if every else [_one_of(name, homes)]
        work += [(str((homes[t] / "tokenizer.json").resolve()), name, t, homes[t]) for t in chosen]
    return {(name, tokenizer): fill_cell(load_tokenizer(home)) for _, name, tokenizer, home in sorted(work)}


def _one_of(name: str, tokenizers: Iterable[str]) -> str:
    """Another for each template, so that all tokenizers have their turn; not Qwen2.5's with marks, which takes seconds to make."""
    small = sorted(t for t in tokenizers if t != "qwen2_5+marks")
    return small[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(small)]


def lines_of(cells: dict[tuple[str, str], Cell]) -> Iterator[str]:
    """The golden file, tokenizers that agree in one block."""
    order = ["smollm2", "qwen2_5", "qwen3"]
    for name, (_, others) in templates().items():
        yield f"\n== {' = '.join((name, *others))}"
        blocks: dict[tuple[str, ...], list[str]] = {}
        mine = [(t, c) for (n, t), c in cells.items() if n == name]
        for tokenizer, cell in sorted(mine, key=lambda m: (m[0] not in order, m[0])):
            blocks.setdefault(tuple(cell.body()), []).append(cell.head(tokenizer))
        for body, heads in blocks.items():
            yield from (*heads, *body)


def parsed(lines: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Lines of each cell of a golden file."""
    found: dict[tuple[str, str], list[str]] = {}
    name, heads, open_ = "", [], False
    for line in list(lines)[len(HEAD.splitlines()) :]:
        if line.startswith("== "):
            name, heads = line.removeprefix("== ").split(" = ")[0], []
        elif line.startswith("-- "):
            heads = [] if not open_ else heads
            heads.append(line.removeprefix("-- ").split(": ")[0])
            found[name, heads[-1]] = [line]
        elif line.startswith("   ") and name:
            for h in heads:
                found[name, h].append(line)
        open_ = line.startswith("-- ")
    return found


def golden_cells() -> dict[tuple[str, str], list[str]]:
    return parsed(GOLDEN.read_text(encoding="utf-8").splitlines())


def doubtful(cells: dict[tuple[str, str], Cell]) -> list[str]:
    """What is wrong and not explained by `EXPLAINED`."""
    found = [(f"{name}, {t}", s, w) for (name, t), c in cells.items() for s, wrong in c.wrong.items() for w in wrong]
    return [
        f"{where}: {shape}: {w}"
        for where, shape, w in found
        if not any(re.match(e, f"{where}: {w}") for e in EXPLAINED)
    ]


def differences(cells: dict[tuple[str, str], Cell]) -> str:
    """What differs from the golden file, and how to accept it; "" where nothing does."""
    golden = golden_cells()
    found: list[str] = []
    for key, cell in cells.items():
        now = [cell.head(key[1]), *cell.body()]
        if now != golden.get(key):
            found.append(f"== {key[0]}")
            found += list(difflib.unified_diff(golden.get(key, []), now, n=0, lineterm=""))[2:]
    return "\n".join([*found[:120], f"({len(found)} lines) If this is meant: {COMMAND}"]) if found else ""


def main(argv: Sequence[str]) -> None:
    place = Path(argv[0]) if argv else Path(tempfile.gettempdir()) / "educe-fitting"
    place.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[str, str], Cell] = {}
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(fill, part, place, every=True) for part in "ab"]
        for job in jobs:
            cells |= job.result()
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("\n".join([HEAD, *lines_of(cells)]).strip() + "\n", encoding="utf-8")
    print(f"{len(cells)} cells of {len(SHAPES)} shapes → {GOLDEN}")


if __name__ == "__main__":
    main(sys.argv[1:])
