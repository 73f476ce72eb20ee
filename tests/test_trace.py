"""Texts that remember where they came from behave as texts, and what they remember makes them again for other texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import pytest
from educe.chat import sandbox
from educe.chat.trace import MARK, Leaf, Trace, Traced, apply_op, ask, pinned
from hypothesis import given, settings
from hypothesis import strategies as st

texts = st.text(st.sampled_from("ab<>/think\n\t %{}é\U000f0000\U000f0002"), max_size=12)
little = st.sampled_from(["a", "b", "<think>", "</think>", "\n", " ", "ab", "aa", "\n\n", "think", "n", "%"])

ASKED = "isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper"
# What a template may do to a text `t`, given a plain text `x` and another of the row's texts `o`; `w` wraps what C code joined,
# as the sandbox does.
Change = Callable[[Any, str, Any, Any], Any]
CHANGES: dict[str, Change] = {
    "strip": lambda t, x, o, w: t.strip(),
    "strip chars": lambda t, x, o, w: t.strip(x),
    "strip other": lambda t, x, o, w: t.strip(o),
    "lstrip": lambda t, x, o, w: t.lstrip(x),
    "rstrip": lambda t, x, o, w: t.rstrip(x),
    "split first": lambda t, x, o, w: t.split(x)[0],
    "split last": lambda t, x, o, w: t.split(x)[-1],
    "split once": lambda t, x, o, w: t.split(x, 1)[-1],
    "split other": lambda t, x, o, w: w("|".join(t.split(o))) if o else t,
    "split space": lambda t, x, o, w: w("|".join(t.split())),
    "rsplit": lambda t, x, o, w: t.rsplit(x, 1)[-1],
    "rsplit space": lambda t, x, o, w: w("|".join(t.rsplit(None, 1))),
    "partition": lambda t, x, o, w: t.partition(x)[2],
    "rpartition": lambda t, x, o, w: t.rpartition(x)[0],
    "lines": lambda t, x, o, w: w("+".join(t.splitlines())),
    "lines kept": lambda t, x, o, w: w("+".join(t.splitlines(True))),
    "replace": lambda t, x, o, w: t.replace(x, "Z"),
    "replace one": lambda t, x, o, w: t.replace(x, "Z", 1),
    "replace by other": lambda t, x, o, w: t.replace(x, o),
    "replace other": lambda t, x, o, w: t.replace(o, x),
    "removeprefix": lambda t, x, o, w: t.removeprefix(x),
    "removesuffix": lambda t, x, o, w: t.removesuffix(x),
    "removeprefix other": lambda t, x, o, w: t.removeprefix(o),
    "tabs": lambda t, x, o, w: t.expandtabs(3),
    "slice": lambda t, x, o, w: t[1:-1],
    "backwards": lambda t, x, o, w: t[::-1],
    "first": lambda t, x, o, w: t[0] if t else x,
    "last": lambda t, x, o, w: t[-1] if t else x,
    "second": lambda t, x, o, w: t[1] if len(t) > 1 else x,
    "add": lambda t, x, o, w: t + x,
    "add other": lambda t, x, o, w: t + o,
    "other before": lambda t, x, o, w: o + t,
    "radd": lambda t, x, o, w: x + t,
    "twice": lambda t, x, o, w: t * 2,
    "rmul": lambda t, x, o, w: 2 * t,
    "join": lambda t, x, o, w: t.join([x, o, x]),
    "joined": lambda t, x, o, w: w(x.join([t, o])),
    "letters": lambda t, x, o, w: w("-".join(t)),
    "contains": lambda t, x, o, w: t + "!" if x in t else t,
    "contains other": lambda t, x, o, w: t + "!" if o in t else t,
    "starts": lambda t, x, o, w: t if t.startswith(x) else x + t,
    "starts with some": lambda t, x, o, w: t + "s" if t.startswith((x, o)) else t,
    "ends": lambda t, x, o, w: t if t.endswith(x, 1) else t + x,
    "empty": lambda t, x, o, w: t or "nothing",
    "length": lambda t, x, o, w: t + str(len(t) % 3),
    "equal": lambda t, x, o, w: "same" if t == x else t,
    "equal other": lambda t, x, o, w: "same" if t == o else t + o,
    "unlike": lambda t, x, o, w: "other" if t != o else t,
    "order": lambda t, x, o, w: t if t < x else x + t,
    "order other": lambda t, x, o, w: t if o >= t else o,
    "most": lambda t, x, o, w: max(t, o, x),
    "sorted": lambda t, x, o, w: w(x.join(sorted([t, o, x]))),
    "count": lambda t, x, o, w: t + str(t.count(x)),
    "find": lambda t, x, o, w: t[t.find(x) :],
    "rfind other": lambda t, x, o, w: t[: t.rfind(o)],
    "index": lambda t, x, o, w: t[t.index(x) :] if x in t else t,
    "form": lambda t, x, o, w: w(f"{t}:{x}"),
    "form wide": lambda t, x, o, w: w(f"{t:>9}|"),
    "shown": lambda t, x, o, w: w(f"{t!r}"),
    "filled": lambda t, x, o, w: t.replace("%", "") % (),
    "filling": lambda t, x, o, w: "[%5s]" % t,  # noqa: UP031
    "key": lambda t, x, o, w: {"a": "A", "": "none", "ab": "AB"}.get(t, t),
    "among": lambda t, x, o, w: t + "y" if t in ["a", x, o] else t,
    "wide": lambda t, x, o, w: t.center(9, "."),
    "ljust": lambda t, x, o, w: t.ljust(9),
    "rjust": lambda t, x, o, w: t.rjust(9),
    "zeros": lambda t, x, o, w: t.zfill(6),
    "translated": lambda t, x, o, w: t.translate({97: "A"}),
    "bytes": lambda t, x, o, w: t + str(len(t.encode())),
    **{
        name: lambda t, x, o, w, name=name: getattr(t, name)()
        for name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold")
    },
    **{name: lambda t, x, o, w, name=name: t + "1" if getattr(t, name)() else t for name in ASKED.split()},
}
steps = st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), little), max_size=6)


def _run(text: Any, other: Any, done: list[tuple[str, str]], wrap: Callable[[str], Any]) -> Any:
    for name, x in done:  # a method of a plain text gets plain ones, as in the sandbox
        text = CHANGES[name](text, x, other if isinstance(text, Traced) else pinned(other), wrap)
    return text


def _traced(text: str, other: str, done: list[tuple[str, str]]) -> tuple[Trace, str]:
    trace = Trace(taken=frozenset(MARK.findall(text + other)))
    one, two = (trace.text(Leaf((k, "content"), (), t)) for k, t in enumerate((text, other)))
    return trace, str.__str__(_run(one, two, done, trace.wrap))


def test_every_method_of_a_text_is_known() -> None:
    """One that is not would look at the marks."""
    for name in dir(str):
        if callable(getattr(str, name)) and not name.startswith("_"):
            assert name in vars(Traced) or name == "maketrans", name


@settings(max_examples=800, deadline=None, derandomize=True)
@given(texts, texts, steps)
def test_a_traced_text_stands_for_the_real_one(text: str, other: str, done: list[tuple[str, str]]) -> None:
    """Whatever is done to it, putting the texts back gives what the real text gives."""
    trace, marked = _traced(text, other, done)
    assert trace.real(marked) == _run(text, other, done, str)


def _made_again(trace: Trace, marked: str, row: tuple[str, str]) -> str:
    """The rendering of another row, from what was recorded: texts that cannot be made again stay what they are."""

    def put(leaf: Leaf) -> str:
        text = row[leaf.path[0]] if leaf.path else leaf.text
        for op in leaf.ops:
            text = apply_op(text, op)
        return text

    return MARK.sub(lambda m: put(trace.leaf(m[0])), marked)


def _meets(trace: Trace, row: tuple[str, str]) -> bool:
    try:
        return all(ask(_made_again(trace, about, row), q, args) == said for about, q, args, said in trace.conditions)
    except (ValueError, IndexError):
        return False


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(texts, texts, texts, texts, steps)
def test_equal_answers_make_equal_ways(one: str, two: str, three: str, four: str, done: list[tuple[str, str]]) -> None:
    """Other texts that give the same answers become what they become by themselves, from the first ones' record."""
    trace, marked = _traced(one, two, done)
    assert _meets(trace, (one, two))
    for row in ((three, four), (one, four), (three, two), (three, one)):
        if _meets(trace, row):
            assert _made_again(trace, marked, row) == _run(*row, done, str)


