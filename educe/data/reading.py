"""How the rows of a source are read: filter, columns, format, roles; one row of a file → its conversations, texts or pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jmespath
from jmespath.exceptions import (
    ArityError,
    EmptyExpressionError,
    JMESPathError,
    LexerError,
    ParseError,
    UnknownFunctionError,
)

from educe.data.formats import FORMATS, Turns, detect, unread_keys
from educe.data.messages import read_message, row_weight, unread_of
from educe.data.pairs import both_answers, of_answer
from educe.data.sources import read_rows, sample_rows
from educe.data.tools import Row, Unfit, a_kind, check_results, read_tools
from educe.data.trees import paths_of, turns_of
from educe.errors import RecipeError, Refusal
from educe.types import Conversation, Document, Message, Pair, Role, Source

Item = Conversation | Document | Pair | Refusal
# The recipe's word for files whose rows are of several formats.
MIXED = "mixed"
# Of text files: each is one text, however many blank lines it has.
DOCUMENT = "document"
OASST_MESSAGE = "oasst message"


class Expression:
    """A JMESPath expression (jmespath.org). Raises `RecipeError` where it is none; `name` is the knob it stands in."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        try:
            self._compiled = jmespath.compile(text)
            self._compiled.search({})  # names a function that there is
        except (UnknownFunctionError, ArityError, ParseError, LexerError, EmptyExpressionError) as e:
            found = f"{text!r} is no JMESPath expression: {' '.join(str(e).split())}."
            raise RecipeError(103, name, found, "See jmespath.org, e.g. answers[0].text.") from e
        except (JMESPathError, ValueError, TypeError):
            pass  # the empty row does not suit it

    def of(self, row: Row) -> Any:
        """Its value on a row. Raises `Unfit`."""
        try:
            return self._compiled.search(row)
        except (JMESPathError, ValueError, TypeError) as e:
            raise Unfit(
                "E-DATA-149", f"{self.name}: {' '.join(str(e).split())}", "Mend the expression or the row."
            ) from e

    def __reduce__(self) -> tuple[type[Expression], tuple[str, str]]:
        return Expression, (self.text, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """`format` is a name in `FORMATS` (None: told by each row's keys), `of_file` the one that the rows of the file have been found
    to have: a row of another one is refused; `columns` make a new row of expressions on the given one, by
    key; `where` keeps the rows for which it is true; `roles` are this source's names of roles; `system` stands before rows
    that have none; `best` and `max_rank` are for trees (see `trees.paths_of`); `documents`: a text file is one text."""

    format: str | None = None
    of_file: str | None = None
    columns: Mapping[str, Expression] = field(default_factory=dict)
    where: Expression | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)
    system: str | None = None
    best: bool = True
    max_rank: int | None = None
    documents: bool = False

    @property
    def of_messages(self) -> bool:
        """Whether rows are single messages, which make trees with those around them."""
        return not self.columns and OASST_MESSAGE in (self.format, self.of_file)

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            fix = f"One of {', '.join(FORMATS)}; {MIXED} where every row may be of another one."
            raise RecipeError(103, "format", f"{self.format!r} is no format.", fix)


PLAIN = Reading()
# Rows of a file that are looked at to tell its format.
NUM_SAMPLED = 24
# Keys of things that would be left out of what the model reads, and whose rows would then teach something else.
_LOST = ("images", "image", "videos", "video", "audios", "audio", "documents", "chat_template_kwargs")


def read_row(row: Row, source: Source, reading: Reading = PLAIN, unread: Counter[str] | None = None) -> Sequence[Item]:
    """What a row of a file holds, checked: usually one conversation. Keys that mean nothing here are counted in `unread`."""
    try:
        if reading.where is not None and not reading.where.of(row):
            return [
                _refusal(
                    Unfit("E-DATA-202", "where is false for the row.", "It is left out as the recipe says."), source
                )
            ]
        row = _mapped(row, reading)
        name = reading.format or _format_of(row, reading.of_file)
        if reading.of_messages and "message_tree_id" in row and "prompt" in row:
            name = "oasst tree"  # made of them
        form = FORMATS[name]
        missing = form.keys - row.keys()
        if missing:
            raise Unfit("E-DATA-106", f"the row lacks {', '.join(sorted(missing))}.", f"Rows of {name} have it.")
        if reading.roles:
            row = _with_roles(row, reading.roles)
        if ignored := unread_keys(tuple(row), name):
            _refuse_lost(row, "the row")
            if unread is not None:
                unread.update(ignored)
        if form.read is None:
            return list(_READERS[name](row, source, reading))
        if reading.format is None and type(row.get("label")) is bool:
            found = "the row has a label (true or false): an answer is judged in it, not shown to be learned."
            raise Unfit("E-DATA-150", found, "To learn from the good ones: where: label, and name the format.")
        turns = form.read(row)
        if unread is not None:
            unread.update(f"{k} (of a turn)" for t in turns if len(t) > 2 for k in unread_of(t))
        return [_conversation(turns, source, reading, row)]
    except Unfit as e:
        return [_refusal(e, source)]


