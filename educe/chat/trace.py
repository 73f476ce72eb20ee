"""Text that remembers where it came from, and what a template asked about it.

A chat template is given `Traced` strings in place of a row's texts. Such a string holds marks (one private character for each
text, its *leaf*) where the text would stand, so whatever the template writes shows who wrote it. A change the template makes to
a text (trimming, splitting at `</think>`) gives a new leaf that knows the operation; a question it asks (`'x' in content`,
`content.startswith(…)`) is answered from the real text and recorded as a condition. What comes out is therefore the rendering
of every row with the same shape whose texts meet the same conditions (symbolic execution of one path). Where a change or a
question cannot be made again for another text, the text itself is made a condition: it is *pinned*.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import markupsafe

# One character of plane 15 or 16 for each leaf.
FIRST_MARK, LAST_MARK = 0xF0000, 0x10FFFD
MARK = re.compile(f"[{chr(FIRST_MARK)}-{chr(LAST_MARK)}]")

# An operation on a text: its name and its arguments, as JSON can hold them.
Op = tuple[Any, ...]
# Marked text, the question, its arguments (marked too), the answer.
Condition = tuple[str, str, tuple[Any, ...], Any]


class TooManyLeaves(Exception):
    """A row has more texts than there are marks."""


def apply_op(text: str, op: Op) -> str:
    """The text after one operation: a str method, a part of a split, a slice, or JSON's escapes."""
    name, *args = op
    if name == "part":  # ("part", method, arguments, which)
        method, given, which = args
        return str(getattr(text, method)(*given)[which])
    if name == "slice":
        return text[slice(*args)]
    if name == "item":
        return text[args[0]]
    if name == "json":
        return _json_string(text, ensure_ascii=bool(args[0]))
    return str(getattr(text, name)(*args))


def ask(text: str, question: str, args: Sequence[Any]) -> Any:
    """What the template asked about a text. Raises what Python raises (`index` of what is not there)."""
    if question == "bool":
        return bool(text)
    if question == "len":
        return len(text)
    if question == "contains":
        return args[0] in text
    if question == "parts":  # how many a split gives
        return len(getattr(text, args[0])(*args[1]))
    if question == "reaches":  # whether it has a character there
        return -len(text) <= args[0] < len(text)
    if question in ("eq", "lt", "le", "gt", "ge"):
        return getattr(text, f"__{question}__")(args[0])
    return getattr(text, question)(*args)


def _json_string(text: str, *, ensure_ascii: bool) -> str:
    import json

    return json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One of a row's texts after the operations: `path` leads to it in the messages, `text` is what it holds in this row.

    A path is (message, field, *keys). An empty path is a text that was made of pinned ones: it can only be shown, not made again.
    """

    path: tuple[Any, ...]
    ops: tuple[Op, ...]
    text: str


@dataclass(slots=True)
class Trace:
    """What happened to the texts of one row in one rendering. `leaked`: leaves whose text the template got without its mark.

    `pinned` are the marked texts that another row must have to the letter. One that is not `marking` is for real texts: a mark
    in them is a character like others, as are those that are `taken`: the row itself has them.
    """

    marking: bool = True
    taken: frozenset[str] = frozenset()

    leaves: list[Leaf] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    leaked: set[int] = field(default_factory=set)
    known: dict[tuple[Any, ...], str] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)

    def text(self, leaf: Leaf) -> Traced:
        """The marked string that stands for a leaf; the same one for the same leaf."""
        key = (leaf.path, repr(leaf.ops), leaf.text if not leaf.path else "")
        if key not in self.known:
            while (mark := chr(FIRST_MARK + len(self.leaves))) in self.taken:
                self.leaves.append(Leaf((), (), mark))
            if mark > chr(LAST_MARK):
                raise TooManyLeaves
            self.known[key] = mark
            self.leaves.append(leaf)
        return Traced(self.known[key], self)

    def wrap(self, marked: str) -> str:
        """A plain string again where no mark is in it."""
        return Traced(marked, self) if self.marking and MARK.search(marked) else str.__str__(marked)

    def real(self, marked: str) -> str:
        """The text that a marked string stands for."""
        return MARK.sub(lambda m: self.leaf(m[0]).text, str.__str__(marked))

    def leaf(self, mark: str) -> Leaf:
        """Whose mark it is; a text of its own where it is nobody's."""
        number = ord(mark) - FIRST_MARK
        return self.leaves[number] if number < len(self.leaves) else Leaf((), (), mark)

    def pin(self, marked: str) -> str:
        """The real text, for what is right only for rows with this very text."""
        real, written = self.real(marked), str.__str__(marked)
        if written not in self.pinned:
            self.pinned.add(written)
            self.conditions.append((written, "eq", (real,), True))
        return real

    def leak(self, marked: str) -> str:
        """The real text, handed out: it may be written where nobody can tell whose it is."""
        self.leaked |= {ord(m) - FIRST_MARK for m in MARK.findall(str.__str__(marked))}
        return self.pin(marked)

    def made(self, text: str) -> Traced:
        """Text that C code made of pinned texts: data, whoever wrote it."""
        return self.text(Leaf((), (), text))