def test_a_text_is_only_what_is_printed_of_it() -> None:
    trace = Trace()
    text = trace.text(Leaf((0, "content"), (), "hello"))
    assert isinstance(text, Traced)
    assert isinstance("x" + text, Traced)
    assert trace.real("x" + text + "y") == "xhelloy"
    assert trace.conditions == []
    assert "ell" in text
    assert trace.conditions == [(str.__str__(text), "contains", ("ell",), True)]


# --- in templates --------------------------------------------------------------------------------------------------------

# Ways to look into `a` and `b`, texts of the row, that templates have.
LOOKS = """
{{ a }}|{{ b }} || {{ a ~ b }} || {{ a + 'x' + b }} || {{ 'x' + a }} || {{ a * 2 }} || {{ [a, b] }} || {{ {'k': a} }}
{{ a | trim }} || {{ a | upper }} || {{ a | lower | title }} || {{ a | capitalize }} || {{ a | replace('a', 'b') }}
{{ 'abc' | replace(a, 'z') }} || {{ 'abc' | replace('b', a) }} || {{ a | replace('b', b) }} || {{ 'abca' | trim(a) }}
{{ a | indent }} || {{ a | wordcount }} || {{ a | truncate(5, true) }} || {{ a | center(9) }} || {{ a | urlencode }}
{{ a | int }} || {{ a | e }} || {{ a | striptags }} || {{ [a, b] | pprint }} || {{ a | string }} || {{ a | wordwrap(3) }}
{{ a | default('d', true) }} || {{ [a, b] | join(', ') }} || {{ ['x', 'y'] | join(a) }} || {{ a | join('-') }}
{{ a | list | length }} || {{ a | length }} || {{ [a, b] | sort | join(' ') }} || {{ [a, b, a] | unique | join('/') }}
{{ [a, b] | max }} || {{ a | first }} || {{ a | last }} || {{ a | reverse }} || {{ [a, b] | map('upper') | join }}
{{ [a, b] | select('equalto', 'a') | list | length }} || {{ a | batch(2) | list }} || {{ a | tojson }}
{{ {'k': [a, 1]} | tojson(indent=2) }} || {{ a | tojson(ensure_ascii=true) }} || {{ (a ~ b) | tojson }} || {{ '%s!' % a }}
{{ '%3s' % a }} || {{ '%s-%s' % (a, b) }} || {{ '%s' | format(a) }} || {{ '{}:{}'.format(a, b) }} || {{ '{:>5}'.format(a) }}
{{ 1 if 'b' in '%s' % a else 2 }} || {{ 1 if 'b' in 'x{}'.format(a) else 2 }} || {{ 1 if a in 'abc' else 2 }}
{{ 1 if a not in b else 2 }} || {{ 1 if a in ['a', 'b'] else 2 }} || {{ 1 if a in {'a': 1} else 2 }} || {{ {'a': 'A'}[a] }}
{{ 1 if a == b else 2 }} || {{ 1 if a > b else 2 }} || {{ 1 if a is string and a is lower else 2 }}
{{ 1 if a is in 'abc' else 2 }} || {{ 1 if a is eq 'a' else 2 }} || {{ 1 if a is escaped else 2 }} || {{ a[0] }}
{{ a[1:3] }} || {{ a[-1] }} || {{ a.split('a')[0] }} || {{ a.split('a') | last }} || {{ ('x,' ~ a ~ ',y').split(',')[1] }}
{{ a.nothing }} || {{ 1 if (a ~ b).upper() == 'AB' else 2 }} || {{ 1 if ('<' ~ a ~ '>').strip('<').startswith('a') else 2 }}
{{ a.trace is defined }} || {{ a.mark }} || {{ ('<b>' | safe) + a }} || {{ ('<b>' | safe) ~ a }} || {{ ('%s' | safe) % a }}
{{ ('-' | safe).join([a, b]) }} || {{ (a | e) + '<' }} || {{ 'ab'.replace('a', a) }} || {{ 'ab'.find(a) }}
{{ 'ab'.startswith(a) }} || {{ ('ab' | safe).startswith(a) }} || {{ 'x'.join([a, b]) }}
{% macro m(t) %} {{ t }} {% endmacro %}{{ m(a) | trim }} || {% set s %}<{{ a }}>{% endset %}{{ 1 if 'b' in s else 2 }}
{% filter upper %}{{ a }}{% endfilter %}
{% set ns = namespace(t='') %}{% for c in a %}{% set ns.t = c ~ ns.t %}{% endfor %}{{ ns.t }}
{% for p in a.split() %}({{ loop.index }}{{ p }}){% endfor %}
"""
LOST = ["{{ (a | e) + '<' }}"]  # escaped text escapes what is added to it
ENVIRONMENT = sandbox.build_environment()
COMPILED = {
    look.strip(): ENVIRONMENT.from_string("{% set a = messages[0].content %}{% set b = messages[1].content %}" + look)
    for line in LOOKS.strip().splitlines()
    for look in line.split(" || ")
}
pairs = st.tuples(texts, texts)


