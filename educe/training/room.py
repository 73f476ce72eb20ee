"""A step in the memory there is: where a micro-batch does not fit, all are halved and the step is done again, same rows, same loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from educe.errors import MachineError
from educe.pack.batch import halved
from educe.training.state import State
from educe.types import Batch

Out = TypeVar("Out")
FILLED_TO = 128  # tokens


def in_room(
    state: State, batches: Sequence[Batch], compute: Callable[[Sequence[Batch]], list[Out]], say: Callable[[str], None]
) -> tuple[Sequence[Batch], list[Out]]:
    """`compute(micro-batches)` of one step, and the micro-batches that fitted. `state.halvings` is how often each was halved before;
    it grows here, and stays.

    Raises `MachineError` where one document alone does not fit. Gradients of an attempt that failed are forgotten.
    """
    while True:
        fitting = cut(batches, state.halvings)
        if state.halvings:  # compiled layers would fill what was cut up to the length that did not fit
            state.model.fill_less(FILLED_TO)
        try:
            return fitting, compute(fitting)
        except torch.OutOfMemoryError as e:
            error = str(e).split(". ")[0]
            if state.model.sharded is not None:  # the other ranks are in the middle of the pass
                fix = "Lower train.micro_batch_tokens, or use more devices."
                raise MachineError(3, f"step {state.step + 1}", f"{error}.", fix) from e
        # outside the handler: the traceback would keep the tensors of the failed attempt
        state.optimizer.forget_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = max(b.num_tokens for b in fitting)
        if len(cut(fitting, 1)) == len(fitting):
            found = f"{error}; one document of {longest} tokens does not fit."
            fix = "Lower data.max_tokens, set train.activations: recompute, or tuning.kind: lora."
            raise MachineError(3, f"step {state.step + 1}", found, fix)
        state.halvings += 1
        say(
            f"step {state.step + 1}: out of memory with {longest} tokens at once; micro-batches are halved from here on "
            "(same rows a step, same gradient)"
        )


def cut(batches: Sequence[Batch], times: int) -> list[Batch]:
    """Each batch halved between documents, `times` times."""
    pieces = list(batches)
    for _ in range(times):
        pieces = [half for piece in pieces for half in halved(piece)]
    return pieces
