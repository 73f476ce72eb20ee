"""The process that templates run in: it ends when it must, is started again, keeps little, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from educe.chat.sandbox import MAX_REASON_CHARACTERS
from educe.chat.template import TemplateRefusal, compile_template
from educe.chat.worker import MAX_MEMORY_BYTES, WORKER
from educe.errors import ChatError
from educe.types import Message

from chat_proof import talk

TALK = talk("u:the cat", "a:sat")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory, files and processes are Linux's")

# (template, the codes it may end in; "" where it may as well render)
DEEP = {"E-CHAT-102", "E-CHAT-103"}
GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = ns.x OP %}{% endfor %}"
NEST = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}"
LOOP = "{% for i in range(99999) %}BODY{% endfor %}"


def grown(start: str, step: str) -> str:
    return GROW.replace("START", start).replace("OP", step)


HOSTILE = {
    "a power": ("{{ 10 ** (10 ** 8) }}", {"E-CHAT-103"}),
    "powers in a row": (grown("3", "* ns.x"), {"E-CHAT-103"}),
    "doubling in place": ("{% set x = 'a' %}{% for i in range(99) %}{% set x = x ~ x %}{% endfor %}{{ x }}", {""}),
    "doubling": (grown("'ab'", "~ ns.x"), {"E-CHAT-103"}),
    "doubling a text": (grown("messages[0].content", "* 2"), {"E-CHAT-103"}),
    "doubling a list": (grown("[1]", "+ ns.x"), {"E-CHAT-103"}),
    "a list of lists": ("{{ ([[0] * 99999] * 99999) | string | length }}", {"E-CHAT-103"}),
    "padding": ("{{ '%2000000000d' % 1 }}", {"E-CHAT-103"}),
    "padding by format": ("{{ '{:2000000000}'.format(1) }}", {"E-CHAT-103"}),
    "centered": ("{{ 'a' | center(2000000000) }}", {"E-CHAT-103"}),
    "indented": ("{{ ('a\\n' * 60000) | indent(60000) }}", {"E-CHAT-103"}),
    "replacing": ("{% set a = 'a' * 30000 %}{{ a | replace('a', a) }}", {"E-CHAT-103"}),
    "joining": ("{% set a = 'a' * 60000 %}{{ (a | list) | join(a) }}", {"E-CHAT-103"}),
    "looking for long": ("{% set a = 'a' * 1500000 %}" + LOOP.replace("BODY", "{{ (a ~ 'b') in a }}"), {"E-CHAT-103"}),
    "striptags": ("{{ ('<' * 300000) | striptags }}", {"", "E-CHAT-103"}),
    "urlize": ("{{ ('http://' * 100000) | urlize }}", {"", "E-CHAT-103"}),
    "wordwrap": ("{{ ('a ' * 500000) | wordwrap(1) | length }}", {"", "E-CHAT-103"}),
    "recursive loop": ("{% for m in [messages] recursive %}{{ loop([messages]) }}{% endfor %}", DEEP),
    "two macros": ("{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}", DEEP),
    "two macros that double": ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else 'x' }}{% endmacro %}{{ f(60) }}", {"E-CHAT-103"}),
    "lists in lists": (NEST + "{{ ns.x }}", {"E-CHAT-102", "E-CHAT-103"}),
    "JSON in JSON": (NEST + "{{ ns.x | tojson }}", {"E-CHAT-102", "E-CHAT-103"}),
    "a namespace in itself": ("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns | tojson }}", {"E-CHAT-102"}),
    "a namespace in a list": ("{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a | pprint | length }}", {""}),
    "pretty": ("{{ messages | pprint }}{{ messages }}", {""}),
    "a huge number": ("{{ 7 ** 9999 }}", {"E-CHAT-101", "E-CHAT-102"}),
    "a number as long as it may be": ("{{ 7 ** 5000 }}", {""}),
    "raises in every branch": ("{% if messages %}{{ raise_exception('no') }}{% endif %}{{ raise_exception('no') }}", {"E-CHAT-102"}),
    "raises at length": ("{{ raise_exception('A' * 10000000) }}", {"E-CHAT-102"}),
    "NUL": ("a\0b{{ messages[0].content }}", {""}),
    "every character": ("{% for c in messages[0].content * 20000 %}{% if c == 'x' %}{% endif %}{% endfor %}", {"", "E-CHAT-103"}),
    "asks without end": (LOOP.replace("BODY", "{{ '' if messages[0].content[i:] else '' }}"), {"", "E-CHAT-103"}),
    "a lone surrogate in a name": ("{{ messages['\\ud800'] }}{{ '\\ud800' | length }}", {"", "E-CHAT-101", "E-CHAT-102"}),
    "a function of the process": ("{{ cycler.__init__.__globals__ }}", {"E-CHAT-102"}),
    "the context": ("{{ self.__class__.__mro__ }}", {"E-CHAT-102"}),
    "lipsum": ("{{ lipsum.__globals__['os'].popen('id').read() }}", {"E-CHAT-102"}),
    "joiner": ("{{ joiner.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}", {"E-CHAT-102"}),
    "code of a macro": ("{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}", {"E-CHAT-102"}),
    "format of a text": ("{{ '{0.__class__.__mro__}'.format(messages) }}", {"E-CHAT-102"}),
    "format_map": ("{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}", {"E-CHAT-102"}),
    "format by attribute": ("{{ ('{0.__class__}' | attr('format'))(messages) }}", {"", "E-CHAT-102"}),
    "format by map": ("{{ ['{0.__class__}'] | map('format', messages) | list }}", {"", "E-CHAT-102"}),
    "trace of a text": ("{{ messages[0].content._trace }}{{ messages[0].content.trace.leaves }}", {"E-CHAT-102"}),
}  # fmt: skip


def _outcome(source: str, messages: tuple[Message, ...]) -> tuple[str, str]:
    """A code and why, or no code and the text."""
    try:
        return "", compile_template(source, {}).render(messages, generation=True).text
    except TemplateRefusal as e:
        return e.args[0], e.args[1]
    except ChatError as e:
        return e.code, str(e)


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_a_template_does_takes_long_or_much(what: str) -> None:
    """Measured from a process that is running: two seconds, on a machine that others use too."""
    source, codes = HOSTILE[what]
    compile_template("x", {})
    began = time.monotonic()
    code, text = _outcome(source, TALK)
    assert time.monotonic() - began < 10  # 2 s by the limits, and a new process, on a machine that others use too
    assert code in codes
    assert len(text) < (MAX_REASON_CHARACTERS + 200 if code else 200_000)
    assert code or not any(word in text for word in ("<module", "<class", "builtins"))
    process = WORKER._process
    if process is not None:  # it goes on; or it was ended, and the next request starts another
        assert psutil.Process(process.pid).memory_info().rss < MAX_MEMORY_BYTES
    assert compile_template("ok {{ messages[0].content }}", {}).render(TALK, generation=True).text == "ok the cat"


def test_a_text_that_a_template_formats_shows_nothing_of_the_process() -> None:
    """A row's own text as a form: `{0.__globals__}` in data."""
    for text in ("{0.__globals__}", "{0.__class__}", "{0._trace}", "{0}", "{}"):
        code, said = _outcome("{{ messages[0].content.format(raise_exception) }}", talk(f"u:{text}"))
        assert code in ("", "E-CHAT-102", "E-CHAT-307")
        assert code or not any(word in said for word in ("builtins", "<class", "Trace("))


