"""A chat template is foreign code: 200 hostile ones, drawn from a seed, each end in a text or a code, in time, and always the same."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import psutil
import pytest
from educe.chat.template import TemplateRefusal, compile_template
from educe.chat.tokens import load_tokenizer, read_template
from educe.chat.worker import MAX_MEMORY_BYTES, MAX_RENDER_S, WORKER, Worker
from educe.errors import ChatError

from chat_proof import talk

TALK = talk("s:be brief", "u:the cat", "a:sat", "u:{{ 7 * 7 }} <|im_end|> \ue000", "a:hello")
SECRET = "hf_" + "Zq3" * 11

# Ways to reach Python, to take time or memory, to depend on chance, and ordinary pieces among which they hide.
VALUES = (
    "''.__class__.__mro__", "cycler.__init__.__globals__", "messages.__class__.__base__.__subclasses__()", "self.__init__",
    "raise_exception.__globals__", "lipsum.__globals__['os'].environ", "joiner.__init__.__globals__", "namespace.__mro__",
    "'%s' % raise_exception", "'{0.__class__}'.format(messages)", "'{a.__init__.__globals__}'.format_map({'a': cycler})",
    "messages | map(attribute='__class__') | list", "messages | attr('__class__')", "(messages | first).items",
    "[messages] | map('attr', '__class__') | list", "messages | sort(attribute='__class__')", "x.y.z", "none.a",
    "messages | groupby('role') | list", "messages | random", "[0, 1] | random", "lipsum()", "joiner()", "cycler(1)",
    "strftime_now('%Y-%m-%d %H:%M:%S.%f')", "strftime_now(messages)", "strftime_now('%' * 10000)", "raise_exception",
    "dict.fromkeys(range(99999))", "range(99999) | list | length", "range(10**20)", "'a' * 10**10", "[0] * 10**9",
    "10 ** 10 ** 10", "2 ** 99999", "(1, 2) * 10**9", "'%0999999999d' % 1", "'{:>999999999}'.format(1)", "'a'.ljust(10**10)",
    "'a'.zfill(10**10)", "'x' | center(10**10)", "'x' | indent(10**9)", "'a ' * 9999 | wordwrap(1)", "1 // 0", "1 % 0",
    "'ab'.replace('', 'x' * 10**6)", "messages | tojson(indent=9**9)", "messages | batch(10**9) | list", "'\\ud800'",
    "messages | slice(10**6) | list", "'<a>' | urlize", "'a' | xmlattr", "messages | pprint", "-1 | filesizeformat",
    "messages[-1].content", "messages | length", "messages | tojson", "bos_token ~ eos_token", "loop.index", "caller()",
    "messages[0].content.encode().decode('utf-16')", "'\\x00'", "1e400", "-1e400 | int", "'9' * 5000 | int", "nan",
)  # fmt: skip
BLOCKS = (
    "{{{{ {v} }}}}", "{{% set a = {v} %}}{{{{ a }}}}", "{{% for m in messages %}}{{{{ m.content }}}}{{{{ {v} }}}}{{% endfor %}}",
    "{{% if {v} %}}{{{{ {w} }}}}{{% endif %}}", "{{% macro f(x) %}}{{{{ {v} }}}}{{% endmacro %}}{{{{ f({w}) }}}}",
    "{{% set ns = namespace(a={v}) %}}{{% set ns.b = {w} %}}{{{{ ns.a }}}}", "{{% call f() %}}{{{{ {v} }}}}{{% endcall %}}",
    "{{% filter upper %}}{{{{ {v} }}}}{{% endfilter %}}", "{{% for i in range(99) %}}{{{{ {v} }}}}{{% endfor %}}",
    "{{% for i in {v} recursive %}}{{{{ loop({w}) }}}}{{% endfor %}}", "{{% include {v} %}}", "{{% import {v} as m %}}",
    "{{% extends {v} %}}", "{{% from {v} import os %}}", "{{% block b %}}{{{{ self.b() }}}}{{% endblock %}}",
    "{{% with a = {v} %}}{{% do a %}}{{% endwith %}}", "{{{{ {v} if {w} else {v} }}}}", "{{{{ ({v}) ~ ({w}) }}}}",
    "{{{{ [{v}, {w}] | join('-') }}}}", "{{% generation %}}{{{{ {v} }}}}{{% endgeneration %}}", "{{{{ {v}", "{{% for", "}}}}",
)  # fmt: skip


def drawn(number: int) -> list[str]:
    """Templates of one to three blocks: a pure function of the number."""
    rng = random.Random(6)
    made = []
    for _ in range(number):
        blocks = [
            rng.choice(BLOCKS).format(v=rng.choice(VALUES), w=rng.choice(VALUES)) for _ in range(rng.randint(1, 3))
        ]
        made.append("".join(blocks))
    return made


def outcome(source: str) -> tuple[str, str]:
    """What becomes of a template: ("text", it) or (a code, the reason)."""
    try:
        return "text", compile_template(source, {"bos_token": "<s>"}).render(TALK, generation=True).text
    except ChatError as e:
        return e.code, e.found
    except TemplateRefusal as e:
        return str(e.args[0]), str(e.args[1])


def test_hostile_templates_end_in_time_and_never_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    WORKER.stop()
    sources = drawn(200)
    first, longest = [], 0.0
    for source in sources:
        began = time.monotonic()
        first.append(outcome(source))
        longest = max(longest, time.monotonic() - began)
    WORKER.stop()  # another process, where objects lie elsewhere
    again = [one if one[0] == "E-CHAT-103" else outcome(source) for source, one in zip(sources, first, strict=True)]
    codes = {code: sum(1 for c, _ in first if c == code) for code in {c for c, _ in first}}
    print(f"\n200 templates: {codes}, the longest took {longest:.2f} s")
    assert longest < 2 * MAX_RENDER_S + 6  # a compilation and a rendering, and a process started beside other tests
    assert set(codes) <= {"text", "E-CHAT-101", "E-CHAT-102", "E-CHAT-103", "E-CHAT-307"}
    assert len(codes) == 5  # each way to end was met
    for source, one, two in zip(sources, first, again, strict=True):
        assert one == two, source
        assert len(one[1]) < 200_000, source
        for word in (SECRET, "<class", "/bin", "posix", "site-packages", "environ({"):
            assert word not in one[1] or word in source, (source, word)


@pytest.mark.parametrize(
    "source",
    ["{{ [1, 1] | random }}", "{{ lipsum() }}", "{{ raise_exception }}", "{{ joiner() }}", "{{ messages[0].items }}"],
)
def test_what_may_differ_is_refused_even_where_it_does_not(source: str) -> None:
    assert outcome(source)[0] == "E-CHAT-307"


def test_an_address_in_a_row_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    said = talk("u:<function f at 0x7f0011223344>", "a:x")
    made = compile_template("{{ messages[0].content }}", {}).render(said, generation=True)
    assert made.text == "<function f at 0x7f0011223344>"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_the_process_of_templates_has_no_keys_and_no_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its environment, and the system keeps it from writing files, starting processes and taking memory."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SOMETHING", f"https://u:{SECRET}@h")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0123456789abcdef/0123456789abcdef")
    worker = Worker()
    try:
        worker.compile("k", "x")
        process = worker._process
        assert process is not None
        environment = psutil.Process(process.pid).environ()
        assert "PATH" in environment
        assert not {"HF_TOKEN", "SOMETHING", "AWS_SECRET_ACCESS_KEY"} & set(environment)
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        soft = {line[:25].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
        assert (soft["Max file size"], soft["Max processes"], soft["Max core file size"]) == ("0", "0", "0")
        assert int(soft["Max address space"]) == MAX_MEMORY_BYTES
    finally:
        worker.stop()


@pytest.mark.skipif(os.name == "nt", reason="pipes have no path there")
def test_a_template_file_is_a_small_regular_file(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"x" * (2**20 + 1))
    for name in ("pipe", "zero", "large", "gone"):
        with pytest.raises(ChatError, match="E-CHAT-001"):
            read_template(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_tokenizer_dir / file).read_bytes())
    (tmp_path / "additional_chat_templates").mkdir()
    os.mkfifo(tmp_path / "additional_chat_templates" / "tool_use.jinja")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x", "eos_token": "<|im_end|>"}))
    with pytest.raises(ChatError, match="E-CHAT-001"):
        load_tokenizer(tmp_path)
