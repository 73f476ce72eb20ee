"""The process in which chat templates run: a template is foreign code.

Started by `educe.chat.worker` as `python -P -m educe.chat.sandbox`. It reads one JSON request a line and answers with one JSON
line; it may use little memory, writes no file and opens none after it has started. Time is kept by the other side, which ends
it; where that side is gone, by the system.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from educe.chat.trace import FIRST_MARK, MARK, Leaf, TooManyLeaves, Trace, Traced, is_marked, pinned

MAX_FACTOR, MIN_CHARACTERS = 20, 65_536
MAX_ANSWER_CHARACTERS = 2**26  # what the other side reads, pieces and conditions included
MAX_REASON_CHARACTERS = 500
MAX_ALONE_S = 4.0

# Of the rendering that goes on.
_TRACE = Trace()
_DATE = datetime.date(1970, 1, 1)


class TooLong(Exception):
    """A template writes more than it may."""


class Drawn(Exception):
    """A template asked for chance: two renderings may agree all the same, so the asking is what counts."""


# Where an object lies in memory, as Python writes it: another process writes another number.
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]{4,}>")


class _Generation(Extension):
    """`{% generation %}` marks answers for other tools; here the block is rendered and the mark ignored."""

    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    """`a ~ b` joins as the environment does, so that marks are kept."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja's interface
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        """`a in b` asks the environment."""
        if len(node.ops) != 1 or node.ops[0].op not in ("in", "notin"):
            super().visit_Compare(node, frame)
            return
        self.write("(not " if node.ops[0].op == "notin" else "(")
        self.write("environment.inside(")
        self.visit(node.expr, frame)
        self.write(", ")
        self.visit(node.ops[0].expr, frame)
        self.write("))")


