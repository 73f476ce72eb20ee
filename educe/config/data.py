"""The data half of a recipe: where rows come from, how they are read, mixed and held out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from educe.config.knobs import Contradiction, Knobs, Share
from educe.types import Role

# Name of the only task where `data.train` names the rows.
ONLY = "train"
REPLAY = "replay"


class FileSplit(Knobs):
    """Held-out rows from files of their own."""

    kind: Literal["file"]
    file: str = Field(description="files, as in data.train")
    task: str | None = Field(default=None, description="the task they belong to: read as its rows are")


class ShareSplit(Knobs):
    """Held-out rows taken from the training rows by a hash of the prompt (equal prompts stay together)."""

    kind: Literal["share"]
    share: Share = Field(description="fraction of the rows")


Split = Annotated[FileSplit | ShareSplit, Field(discriminator="kind")]


class Trees(Knobs):
    """What is taken of a tree of messages (OpenAssistant). Languages: `where: contains(['en', 'de'], prompt.lang)`."""

    paths: Literal["best", "all"] = Field(default="best", description="the best answer at each turn, or every path")
    max_rank: int | None = Field(default=None, ge=0, description="answers ranked worse are left out (0 is the best)")


class Rows(Knobs):
    """Some rows and how they are read."""

    files: str = Field(min_length=1, description="a file, a directory, a glob, hf://datasets/ORG/NAME, or - for stdin")
    format: str | None = Field(default=None, description="their format (default: recognised by the keys of each row)")
    header: tuple[str, ...] = Field(
        default=(), strict=False, description="names of the columns of a table without a header line"
    )
    columns: dict[str, str] = Field(
        default={},
        description="new key: JMESPath expression, for rows in no known format ({prompt: q, response: a[0]})",
    )
    where: str | None = Field(default=None, description="JMESPath expression; rows for which it is false are left out")
    roles: dict[str, Role] = Field(default={}, description="names of roles in these rows: the role that is meant")
    trees: Trees = Field(default=Trees(), description="what is taken of trees of messages")


class Task(Rows):
    """A named part of a mixture. Changing `rate`, `cap` or `loss_weight` prepares nothing again."""

    rate: float | None = Field(
        default=None, ge=0, le=1e6, description="how often it is drawn, with rates {kind: explicit}"
    )
    cap: int | None = Field(
        default=None, ge=1, description="what its size counts for in the rates, at most (FLAN: 3000)"
    )
    loss_weight: float = Field(default=1.0, ge=0, le=1e3, description="λ: what its loss is multiplied with")
    per_file: bool = Field(default=False, description="every file is a task of its own, named NAME/FILE")


class Replay(Rows):
    """General data mixed in against forgetting: raw text or chat."""

    share: Share = Field(default=0.05, description="its share of the tokens trained on")


class Rates(Knobs):
    """How often each task is drawn: by its size (up to its cap), all alike, or by its `rate`."""

    kind: Literal["proportional", "uniform", "explicit"]


class Temperature(Knobs):
    """By size^(1/T): T = 1 is proportional, a large T uniform (Raffel et al. 2020, section 3.5.2)."""

    kind: Literal["temperature"]
    temperature: float = Field(ge=0.1, le=1000, description="T")


class Unimax(Knobs):
    """As alike as can be without drawing any task more than `epochs` times (Chung et al. 2023, arXiv 2304.09151)."""

    kind: Literal["unimax"]
    epochs: float = Field(gt=0, le=1000, description="most passes over one task")


def _by_files(value: object) -> object:
    """`train: rows.jsonl` is short for `train: {files: rows.jsonl}`."""
    return {"files": value} if isinstance(value, str) else value


class Data(Knobs):
    """Where the rows come from and which of their tokens are trained."""

    train: Annotated[Rows | None, BeforeValidator(_by_files)] = Field(
        default=None, description="the training rows, where there is one task: a block, or its files alone"
    )
    tasks: dict[str, Annotated[Task, BeforeValidator(_by_files)]] = Field(
        default={}, description="the tasks of a mixture, by name: each a block, or its files alone"
    )
    rates: Annotated[Rates | Temperature | Unimax, Field(discriminator="kind")] = Field(
        default=Rates(kind="proportional"), description="how often each task is drawn"
    )
    loss_mean: Literal["step", "task"] = Field(
        default="step", description="loss is the mean over all tokens of a step, or the sum of each task's own mean"
    )
    replay: Annotated[Replay | None, BeforeValidator(_by_files)] = Field(
        default=None, description="general data mixed in against forgetting: a block, or its files alone"
    )
    hold_out: tuple[str, ...] = Field(default=(), strict=False, description="tasks that are not trained: only tested")
    group: str | None = Field(
        default=None, description="JMESPath expression: rows for which it is equal stay in one split"
    )
    dev: Split = Field(default=ShareSplit(kind="share", share=0.05), description="rows measured while training")
    test: Split = Field(
        default=ShareSplit(kind="share", share=0.1), description="rows that are answered once, at the end"
    )
    near_copies: Literal["drop", "keep"] = Field(
        default="drop", description="training rows that nearly repeat a held-out row"
    )
    system: str | None = Field(default=None, description="system prompt for rows that have none")
    train_on: Literal["all", "last", "flagged"] = Field(
        default="all", description="which assistant turns are trained: all, the last, or those the row gives a weight"
    )
    prompt_weight: float = Field(
        default=0.0, ge=0, le=1, description="loss weight of what users and system say; never of template text"
    )
    reasoning_weight: float = Field(
        default=1.0, ge=0, le=1, description="loss weight of reasoning inside trained turns"
    )
    max_tokens: int = Field(default=2048, ge=8, le=1_048_576, description="most tokens of a row")
    too_long: Literal["drop", "split", "cut"] = Field(
        default="drop", description="longer rows are dropped, split between turns, or cut at the end (and counted)"
    )
    max_unused: float = Field(
        default=0.5, ge=0, le=1, description="a larger share of rows refused or dropped stops the run"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Data:
        if (self.train is None) == (not self.tasks):
            raise Contradiction(
                "data needs either train (the files of one task) or tasks (a mixture)", "Give one of the two."
            )
        named = [s.task for s in (self.dev, self.test) if isinstance(s, FileSplit) and s.task is not None]
        unknown = [n for n in (*self.hold_out, *named) if n not in self.tasks]
        if unknown:
            there = ", ".join(self.tasks)
            fix = f"Name one of {there}." if there else "Leave it out, or give tasks by their names."
            raise Contradiction(f"{unknown[0]!r} is no task of data.tasks ({there or 'there are none'})", fix)
        explicit = isinstance(self.rates, Rates) and self.rates.kind == "explicit"
        for name, task in self.tasks.items():
            if (task.rate is not None) != explicit and name not in self.hold_out:
                need = "needs a rate, since" if explicit else "has a rate, which is read only where"
                fix = "Give every task a `rate:`." if explicit else "Set data.rates: explicit, or leave the rate out."
                raise Contradiction(f"data.tasks.{name} {need} data.rates is {{kind: explicit}}", fix)
            if not name.strip() or name == REPLAY or "/" in name:
                raise Contradiction(
                    f"data.tasks: {name!r} cannot be the name of a task",
                    f"Take another: not empty, no slash, not {REPLAY!r}.",
                )
        return self

    @property
    def sources(self) -> dict[str, Rows]:
        """All rows that may be trained, by task: `train` alone is one task; `replay` comes last."""
        made: dict[str, Rows] = dict(self.tasks)
        if self.train is not None:
            made[ONLY] = Task.model_validate(self.train.model_dump())
        return made | ({REPLAY: self.replay} if self.replay is not None else {})
