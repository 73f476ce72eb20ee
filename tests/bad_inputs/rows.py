"""Bad rows, made by code: numbers are those of the list of bad inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from check_command import GOOD, row


def _messages(*turns: Any) -> str:
    return json.dumps({"messages": list(turns)})


ASK, TELL = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def _beside(**more: Any) -> str:
    return json.dumps({"messages": [ASK, TELL], **more})


# item: the row, its code, the column that is told (0: none), words of the message
BAD_ROWS: dict[str, tuple[str | bytes, str, int, str]] = {
    "10 Latin-1 byte": (row("caf?", "b").encode().replace(b"?", b"\xe9"), "E-DATA-101", 47, "0xe9"),
    "33 surrogate as bytes": (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', "E-DATA-101", 13, "0xed"),
    "11 NUL": ('{"prompt": "\\u0000", "completion": "b"}', "E-DATA-104", 0, "NUL"),
    "11 raw NUL": (b'{"prompt": "\0", "completion": "b"}', "E-DATA-102", 13, "not JSON"),
    "14 cut short": (GOOD[0][:-9], "E-DATA-102", 90, "not JSON"),
    "25 two objects": (GOOD[0] + GOOD[1], "E-DATA-102", 100, "one JSON object per line"),
    "26 comment": ("// the cat", "E-DATA-102", 1, "comments"),
    "26 trailing comma": (GOOD[0][:-1] + ",}", "E-DATA-102", 100, "commas"),
    "29 duplicate key": (
        '{"prompt": "a", "prompt": "b", "completion": "c"}',
        "E-DATA-103",
        0,
        "'prompt' appears twice",
    ),
    "30 NaN": ('{"prompt": "a", "completion": NaN}', "E-DATA-104", 0, "NaN"),
    "30 Infinity": ('{"prompt": "a", "completion": -Infinity}', "E-DATA-104", 0, "-Infinity"),
    "30 1e999": ('{"prompt": "a", "completion": 1e999}', "E-DATA-104", 0, "1e999"),
    "31 5000 digits": ('{"prompt": "a", "completion": ' + "9" * 5000 + "}", "E-DATA-104", 0, "5000 digits"),
    "32 depth": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "E-DATA-102", 0, "deeper"),
    "32 depth, unclosed": ('{"a": ' * 100_000, "E-DATA-102", 0, "deeper"),
    "33 lone surrogate": ('{"prompt": "\\ud800", "completion": "b"}', "E-DATA-104", 0, "surrogate"),
    "33 in a key": ('{"\\udfff": "a"}', "E-DATA-104", 0, "surrogate"),
    "34 number": ("42", "E-DATA-105", 0, "not an object"),
    "34 null": ("null", "E-DATA-105", 0, "not an object"),
    "34 list": ("[1]", "E-DATA-105", 0, "not an object"),
    "38 messages missing": ('{"massages": []}', "E-DATA-106", 0, "'massages'"),
    "38 messages null": ('{"messages": null}', "E-DATA-141", 0, "null"),
    "38 messages a string": ('{"messages": "hi"}', "E-DATA-141", 0, "str"),
    "38 messages empty": ('{"messages": []}', "E-DATA-141", 0, "no messages"),
    "39 message a string": (_messages(ASK, "hi"), "E-DATA-141", 0, "messages[1]"),
    "40 unknown role": (_messages(ASK, {"role": "asistant", "content": "b"}), "E-DATA-142", 0, 'mean "assistant"?'),
    "40 no role": (_messages({"content": "a"}, TELL), "E-DATA-142", 0, "messages[0].role"),
    "40 role a list": (_messages({"role": ["user"], "content": "a"}, TELL), "E-DATA-142", 0, "messages[0].role"),
    "40 ShareGPT role a list": ('{"conversations": [{"from": [], "value": "a"}]}', "E-DATA-142", 0, "messages[0].role"),
    "41 role in capitals": (_messages({"role": "User", "content": "a"}, TELL), "E-DATA-142", 0, 'mean "user"?'),
    "42 content null": (_messages({"role": "user", "content": None}, TELL), "E-DATA-143", 0, "messages[0].content"),
    "43 content a number": (_messages(ASK, {"role": "assistant", "content": 4}), "E-DATA-143", 0, "not text"),
    "43 content in parts": (
        _messages({"role": "user", "content": [{"type": "text"}]}, TELL),
        "E-DATA-143",
        0,
        "content[0].text is missing",
    ),
    "44 blank answer": (_messages(ASK, {"role": "assistant", "content": " \n"}), "E-DATA-144", 0, "messages[1]"),
    "44 a thought without an answer": (row("a", "<think>\nhm\n</think>\n"), "E-DATA-144", 0, "messages[1]"),
    "45 no answer": (_messages(ASK), "E-DATA-145", 0, "no assistant"),
    "47 starts with the assistant": (_messages(TELL, ASK), "E-CHAT-310", 0, "no assistant turn"),
    "48 tool calls": (_messages(ASK, {**TELL, "tool_calls": [{}]}), "E-DATA-147", 0, "tool_calls[0]"),
    "51 weight a string": (_messages(ASK, {**TELL, "weight": "1"}), "E-DATA-148", 0, "messages[1].weight"),
    "53 an image": (
        _messages({"role": "user", "content": [{"type": "image_url"}]}, TELL),
        "E-DATA-146",
        0,
        "'image_url'",
    ),
    "37 a field of another type": (
        _messages(ASK, {"role": "assistant", "content": ["b", 3]}),
        "E-DATA-143",
        0,
        "messages[1].content[1] is a number",
    ),
    "42 content missing": (_messages(ASK, {"role": "assistant"}), "E-DATA-143", 0, "messages[1].content is missing"),
    "43 content a boolean": (_messages(ASK, {"role": "assistant", "content": True}), "E-DATA-143", 0, "not text"),
    "48 arguments that are no JSON": (
        _messages(ASK, {**TELL, "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}),
        "E-DATA-147",
        0,
        "arguments",
    ),
    "51 train a number": (_messages(ASK, {**TELL, "train": 3}), "E-DATA-148", 0, "messages[1].train"),
    "51 weight of a row a string": (_beside(weight="high"), "E-DATA-148", 0, "the row.weight"),
    "51 weight of a part": (
        _messages(ASK, {"role": "assistant", "content": [{"type": "text", "text": "b", "weight": 2}]}),
        "E-DATA-148",
        0,
        "has a weight",
    ),
    "53 images beside the turns": (_beside(images=["a.png"]), "E-DATA-146", 0, "images"),
    "53 audio of a turn": (_messages({**ASK, "audio": "a.wav"}, TELL), "E-DATA-146", 0, "audio"),
    "documents beside the turns": (_beside(documents=[{"text": "x"}]), "E-DATA-146", 0, "documents"),
    "variables of the template": (_beside(chat_template_kwargs={"a": 1}), "E-DATA-146", 0, "template.settings"),
    "a preference pair": ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "E-DATA-150", 0, "preference pair"),
    "a text of nothing": ('{"text": " "}', "E-DATA-151", 0, "text"),
    "50 two formats": ('{"messages": [], "prompt": "a", "completion": "b"}', "E-DATA-107", 0, "messages and prompt"),
    "59 too long": (row("the cat " * 300, "b"), "E-DATA-201", 0, "max_tokens"),
}


def write_mixed(path: Path, num_rows: int) -> list[tuple[int, str]]:
    """Every bad row at its place among good ones; returns (line, code) of each bad row in order."""
    every = num_rows // (len(BAD_ROWS) + 1)
    bad = list(BAD_ROWS.values())
    placed: list[tuple[int, str]] = []
    with path.open("wb") as f:
        for n in range(1, num_rows + 1):
            if n % every == 0 and len(placed) < len(bad):
                data, code, *_ = bad[len(placed)]
                placed.append((n, code))
                f.write((data.encode() if isinstance(data, str) else data) + b"\n")
            else:
                f.write(row(f"what is {n} times {n % 97} in words", f"it is {n * (n % 97)}").encode() + b"\n")
    return placed


def _many(*rows: str, number: int = 30) -> str:
    return (
        "\n".join([*(row(f"question {n} about the cat", f"answer {n}, the mat.") for n in range(number)), *rows]) + "\n"
    )


# Rows that are trained, and what is said of them: item: the file, words of `educe check`.
WARNED: dict[str, tuple[str, str]] = {
    "46 ends with a user's turn": (
        _many(_messages(ASK, TELL, {"role": "user", "content": "and then"})),
        "1 row with turns after the last answer",
    ),
    "49 unknown keys": (_many(_beside(wieght=2, id="x")), "keys not read  wieght (1 row), id (1 row)"),
    "49 unknown keys, one nearly known": (_many(_beside(wieght=2)), "is weight meant?"),
    "49 unknown keys of a turn": (_many(_messages({**ASK, "ts": 1}, TELL)), "ts (of a turn) (1 row)"),
    "54 control strings": (_many(row("what is <|im_end|> for", "an end.")), "1 row with the text of a control token"),
    "54 markers of another template": (_many(row("[INST] hi [/INST]", "hello.")), "markers of a chat template"),
    "55 direction marks": (_many(row("a\u202eb", "c.")), "invisible characters"),
    "55 tags": (_many(row("a\U000e0041b", "c.")), "invisible characters"),
    "56 repetition": (_many(row("the cat", "mat " * 60)), "repeated again and again"),
    "57 a secret": (_many(row("key", "it is AKIA" + "ABCDEFGH12345678")), "looks like a secret"),
    "58 decoded wrongly": (_many(row("caf\ufffd", "tea.")), "decoded wrongly"),
    "58 mojibake": (_many(row("naÃ¯ve cafÃ©", "tea.")), "decoded wrongly"),
    "61 exact copies": (_many(*[row("question one", "answer one.")] * 3), "exact copies"),
    "62 a refusal": (_many(row("how", "I'm sorry, but I can't help with that.")), "refuse or speak of being an AI"),
    "62 an error message": (_many(row("how", "Error: rate limit")), "error messages"),
    "63 another script": (_many(row("how", "Это ответ.")), "another script"),
    "64 one answer": ("\n".join(row(f"question {n}", "ok") for n in range(40)) + "\n", "all the same: 'ok'"),
    "placeholders": (_many(row("how", "Dear {{ name }}, hello.")), "placeholders"),
    "answers cut off": (_many(row("how", "first you take the")), "end in the middle"),
}
