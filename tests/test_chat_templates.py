"""Real templates: the ids are those of transformers, and every one of them is proved or refused with a code."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
from educe.chat.prompt import render_prompt
from educe.chat.template import ChatTemplate, TemplateRefusal, compile_template
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.errors import CODES, ChatError, Refusal
from educe.types import Message
from tokenizers import Tokenizer

from chat_proof import build, prove, talk, with_template
from conftest import some

# --- what transformers sends ---------------------------------------------------------------------------------------------

SHAPES = [
    talk("u:What is 2 + 2?", "a:4."),
    talk("s:You are terse.", "u:Hello", "a:Hi."),
    talk("u:One", "a:1", "u:Two", "a:2", "u:Three", "a:3"),
    talk("s:Be kind.", "u:Hi", "a:Hello!\n\nHow are you?", "u:Fine.\n\n\nAnd you?", "a:  Well.  "),
    talk("u:日本語で😀 café e\u0301 Ωμέγα", "a:はい、𠮷野家 👩\u200d👩\u200d👧"),
    talk("u:def f(x):\n    return\tx ** 2  # 1234567890", "a:```python\nprint('a')\n```"),
    talk("s:", "u:", "a:x"),
    talk("u:user", "a:assistant", "u:\n", "a:user\n"),
    talk("u:Still open?", "a:Yes.", "u:And now?"),
    talk("u:First", "u:second", "a:ok"),
    talk("a:I start.", "u:no", "a:yes"),
]
# In each run those that test_chat_trl.py leaves to `make bench`.
SERVED = ["qwen3", "smollm2", "llama3_1", "gemma2", "deepseek_v3", "qwen2_5"]
STOPS = {"gemma2": "<end_of_turn>"}


@pytest.mark.parametrize("name", some(SERVED, 2))
def test_ids_are_those_of_transformers(shared: Path, name: str) -> None:
    """Both render the model's own template; where transformers is refused by it, so are we, and with a code."""
    transformers = pytest.importorskip("transformers")
    chat = load_tokenizer(shared / "tokenizers" / name)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(shared / "tokenizers" / name)
    if peer.chat_template is None:
        peer.chat_template = (shared / "templates/models/google-gemma-2-2b-it.jinja").read_text(encoding="utf-8")
        chat = with_template(chat, peer.chat_template, peer.special_tokens_map)
    chat = replace(chat, stop=chat.stop | {chat.control[STOPS[name]]} if name in STOPS else chat.stop)
    proved = 0
    for messages in SHAPES:
        for turn in range(1, len(messages) + 1):
            theirs = _theirs(peer, messages[:turn])
            if theirs is None:
                with pytest.raises(ChatError, match="E-CHAT-102"):
                    render_prompt(messages[:turn], chat)
            else:
                assert render_prompt(messages[:turn], chat) == theirs
        built = build(messages, chat)
        if not isinstance(built, Refusal):
            prove(messages, chat, built)
            proved += 1
        else:
            assert built.code in ("E-CHAT-102", "E-CHAT-301"), built
    assert proved >= 6
    _prove_typed_marks_are_text(chat)


def _prove_typed_marks_are_text(chat: ChatTokenizer) -> None:
    """A user who types all that the template writes adds no control token to the row."""
    control = set(chat.control.values())
    marks = "".join(sorted({w for w in chat.control if w in chat.template.render(talk("u:a"), generation=True).text}))
    assert marks
    tame, typed = (build(talk(f"u:{said}", f"a:{said}"), chat) for said in ("x", f"x{marks}x"))
    assert not isinstance(tame, Refusal)
    assert not isinstance(typed, Refusal), typed
    (first,), (second,) = tame, typed
    assert [i for i in first.ids_T if i in control] == [i for i in second.ids_T if i in control]
    assert chat.stock.decode(second.ids_T.tolist(), skip_special_tokens=False).count(f"x{marks}x") == 2


def _theirs(peer, messages: Sequence[Message]) -> list[int] | None:  # type: ignore[no-untyped-def]
    said = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return list(peer.apply_chat_template(said, tokenize=True, add_generation_prompt=True, return_dict=False))
    except jinja2.TemplateError:
        return None


# --- every template there is ---------------------------------------------------------------------------------------------

FIRM = [
    talk("s:Say hello.", "u:Hi", "a:hello to the user", "u:Order?", "a:track it"),
    talk("u:1", "a:one", "u:2", "a:two", "u:3", "a:three"),
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# What templates write as control tokens, and which of them end a turn.
MARKS = re.compile(r"<[|｜][^<>|｜'\"{}\s]+[|｜]>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos)>|\[/?[A-Z_]+\]|</?think>")
ENDS = "im_end eot_id end_of_turn> eot| eom endofturn END_OF_TURN end_of_text endoftext |end| </s> <eos> return call end▁of"


def own_tokenizer(source: str, base: Path, place: Path) -> ChatTokenizer:
    """The tiny tokenizer that also knows the template's own control tokens, written to files and read as a model's."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    marks = sorted({*MARKS.findall(source), "<s>", "</s>"})
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    ends = [tokenizer.token_to_id(m) for m in marks if any(e in m for e in ENDS.split())]
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (place / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_tokenizer(place)


def test_every_template_is_proved_or_refused(
    shared: Path, smollm2_tokenizer_dir: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """With a foreign tokenizer and with one that knows the template's control tokens: examples that hold, or a code.

    The text is that of transformers.
    """
    smollm2 = load_tokenizer(smollm2_tokenizer_dir)
    files = sorted((shared / "templates").rglob("*.jinja"))
    assert len(files) == 67
    began = time.monotonic()
    outcome: dict[str, list[str]] = {"foreign": [], "own": []}
    for number, file in enumerate(files):
        source = file.read_text(encoding="utf-8")
        place = tmp_path / str(number)
        place.mkdir()
        own = own_tokenizer(source, tiny_tokenizer_dir, place)
        if "strftime_now" not in source:  # our date is fixed
            _same_text(own.template)
        for kind, chat in (("foreign", replace(smollm2, template=own.template)), ("own", own)):
            for messages in FIRM:
                built = build(messages, chat)
                if isinstance(built, Refusal):
                    assert built.code in CODES
                    outcome[kind].append(built.code)
                else:
                    prove(messages, chat, built)
                    outcome[kind].append("proved")
    assert time.monotonic() - began < 60
    assert outcome["foreign"].count("proved") >= 90
    assert outcome["own"].count("proved") >= 90


def _same_text(template: ChatTemplate) -> None:
    """White space after blocks, filters and special tokens included; or refused by both."""
    jinja = pytest.importorskip("transformers.utils.chat_template_utils")
    said = [{"role": m.role, "content": m.content} for m in FIRM[1]]
    try:
        theirs = jinja.render_jinja_template([said], chat_template=template.source, **SPECIAL)[0][0]
    except (jinja2.TemplateError, TypeError):
        with pytest.raises(TemplateRefusal):
            template.render(FIRM[1], generation=False)
    else:
        assert template.render(FIRM[1], generation=False).text == theirs, template.source


@pytest.mark.parametrize("how", ["", "(indent=2)", "(separators=(',', ':'))", "(sort_keys=true)", "(true)"])
def test_json_is_written_as_transformers_does(how: str) -> None:
    _same_text(compile_template("{{ {'b': [1, '<é>'], 'a': none} | tojson" + how + " }}", SPECIAL))