def pinned(value: Any) -> Any:
    """An argument as Python's own types; the marked texts in it are pinned."""
    if isinstance(value, Traced):
        return value._trace.pin(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(pinned, value)) if type(value) in (list, tuple) else value
    return {pinned(k): pinned(v) for k, v in value.items()} if type(value) is dict else value


def is_marked(value: Any) -> bool:
    """Whether a marked text is in it."""
    if isinstance(value, (list, tuple)):
        return any(map(is_marked, value))
    return isinstance(value, Traced) or (isinstance(value, dict) and any(map(is_marked, value.values())))


class Traced(str):
    """A marked string; see the module. Its own characters are the marks and the literal text around them."""

    _trace: Trace  # templates see no attribute that starts so
    # C code sees the marks; Python code sees the methods below.

    def __new__(cls, marked: str, trace: Trace) -> Traced:
        self = super().__new__(cls, marked)
        self._trace = trace
        return self

    def _ask(self, question: str, *args: Any) -> Any:
        given = pinned(args)
        answer = ask(self._trace.real(self), question, given)
        self._trace.conditions.append((str.__str__(self), question, given, answer))
        return answer

    def _leaf(self) -> Leaf | None:
        """The leaf, where this is one and nothing else."""
        return self._trace.leaf(str.__str__(self)) if str.__len__(self) == 1 else None

    def _derive(self, op: Op) -> str:
        leaf = self._leaf()
        if leaf is not None and leaf.path:
            return self._trace.text(Leaf(leaf.path, (*leaf.ops, op), apply_op(leaf.text, op)))
        return self._trace.made(apply_op(self._trace.pin(self), op))

    # --- questions ---

    def __bool__(self) -> bool:
        return bool(self._ask("bool"))

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __contains__(self, needle: object) -> bool:
        return bool(self._ask("contains", needle)) if isinstance(needle, str) else False

    def __eq__(self, other: object) -> bool:
        return bool(self._ask("eq", other)) if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: str) -> bool:
        return bool(self._ask("lt", other)) if isinstance(other, str) else NotImplemented

    def __le__(self, other: str) -> bool:
        return bool(self._ask("le", other)) if isinstance(other, str) else NotImplemented

    def __gt__(self, other: str) -> bool:
        return bool(self._ask("gt", other)) if isinstance(other, str) else NotImplemented

    def __ge__(self, other: str) -> bool:
        return bool(self._ask("ge", other)) if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._trace.pin(self))

    def __iter__(self) -> Iterator[str]:
        return iter([self._derive(("item", k)) for k in range(len(self))])

    def __repr__(self) -> str:
        return self._trace.made(repr(self._trace.pin(self)))

    # --- joining keeps the marks ---

    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        return self._trace.made(format(self._trace.pin(self), pinned(spec))) if spec else str.__str__(self)

    def __html__(self) -> str:
        """For joining with what a template calls safe."""
        return self._trace.made(str(markupsafe.escape(self._trace.pin(self))))

    def __add__(self, other: str) -> str:
        return self._trace.wrap(str.__add__(self, other))

    def __radd__(self, other: str) -> str:
        return self._trace.wrap(str.__add__(other, self))

    def __mul__(self, count: Any) -> str:
        return self._trace.wrap(str.__mul__(self, count))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return self._trace.made(self._trace.pin(self) % pinned(values))

    def __rmod__(self, form: str) -> str:
        return self._trace.made(form % self._trace.pin(self))

    def join(self, parts: Any) -> str:
        return self._trace.wrap(str.join(self, parts))

    # --- changes ---

    def __getitem__(self, key: Any) -> str:
        if isinstance(key, slice):
            return self._derive(("slice", key.start, key.stop, key.step))
        if isinstance(key, int):
            self._ask("reaches", key)
        return self._derive(("item", key))

    def strip(self, chars: str | None = None) -> str:
        return self._strip(chars, left=True, right=True)

    def lstrip(self, chars: str | None = None) -> str:
        return self._strip(chars, left=True, right=False)

    def rstrip(self, chars: str | None = None) -> str:
        return self._strip(chars, left=False, right=True)

    def _strip(self, chars: str | None, *, left: bool, right: bool) -> str:
        chars = pinned(chars)
        if self._leaf() is not None:
            return self._derive(("strip" if left and right else "lstrip" if left else "rstrip", chars))
        parts = split_marked(self)
        if left:
            parts = _strip_end(self._trace, parts, "lstrip", chars)
        if right:
            parts = _strip_end(self._trace, parts[::-1], "rstrip", chars)[::-1]
        return self._trace.wrap("".join(map(str.__str__, parts)))

    def replace(self, old: str, new: str, count: Any = -1) -> str:
        return self._derive(("replace", *pinned((old, new, count)))) if self._ask("contains", old) else self

    def _split(self, method: str, args: tuple[Any, ...]) -> list[str]:
        """Parts as leaves of their own. Where only literal text holds the separator, the marked text is split."""
        args = pinned(args)
        number = int(self._ask("parts", method, list(args)))
        if number == 1 and method in ("split", "rsplit") and args[0] is not None:
            return [self]
        if self._leaf() is None and isinstance(args[0], str) and self._only_literal(args[0]):
            return [self._trace.wrap(p) for p in getattr(str, method)(str.__str__(self), *args)]
        return [self._derive(("part", method, list(args), k)) for k in range(number)]

    def _only_literal(self, sep: str) -> bool:
        """Whether all separators stand in the literal text between the leaves, none in a leaf or across an edge."""
        if any(sep.startswith(sep[k:]) for k in range(1, len(sep))):
            return False  # one could begin inside another: which are found depends on what stands before
        marks = MARK.findall(str.__str__(self))
        leaves = [self._trace.text(self._trace.leaf(m)) for m in marks]
        if any(leaf._ask("contains", sep) for leaf in leaves):
            return False
        return bool(self._ask("count", sep) == str.count(self, sep))

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return self._split("split", (sep, maxsplit))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return self._split("rsplit", (sep, maxsplit))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._split("splitlines", (keepends,))

    def partition(self, sep: str) -> tuple[str, str, str]:
        self._ask("contains", sep)
        a, b, c = self._split("partition", (sep,))
        return a, b, c

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        self._ask("contains", sep)
        a, b, c = self._split("rpartition", (sep,))
        return a, b, c