@linux
def test_the_process_gives_up_what_it_never_needs(tmp_path: Path) -> None:
    code = (
        "import os, sys, educe.chat.sandbox as s\ns.confine(600 * 2**20)\n"
        "def tried(f):\n"
        "    try:\n        f()\n    except (OSError, MemoryError) as e:\n        print(type(e).__name__)\n"
        f"def write():\n    with open({str(tmp_path / 'x')!r}, 'w') as f:\n        f.write('x' * 99999)\n"
        "tried(write)\ntried(lambda: bytearray(2**30))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["OSError", "MemoryError"], done.stderr
    assert (tmp_path / "x").stat().st_size == 0


def test_a_request_whose_process_is_killed_is_refused_and_the_next_is_served() -> None:
    slow = compile_template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})
    process = WORKER._process
    assert process is not None
    threading.Timer(0.3, process.kill).start()
    began = time.monotonic()
    with pytest.raises(TemplateRefusal, match="it ended the process"):
        slow.render(TALK, generation=True)
    assert time.monotonic() - began < 1.5
    assert compile_template("{{ 1 + 1 }}", {}).render(TALK, generation=True).text == "2"


def test_a_process_that_says_something_else_is_not_believed() -> None:
    template = compile_template("{{ 2 + 2 }}", {})
    process = WORKER._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.write("no JSON\n")  # it ends with an error
    process.stdin.flush()
    time.sleep(0.3)
    assert template.render(TALK, generation=True).text == "4"