def reading_for(reading: Reading, file: Path, header: Sequence[str] = ()) -> Reading:
    """The same for a file, with the format that its rows are found to have."""
    if reading.format is not None or reading.of_file is not None:
        return reading
    rows = [row for _, row in sample_rows([file], NUM_SAMPLED, header) if isinstance(row, dict)]
    told = format_of_rows(rows, reading)
    if told is None:  # few rows, or the places that were looked at hold none
        first = islice((row for _, row in read_rows(file, header) if isinstance(row, dict)), NUM_SAMPLED)
        told = format_of_rows(list(first), reading)
    return replace(reading, of_file=told)


def format_of_rows(rows: Sequence[Row], reading: Reading) -> str | None:
    """The format that most of some rows of a file have by their keys; None where none is told."""
    told: Counter[str] = Counter()
    for row in rows:
        try:
            fits = detect(_mapped(row, reading))
        except Unfit:
            continue
        told.update(fits if len(fits) == 1 else ())
    return told.most_common(1)[0][0] if told else None


def _mapped(row: Row, reading: Reading) -> Row:
    if not reading.columns:
        return row
    made = {key: expression.of(row) for key, expression in reading.columns.items()}
    return {key: value for key, value in made.items() if value is not None}


def _with_roles(row: Row, roles: Mapping[str, Role]) -> Row:
    """The row with its own names of roles replaced, wherever turns stand in it."""

    def turn(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        named = {k: roles[r] for k in ("role", "from") if isinstance(r := value.get(k), str) and r in roles}
        return {**value, **named}

    return {k: [turn(t) for t in v] if isinstance(v, list) and k in _TURNS else v for k, v in row.items()}


_TURNS = frozenset(
    {"messages", "conversations", "prompt", "completion", "chosen", "rejected", "chosen_messages", "rejected_messages"}
)


def _refuse_lost(row: Row, what: str) -> None:
    for key in _LOST:
        if row.get(key):
            found = f"{what} has {key}, which would be left out of what the model reads."
            fix = "Remove the row; or, if it holds without them, the key."
            if key == "chat_template_kwargs":
                fix = "Set them for all rows: template.settings in the recipe."
            raise Unfit("E-DATA-146", found, fix)


def to_conversation(
    row: Row, source: Source, reading: Reading = PLAIN, unread: Counter[str] | None = None
) -> Conversation | Refusal:
    """The first conversation of a row, or why there is none."""
    first = read_row(row, source, reading, unread)[0]
    if isinstance(first, (Conversation, Refusal)):
        return first
    return _refusal(Unfit("E-DATA-150", f"the row is a {type(first).__name__.lower()}.", "Give conversations."), source)


def _format_of(row: Row, of_file: str | None) -> str:
    fits = detect(row)
    if len(fits) == 1:
        if of_file not in (None, MIXED, fits[0]) and (of_file, fits[0]) != (OASST_MESSAGE, "oasst tree"):
            found = f"the row is of the format {fits[0]}, the file's rows are of {of_file}."
            raise Unfit("E-DATA-109", found, f"To take rows of several formats: format: {MIXED}.")
        return fits[0]
    if fits:
        fix = "Remove the keys of one of them, or name the format."
        raise Unfit("E-DATA-107", f"the row fits {' and '.join(fits)}.", fix)
    known = "; ".join(f"{name}: {', '.join(sorted(f.keys))}" for name, f in FORMATS.items())
    keys = f"keys {', '.join(map(repr, list(row)[:8]))} fit" if row else "a row without keys fits"
    found = f"{keys} no known format."
    raise Unfit("E-DATA-106", found, f"Rename them, or map them with columns ({known}).")


def _conversation(turns: Turns, source: Source, reading: Reading, row: Row) -> Conversation:
    """Turns and what stands beside them in the row, checked."""
    tools: tuple[Row, ...] = ()
    if len(row) > 1:
        tools = read_tools(row)
        if system := row.get("system"):
            if not isinstance(system, str):
                found = f"system is {a_kind(system)}, not text."
                raise Unfit("E-DATA-143", found, "Give text, or leave it out.")
            turns = [{"role": "system", "content": system}, *turns]
        turns = row_weight(row, turns)
    for i, turn in enumerate(turns):
        if len(turn) > 2:
            _refuse_lost(turn, f"messages[{i}]")
    messages = tuple([read_message(turn, i) for i, turn in enumerate(turns)])
    roles = [m.role for m in messages]
    if "assistant" not in roles:
        raise Unfit("E-DATA-145", "there is no assistant message to learn from.", "Add one, or remove the row.")
    if "tool" in roles:
        check_results(messages)
    if reading.system is not None and messages[0].role not in ("system", "developer"):
        messages = (Message(role="system", content=reading.system), *messages)
    return Conversation(messages=messages, source=source, tools=tools)


def _refusal(e: Unfit, source: Source) -> Refusal:
    code, found, fix = e.args
    return Refusal(code=code, where=str(source), found=found, fix=fix)


# --- rows that are not one conversation ----------------------------------------------------------------------------------


def _tree(row: Row, source: Source, reading: Reading) -> Iterator[Item]:
    root = row if "replies" in row else row.get("prompt")
    paths = paths_of(root, best=reading.best, max_rank=reading.max_rank)
    for k, path in enumerate(paths):
        at = source if len(paths) == 1 else replace(source, item=k)
        yield _or_refusal(lambda path=path, at=at: _conversation(turns_of(path), at, reading, {}), at)  # type: ignore[misc]


def _message(row: Row, source: Source, reading: Reading) -> Iterator[Item]:
    if "replies" in row:
        return _tree(row, source, reading)
    raise Unfit(
        "E-DATA-152", "one message of a tree, without the others.", "Keep a tree's messages together in the file."
    )


def _natural(row: Row, source: Source, reading: Reading) -> Iterator[Item]:
    """Super-NaturalInstructions: the definition before each input; of several right outputs the first."""
    definition, instances = row.get("Definition"), row.get("Instances")
    text = "\n".join(definition) if isinstance(definition, list) and all(map(_is_text, definition)) else definition
    if not isinstance(text, str) or not isinstance(instances, list) or not instances:
        raise Unfit(
            "E-DATA-106",
            "Definition is no text, or Instances is no list of instances.",
            "Give a task file as published.",
        )
    for k, one in enumerate(instances):
        at = replace(source, item=k)
        outputs = one.get("output") if isinstance(one, dict) else None
        answer = outputs[0] if isinstance(outputs, list) and outputs else outputs
        asked = one.get("input") if isinstance(one, dict) else None
        prompt = f"{text}\n\n{asked}" if isinstance(asked, str) else asked
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        yield _or_refusal(lambda turns=turns, at=at: _conversation(turns, at, reading, {}), at)  # type: ignore[misc]


def _text(row: Row, source: Source, reading: Reading) -> Iterator[Item]:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Unfit("E-DATA-151", "text is empty or no text.", "Give text, or remove the row.")
    yield Document(text=text + "".join(_questions(row.get("qa"))), source=source)


def _questions(qa: Any) -> Iterator[str]:
    """Questions about a text, with their answers, as they are written behind it (Cheng et al. 2024, arXiv 2406.14491)."""
    if qa is None:
        return
    fits = isinstance(qa, list) and all(isinstance(q, dict) for q in qa)
    if not fits or any(not _is_text(q.get(key)) for q in qa for key in ("question", "answer")):
        raise Unfit("E-DATA-151", "qa is no list of {question, answer}.", "Write texts there, or leave it out.")
    for q in qa:
        yield f"\n\nQuestion: {q['question']}\nAnswer: {q['answer']}"


def _pair(row: Row, source: Source, reading: Reading) -> Iterator[Item]:
    beside: Row = {key: row[key] for key in ("tools", "functions") if key in row}
    answers = []
    for key, turns in both_answers(row).items():
        with of_answer(key):
            answers.append(_conversation(turns, source, reading, {"": None, **beside}))
    one, other = answers
    if not any(m.role in ("user", "tool") for m in one.messages):
        said = "nothing is asked before the two answers."
        raise Unfit(
            "E-DATA-155", said, "Name the key of the question: columns: {prompt: ..., chosen: ..., rejected: ...}."
        )
    if _asked(one) != _asked(other):
        found = "the two answers do not answer the same prompt: what stands before the last turn differs."
        raise Unfit("E-DATA-153", found, "Give conversations that are the same up to their last message.")
    if _trimmed(one.messages[-1]) == _trimmed(other.messages[-1]):
        how = "are the same" if one.messages == other.messages else "differ in white space around them alone"
        raise Unfit("E-DATA-154", f"the chosen and the rejected answer {how}.", "Remove the row.")
    yield Pair(chosen=one, rejected=other)


def _asked(c: Conversation) -> list[tuple[str, str]]:
    """What an answer answers, white space aside: whether a model sees it alike is known when it is rendered."""
    return [(m.role, m.content.strip()) for m in c.messages[:-1]]


def _trimmed(answer: Message) -> Message:
    return replace(answer, content=answer.content.strip())


def _or_refusal(make: Callable[[], Item], at: Source) -> Item:
    try:
        return make()
    except Unfit as e:
        return _refusal(e, at)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_READERS: dict[str, Callable[[Row, Source, Reading], Iterator[Item]]] = {
    "preference": _pair,
    "preference messages": _pair,
    "oasst tree": _tree,
    "oasst message": _message,
    "natural instructions": _natural,
    "text": _text,
}


class Group:
    """Which group a row belongs to; rows of one group stay in one split. Values are compared as JSON; None: the row has none."""

    def __init__(self, expression: str) -> None:
        self._expression = Expression(expression, "data.group")

    def of(self, row: Row) -> Any:
        try:
            return self._expression.of(row)
        except Unfit:
            return None