def split_marked(marked: str) -> list[str]:
    """Literal stretches and single marks, in order."""
    text = str.__str__(marked)
    parts, at = [], 0
    for found in MARK.finditer(text):
        if found.start() > at:
            parts.append(text[at : found.start()])
        parts.append(found[0])
        at = found.end()
    if at < len(text):
        parts.append(text[at:])
    return parts


def _strip_end(trace: Trace, parts: list[str], method: str, chars: str | None) -> list[str]:
    """Strip the first of `parts`, and the next where nothing is left of it; each answer becomes a condition."""
    kept = list(parts)
    while kept:
        first = trace.wrap(kept[0])
        changed = getattr(first, method)(chars)
        if changed:  # for a leaf this asks, and records the answer
            kept[0] = str.__str__(changed)
            break
        kept.pop(0)
    return kept


def _question(name: str) -> Callable[..., Any]:
    def asked(self: Traced, *args: Any) -> Any:
        return self._ask(name, *args)

    return asked


def _change(name: str) -> Callable[..., str]:
    def changed(self: Traced, *args: Any) -> str:
        return self._derive((name, *pinned(args)))

    return changed


def _pinning(name: str) -> Callable[..., Any]:
    def made(self: Traced, *args: Any, **more: Any) -> Any:
        text = getattr(self._trace.leak(self) if name == "encode" else self._trace.pin(self), name)(
            *pinned(args), **pinned(more)
        )
        return self._trace.made(text) if isinstance(text, str) else text

    made.__name__ = name  # the sandbox knows `format` by its name, and looks at what it would show
    return made


_QUESTIONS = (
    "startswith endswith find rfind index rindex count isalnum isalpha isascii isdecimal isdigit isidentifier islower"
)
_QUESTIONS += " isnumeric isprintable isspace istitle isupper"
_CHANGES = "capitalize casefold lower upper swapcase title removeprefix removesuffix expandtabs"
_PINNING = "center ljust rjust zfill encode format format_map translate"
for _names, _make in ((_QUESTIONS, _question), (_CHANGES, _change), (_PINNING, _pinning)):
    for _name in _names.split():
        setattr(Traced, _name, _make(_name))