def _job(row: tuple[str, str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": t} for t in row]
    given = {"messages": messages, "tools": None, "settings": {}, "special": {}, "generation": False, "size": 9}
    return {**given, "date": "2025-01-01"}


@pytest.mark.parametrize("look", COMPILED)
def test_what_a_template_does_is_followed(look: str) -> None:
    """Either it cannot be followed and says so, or another row that meets the conditions gets its own rendering."""
    followed = 0

    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(pairs, st.lists(pairs, min_size=1, max_size=6))
    def check(row: tuple[str, str], others: list[tuple[str, str]]) -> None:
        nonlocal followed
        try:
            answer = sandbox.run(COMPILED[look], _job(row))
        except (jinja2.TemplateError, TypeError, ValueError):
            return
        if "lost" in answer:
            return
        followed += 1
        trace = Trace(conditions=answer["conditions"])
        trace.leaves = [Leaf((), (), chr(0xF0000 + k)) for k in range(max(answer["leaves"], default=-1) + 1)]
        for k, (path, ops, text) in answer["leaves"].items():
            trace.leaves[k] = Leaf(tuple(path), tuple(ops), text)
        for other in (row, *others, ("a", "b"), ("", ""), (row[0], others[0][1])):
            if _meets(trace, other):
                sandbox._TRACE = Trace(marking=False)
                said = sandbox.render(COMPILED[look], {"messages": _job(other)["messages"]}, 10**6)
                assert _made_again(trace, answer["marked"], other) == said

    check()
    assert followed or look in LOST