# --- processes and threads -----------------------------------------------------------------------------------------------


def _render_in_child(number: int, queue: multiprocessing.Queue[tuple[int, int, str]]) -> None:
    text = compile_template("{{ messages[0].content }}", {}).render(talk(f"u:{number}"), generation=True).text
    assert WORKER._process is not None
    queue.put((number, WORKER._process.pid, text))


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_has_a_process_of_its_own_even_while_a_thread_renders() -> None:
    """The lock that a thread of the parent holds at that moment is not held in the child."""
    fork = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[int, int, str]] = fork.Queue()  # type: ignore[assignment]
    slow = compile_template("{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}x", {})
    assert WORKER._process is not None
    mine = WORKER._process.pid
    ended: list[str] = []

    def render() -> None:
        try:
            ended.append(slow.render(TALK, generation=True).text)
        except TemplateRefusal as e:
            ended.append(e.args[0])

    thread = threading.Thread(target=render)
    thread.start()
    time.sleep(0.1)
    children = [fork.Process(target=_render_in_child, args=(k, queue)) for k in range(2)]
    for c in children:
        c.start()
    said = [queue.get(timeout=30) for _ in children]
    for c in children:
        c.join(30)
        assert c.exitcode == 0
    thread.join(30)
    assert ended in (["x"], ["E-CHAT-103"])
    assert sorted((k, text) for k, _, text in said) == [(0, "0"), (1, "1")]
    assert len({mine, *(pid for _, pid, _ in said)}) == 3
    assert compile_template("{{ 3 }}", {}).render(TALK, generation=True).text == "3"
    for _, pid, _ in said:
        _assert_gone(pid)


def _assert_gone(pid: int) -> None:
    for _ in range(300):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError("a process was left behind")


@linux
@pytest.mark.parametrize("how", ["exit", "kill", "interrupt", "kill, a forked child lives on", "kill, at work"])
def test_no_process_is_left_behind(how: str) -> None:
    """Also by a parent that can say nothing, whose child holds copies of its pipes, or that waits for an answer."""
    after = {
        "exit": "",
        "kill, a forked child lives on": "import os\nif os.fork() == 0: os.close(1)\ntime.sleep(20)",
        "kill, at work": "t = compile_template('{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}', {})\n"
        "t.render((Message(role='user', content='x'),), generation=True)",
    }.get(how, "time.sleep(60)")
    code = (
        "import time\nfrom educe.chat.worker import WORKER\nfrom educe.chat.template import compile_template\n"
        f"from educe.types import Message\ncompile_template('x', {{}})\nprint(WORKER._process.pid, flush=True)\n{after}\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    if how != "exit":
        parent.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    parent.wait(30)
    try:
        _assert_gone(pid)
    finally:
        if how == "kill, a forked child lives on":
            os.killpg(parent.pid, signal.SIGKILL)
