"""Errors that teach: a code, the place, what was found, what was expected, what to do.

`docs/errors.md` lists every code. The hundreds digit is the kind of thing that is wrong:
0xx it cannot be read, 1xx it has the wrong form, 2xx it means something impossible, 3xx it was refused to keep a promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

CODES: dict[str, str] = {
    # recipe
    "E-RECIPE-001": "recipe file cannot be read",
    "E-RECIPE-101": "recipe is not valid YAML 1.2",
    "E-RECIPE-102": "unknown key",
    "E-RECIPE-103": "value of the wrong type or out of range",
    "E-RECIPE-104": "required key missing",
    "E-RECIPE-105": "recipe holds a secret",
    "E-RECIPE-201": "settings contradict each other",
    # data: files
    "E-DATA-001": "data file does not exist",
    "E-DATA-002": "not a regular, readable file",
    "E-DATA-003": "file is empty",
    "E-DATA-004": "file is not what its name says",
    "E-DATA-005": "no usable rows",
    "E-DATA-006": "a file of another kind poses as data",
    "E-DATA-007": "container needs an optional package",
    "E-DATA-008": "file changed while it was read",
    "E-DATA-009": "file is beyond what is safe to read",
    "E-DATA-010": "no data file found",
    "E-DATA-011": "too many rows are not used",
    "E-DATA-012": "one file both trains and tests",
    # data: rows
    "E-DATA-101": "line is not UTF-8",
    "E-DATA-102": "line is not valid JSON",
    "E-DATA-103": "duplicate key in a row",
    "E-DATA-104": "value JSON cannot hold (NaN, Infinity, lone surrogate, NUL)",
    "E-DATA-105": "row is not an object",
    "E-DATA-106": "format not recognised",
    "E-DATA-107": "row fits two formats",
    "E-DATA-108": "row has other fields than its table",
    "E-DATA-109": "row of another format than its file's",
    "E-DATA-141": "messages missing, null, empty or not a list",
    "E-DATA-142": "unknown role",
    "E-DATA-143": "content missing or not text",
    "E-DATA-144": "assistant message is empty",
    "E-DATA-145": "no assistant message",
    "E-DATA-146": "feature of the row is not supported",
    "E-DATA-147": "tool call or tool result is malformed",
    "E-DATA-148": "weight of a message is not a number ≥ 0 or a boolean",
    "E-DATA-149": "expression cannot be evaluated on a row",
    "E-DATA-150": "row of another kind of training",
    "E-DATA-151": "raw text is missing or empty",
    "E-DATA-152": "tree of messages holds no usable path",
    "E-DATA-153": "answers of a preference pair are none, or have different prompts",
    "E-DATA-154": "answers of a preference pair are the same",
    "E-DATA-155": "preference pair without a prompt",
    "E-DATA-201": "row is longer than the sequence length",
    "E-DATA-202": "row left out by the recipe's filter",
    "E-DATA-203": "row nearly repeats a held-out row",
    # chat
    "E-CHAT-001": "template missing or unreadable",
    "E-CHAT-101": "template does not parse",
    "E-CHAT-102": "template refused the conversation",
    "E-CHAT-103": "template exceeded a limit of the sandbox",
    "E-CHAT-201": "template and tokenizer do not fit",
    "E-CHAT-301": "completion does not follow the prompt",
    "E-CHAT-302": "assistant text changed by the template",
    "E-CHAT-303": "token ids differ from what a server computes",
    "E-CHAT-304": "no stop token ends the completion",
    "E-CHAT-305": "control token out of content",
    "E-CHAT-306": "decoded tokens differ from the text",
    "E-CHAT-307": "template renders differently twice",
    "E-CHAT-308": "reasoning of the row is not what the template lets the model emit",
    "E-CHAT-309": "template leaves out a part of the row",
    "E-CHAT-310": "no token of the row is trained",
    # store
    "E-STORE-001": "prepared data cannot be read",
    "E-STORE-301": "prepared data does not match its manifest",
    # model
    "E-MODEL-001": "model not found",
    "E-MODEL-002": "model file cannot be read",
    "E-MODEL-003": "download does not match its checksum",
    "E-MODEL-101": "weights are not safetensors",
    "E-MODEL-102": "model directory carries code",
    "E-MODEL-201": "sequence length exceeds the model's positions",
    "E-MODEL-202": "tokenizer and model do not fit",
    "E-MODEL-203": "weights and config do not fit",
    "E-MODEL-204": "model cannot be tuned in the way asked for",
    "E-MODEL-205": "model gives no finite numbers",
    "E-MODEL-206": "model cannot be exported in the form asked for",
    "E-MODEL-301": "terms of a model were not accepted",
    # training
    "E-TRAIN-201": "nothing to train on",
    "E-TRAIN-301": "loss or gradient is not finite",
    "E-TRAIN-302": "a check before training failed",
    # run directory
    "E-RUN-001": "no run found",
    "E-RUN-002": "run is not finished",
    "E-RUN-003": "weights of a finished run are damaged or gone",
    "E-RUN-004": "verb has no meaning for what the run learns from",
    "E-RUN-201": "run directory belongs to other settings",
    "E-RUN-202": "run is in use by another process",
    "E-RUN-203": "target directory is not empty",
    "E-RUN-204": "run directory was taken away while it trained",
    # evaluation
    "E-EVAL-001": "no test rows",
    "E-EVAL-002": "stored answers missing or of other rows",
    "E-EVAL-003": "file of a benchmark cannot be read",
    "E-EVAL-004": "task of lm-evaluation-harness cannot be used",
    "E-EVAL-101": "file of a benchmark is not in its format",
    "E-EVAL-201": "metric does not fit the expected answers",
    "E-EVAL-202": "custom metric failed",
    "E-EVAL-203": "programs cannot be run here",
    "E-EVAL-301": "judge cannot be tried, or does not follow the format",
    "E-EVAL-302": "judge is fooled by answers that deserve nothing, or rates real ones no higher",
    "E-EVAL-303": "programs that a model wrote are not run without consent",
    # asking a server
    "E-SAMPLE-001": "server cannot be reached",
    "E-SAMPLE-002": "server did not answer in time",
    "E-SAMPLE-003": "server refused the request",
    "E-SAMPLE-004": "server fails again and again",
    "E-SAMPLE-101": "not the address of a server",
    "E-SAMPLE-102": "server's answer cannot be read",
    "E-SAMPLE-103": "price or cap makes no sense",
    "E-SAMPLE-104": "key in the environment cannot be used",
    "E-SAMPLE-201": "asking would pass a cap",
    "E-SAMPLE-202": "stopped at a cap",
    "E-SAMPLE-301": "unencrypted address",
    # machine
    "E-SYS-001": "package missing",
    "E-SYS-002": "not enough disk space",
    "E-SYS-003": "not enough memory",
    "E-SYS-004": "file system refused",
    "E-SYS-005": "device not available",
    "E-SYS-006": "upload failed",
    "E-SYS-007": "client for metrics cannot begin",
    "E-SYS-008": "page cannot be served",
    # command line
    "E-CLI-101": "wrong use of a command",
}


class EduceError(Exception):
    """A user's mistake or a refusal, told so that it can be mended. Exit code 2, never a traceback.

    `code` must be in `CODES`; `where` is a place (`file:line:col`, a key, a path), `found` a sentence, `fix` what to do.
    """

    prefix = "E-"

    def __init__(self, number: int, where: str, found: str, fix: str) -> None:
        self.code = f"{self.prefix}{number:03d}"
        if self.code not in CODES:
            raise KeyError(f"{self.code} is not in errors.CODES")
        self.number, self.where, self.found, self.fix = number, where, found, fix
        super().__init__(f"{self.code} {where} {found} {fix}")

    def adding(self, sentence: str) -> Self:
        """The same with one more sentence of what was found."""
        return type(self)(self.number, self.where, f"{self.found} {sentence}", self.fix)

    def within(self, place: str) -> Self:
        """The same, of something in this place."""
        return type(self)(self.number, f"{place}, {self.where}", self.found, self.fix)

    def __reduce__(self) -> tuple[type[EduceError], tuple[int, str, str, str]]:
        return type(self), (self.number, self.where, self.found, self.fix)  # from a process to another


class RecipeError(EduceError):
    """The recipe file is wrong."""

    prefix = "E-RECIPE-"


class DataError(EduceError):
    """A data file is wrong as a whole."""

    prefix = "E-DATA-"


class ChatError(EduceError):
    """A chat template cannot be used."""

    prefix = "E-CHAT-"


class StoreError(EduceError):
    """Prepared data is missing or damaged."""

    prefix = "E-STORE-"


class ModelError(EduceError):
    """A model cannot be found, read or trained."""

    prefix = "E-MODEL-"


class TrainError(EduceError):
    """Training cannot start or go on."""

    prefix = "E-TRAIN-"


class RunError(EduceError):
    """A run directory is missing, unfinished or taken."""

    prefix = "E-RUN-"


class EvalError(EduceError):
    """Evaluation cannot be done."""

    prefix = "E-EVAL-"


class SampleError(EduceError):
    """A server that answers questions cannot be asked."""

    prefix = "E-SAMPLE-"


class MachineError(EduceError):
    """The machine lacks something: a package, space, memory, a device."""

    prefix = "E-SYS-"


class Ended(SystemExit):
    """A signal ends this process: nobody's code may keep that from happening."""


class UsageError(EduceError):
    """A command was called the wrong way."""

    prefix = "E-CLI-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why one row is not used: goes to the ledger, never raised. `code` is in `CODES`; `where` is `file:line[:col]`."""

    code: str
    where: str
    found: str
    fix: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"{self.code} is not in errors.CODES")

    def __str__(self) -> str:
        return f"{self.code} {self.where} {self.found} {self.fix}"