_JINJAS_OWN = ("_loop_vars", "_block_vars")  # all variables of the template, handed along with a call


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset("%")

    @staticmethod
    def inside(value: Any, holder: Any) -> bool:
        """`value in holder`, where a plain text must not look at marks."""
        return (pinned(value) if _is_plain(holder) else value) in holder

    def call(__self, __context: Any, __obj: Any, *args: Any, **more: Any) -> Any:  # noqa: N805 - as jinja does
        """A call in the template. A method of a plain text gets real texts, but for those that only join."""
        if _is_plain(getattr(__obj, "__self__", None)) and __obj.__name__ not in ("join", "format", "format_map"):
            args, more = pinned(args), {k: v if k in _JINJAS_OWN else pinned(v) for k, v in more.items()}
        made = super().call(__context, __obj, *args, **more)
        return _TRACE.wrap(made) if type(made) is str else made

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left % right`: a form that is filled with marked texts."""
        if _is_plain(left) and is_marked(right):
            return _TRACE.made(left % pinned(right))
        return super().call_binop(context, operator, left, right)

    concat = staticmethod(lambda parts: _TRACE.wrap("".join(parts)))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Traced)


def _on_real_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks into text with C code: it gets the real text, and that is recorded."""
    first = int(hasattr(function, "jinja_pass_arg"))

    def filtered(*args: Any, **more: Any) -> Any:
        given, named = args[first:], more
        if not (is_marked(given) or is_marked(named)):
            return function(*args, **more)
        made = function(*args[:first], *pinned(given), **pinned(named))
        return _TRACE.made(str(made)) if isinstance(made, str) else made

    if first:
        filtered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return filtered


_ON_REAL_TEXT = (
    "title wordcount wordwrap truncate indent center format striptags urlize xmlattr int float escape e forceescape"
)
_ON_REAL_TEXT += " urlencode filesizeformat round abs pprint"


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Jinja's filter. A text without marks that gets some is the row's, not the template's."""
    text, number = str(value), -1 if count is None else count
    if _is_plain(text) and is_marked((old, new)):
        return _TRACE.made(text.replace(str(pinned(old)), str(pinned(new)), number))
    return text.replace(str(old), str(new), number)


def _trim(value: Any, chars: Any = None) -> str:
    """Jinja's filter."""
    text = value if isinstance(value, str) else str(value)
    return text.strip(pinned(chars))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    """Jinja's filter, keeping marks."""
    items = [_get(v, attribute) for v in value] if attribute is not None else value
    return _TRACE.wrap(str(d).join(map(str, items)))


def _get(value: Any, attribute: str) -> Any:
    for name in attribute.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter writes it. A marked text becomes the leaf that is escaped the same way."""

    def escaped(v: Any) -> Any:
        if isinstance(v, Traced):
            changed = v._derive(("json", ensure_ascii))
            return str.__str__(changed)
        if isinstance(v, dict):
            return {k: escaped(x) for k, x in v.items()}
        return [escaped(x) for x in v] if isinstance(v, (list, tuple)) else v

    text = json.dumps(
        escaped(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if ensure_ascii:  # the marks were escaped too, as surrogate pairs
        for k in range(len(_TRACE.leaves)):
            if (mark := chr(FIRST_MARK + k)) not in _TRACE.taken:
                text = text.replace(json.dumps(mark)[1:-1], mark)
    return _TRACE.wrap(text)


def _random(*args: Any, **more: Any) -> NoReturn:
    raise Drawn


def _strftime_now(form: str) -> str:
    return _DATE.strftime(pinned(form))


def build_environment() -> jinja2.Environment:
    """The environment that transformers renders chat templates in, with marks kept."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    for name in _ON_REAL_TEXT.split():
        environment.filters[name] = _on_real_text(environment.filters[name])
    safe = environment.filters["safe"]
    environment.filters["safe"] = lambda value: value if isinstance(value, Traced) else safe(value)
    environment.filters.update(tojson=_tojson, join=_join, replace=_replace, trim=_trim)
    environment.tests["in"] = environment.inside
    environment.tests["escaped"] = lambda value: not isinstance(value, Traced) and hasattr(value, "__html__")
    for name in ("iterable", "sequence"):  # a text is both; asking shows nothing of it
        stock = environment.tests[name]
        environment.tests[name] = lambda value, stock=stock: isinstance(value, str) or stock(value)  # type: ignore[misc]
    environment.filters["random"] = _random
    environment.globals.update(lipsum=_random, raise_exception=_raise, strftime_now=_strftime_now)
    return environment


# --- one rendering -------------------------------------------------------------------------------------------------------


def render(template: jinja2.Template, given: dict[str, Any], limit: int) -> str:
    """The text, with marks where `given` has them. Raises `TooLong`, and whatever the template does."""
    size, parts = 0, []
    for part in template.generate(**given):
        parts.append(part)
        size += str.__len__(part)
        if size > limit:
            raise TooLong(f"it wrote more than {limit} characters")
    return "".join(parts)


def traced(messages: Sequence[dict[str, Any]], trace: Trace) -> list[dict[str, Any]]:
    """The messages with their texts marked; roles, keys and numbers stay what they are."""

    def marked(value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, str):
            return trace.text(Leaf(path, (), value))
        if isinstance(value, dict):
            return {k: marked(v, (*path, k)) for k, v in value.items()}
        return [marked(v, (*path, k)) for k, v in enumerate(value)] if isinstance(value, list) else value

    return [
        {k: v if k in ("role", "type") else marked(v, (i, k)) for k, v in m.items()} for i, m in enumerate(messages)
    ]


def run(template: jinja2.Template, job: dict[str, Any]) -> dict[str, Any]:
    """Render twice, with the texts and with marks for them; tell the text, and who wrote what where both agree."""
    global _TRACE, _DATE
    _DATE = datetime.date.fromisoformat(job["date"])
    given = {**job["special"], **job["settings"], "tools": job["tools"], "documents": None}
    given["add_generation_prompt"] = job["generation"]
    limit = MAX_FACTOR * job["size"] + MIN_CHARACTERS
    _TRACE = Trace(marking=False)
    text = render(template, {**given, "messages": job["messages"]}, limit)
    text.encode()  # a lone surrogate is no text
    given_text = json.dumps(job, ensure_ascii=False)
    if (address := _ADDRESS.search(text)) and address[0] not in given_text:
        raise Drawn
    taken = frozenset(MARK.findall(given_text))
    _TRACE = trace = Trace(taken=taken)
    marked, why = "", ""
    try:
        marked = str.__str__(render(template, {**given, "messages": traced(job["messages"], trace)}, limit))
        if trace.real(marked) != text:
            why = "it looks into the texts in a way that cannot be followed"
    except (TooManyLeaves, Exception) as e:  # what it does to real text alone it may not do to marked text
        why = f"{type(e).__name__}: {e}"[:200]
    if why:
        _TRACE = Trace(marking=False)
        again = render(template, {**given, "messages": job["messages"]}, limit)
        return {"text": text, "lost": why, "random": again != text}
    shown = MARK.findall(marked + "".join(about for about, *_ in trace.conditions))
    used = {ord(m) - FIRST_MARK for m in set(shown) - taken}
    return {
        "marked": marked,
        "leaves": {k: [trace.leaves[k].path, trace.leaves[k].ops, trace.leaves[k].text] for k in used},
        "conditions": trace.conditions,
        "leaked": sorted(trace.leaked),
    }


def facts(environment: jinja2.Environment, source: str) -> dict[str, Any]:
    """What the source alone says: variables it expects from outside, and the words it writes or looks up."""
    tree = environment.parse(source)
    words = {n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)}
    words |= {n.attr for n in tree.find_all(nodes.Getattr)}
    words |= {d.data for d in tree.find_all(nodes.TemplateData)}
    return {"variables": sorted(meta.find_undeclared_variables(tree)), "words": sorted(words)}


# --- the process ---------------------------------------------------------------------------------------------------------


def _failure(e: BaseException) -> dict[str, Any]:
    if isinstance(e, Drawn):
        return {"random": True}
    if isinstance(e, (TooLong, MemoryError)):
        return {"limit": str(e) if isinstance(e, TooLong) else "it asked for more memory than it may use"}
    if isinstance(e, jinja2.TemplateSyntaxError):
        return {"syntax": e.message or "syntax error", "line": e.lineno}
    said = (str(e) or type(e).__name__)[:MAX_REASON_CHARACTERS]
    return {"refused": said if isinstance(e, jinja2.TemplateError) else f"{type(e).__name__}: {said}"}


def confine(memory_bytes: int) -> None:
    """Give up what a template never needs. Where the system has no such limits, the other side watches memory alone."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, most in (("RLIMIT_AS", memory_bytes), ("RLIMIT_FSIZE", 0), ("RLIMIT_NPROC", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))


def serve(requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until there are no more: {"compile": source, "key"}, or {"key", ...job}."""
    environment = build_environment()
    compiled: dict[str, jinja2.Template] = {}
    for line in requests:
        request = json.loads(line)
        try:
            if "compile" in request:
                compiled[request["key"]] = environment.from_string(request["compile"])
                answer(facts(environment, request["compile"]))
            else:
                answer(run(compiled[request["key"]], request))
        except Exception as e:  # foreign code: whatever it raises is its own failure
            answer(_failure(e))


def _timed(requests: Iterable[str]) -> Iterable[str]:
    """The requests; the system ends the process when one takes far too long: whoever should have ended it was killed."""
    alarm = getattr(signal, "setitimer", None)  # not on Windows
    for line in requests:
        if alarm is not None:
            alarm(signal.ITIMER_REAL, MAX_ALONE_S)
        yield line
        if alarm is not None:
            alarm(signal.ITIMER_REAL, 0)


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr
    confine(int(sys.argv[1]))

    def answer(value: dict[str, Any]) -> None:
        line = json.dumps(value)
        if len(line) > MAX_ANSWER_CHARACTERS:
            line = json.dumps({"limit": "what it did takes too long to tell"})
        out.write(line + "\n")
        out.flush()

    serve(_timed(sys.stdin), answer)


if __name__ == "__main__":
    main()
