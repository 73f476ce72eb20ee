"""What all blocks of a recipe have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, lt=1)]

_NAME, _FUNCTION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", r"^.*[^:.]:[A-Za-z_]\w*$"
Name = Annotated[str, Field(pattern=_NAME)]
FunctionName = Annotated[str, Field(pattern=_FUNCTION)]
# What a text of such a form is, for whoever wrote another one.
FORMS = {
    _NAME: "Take letters, digits, '.', '_' and '-', 100 at most, a letter or a digit first.",
    _FUNCTION: "Write file.py:function.",
}


def by_name(value: object) -> object:
    """`loss: dpo` is short for `loss: {kind: dpo}`, as is the name of a choice wherever one is made."""
    return {"kind": value} if isinstance(value, str) else value


class Knobs(BaseModel):
    """Base of every block: strict types (no "4" for 4, no true for 1), frozen, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Contradiction(ValueError):
    """Settings that do not go together, told as what was found and what to do; `at`: keys to where that is, if they are known."""

    def __init__(self, found: str, fix: str, at: tuple[str | int, ...] = ()) -> None:
        self.found, self.fix, self.at = found, fix, at
        super().__init__(f"{found}. {fix}")

    def of_stage(self, k: int) -> Contradiction:
        """The same, of stage k of a recipe."""
        return Contradiction(self.found, self.fix, ("stages", k, *self.at))
