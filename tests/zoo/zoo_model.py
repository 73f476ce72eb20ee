"""Failures of the loaded model: its loss, its packs, what is trained, what is saved."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from educe.loss.cross_entropy import LossOut
from educe.model.documents import Documents, documents_of
from educe.model.export import write_model
from educe.model.load import CausalLM, load_model
from educe.pack.batch import build_batch
from educe.training import saver
from educe.training.optim import Adam
from educe.training.saver import Saver
from educe.training.sft import SftLoss, held_out_loss
from educe.training.staging import Staging
from educe.types import Batch
from transformers import GPT2Config, GPT2LMHeadModel
from zoo_stand import DATA, TRAIN, Failure, Stand

LORA = "tuning: {kind: lora, rank: 4}\n"


def mean_of_means(stand: Stand, wrong: bool) -> set[str]:
    right = SftLoss.__call__
    if wrong:

        def loss(self: SftLoss, model: CausalLM, batch: Batch, denominator: float) -> LossOut:
            return right(self, model, batch, batch.total_weight)

        stand.patch.setattr(SftLoss, "__call__", loss)
    return stand.look_on_model(stand.recipe())


def packs_leak(stand: Stand, wrong: bool) -> set[str]:
    def then(t: Any) -> None:
        if wrong:  # after the proof at load, which would train every row alone
            stand.everywhere(documents_of, lambda lengths, kind: Documents(lengths=(sum(lengths),)))

    return stand.look_on_model(stand.recipe(), then)


def positions_run_on(stand: Stand, wrong: bool) -> set[str]:
    """A model with learned positions: they go on counting from document to document."""
    config = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=2, bos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(stand.model)

    def running(examples: Any) -> Batch:
        batch = build_batch(examples)
        return replace(batch, positions_P=torch.arange(batch.ids_P.size).numpy())

    if wrong:
        stand.everywhere(build_batch, running)
    return stand.look_on_model(stand.recipe())


def written(stand: Stand, change: Any) -> None:
    """What an export wrote is changed as soon as it is written; `change` is given the directory and the model."""
    right = write_model

    def write(model: CausalLM, base: Path, tokenizer: Any, card: str, place: Path, **more: Any) -> None:
        right(model, base, tokenizer, card, place, **more)
        change(place, model)

    stand.everywhere(right, write)


def tied_head_lost(stand: Stand, wrong: bool) -> set[str]:
    """The config says that the head is its own, and no head is in the file."""

    def untied(place: Path, model: CausalLM) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))

    if wrong:
        written(stand, untied)
    return stand.look_on_model(stand.recipe())


def new_tokens_frozen(stand: Stand, wrong: bool) -> set[str]:
    """Adapters alone are trained and saved, though the template adds tokens."""
    (stand.model / "chat_template.jinja").unlink()
    if wrong:
        stand.everywhere(load_model, lambda *a, **more: load_model(*a, **{**more, "new_ids": ()}))
    return stand.look_on_model(stand.recipe("template: {kind: plain}\n" + LORA + DATA + TRAIN))


def other_dtype_on_disk(stand: Stand, wrong: bool) -> set[str]:
    def low(place: Path, model: CausalLM) -> None:
        copy.deepcopy(model.network).to(torch.bfloat16).save_pretrained(place)

    if wrong:
        written(stand, low)
    return stand.look_on_model(stand.recipe())


def in_low_precision(stand: Stand, of: Any) -> None:
    """Parameters that `of` names are their own masters, in bf16, and are rounded to the nearest."""
    right = Adam.__init__

    def init(self: Adam, parameters: Any, settings: Any, *more: Any) -> None:
        right(self, parameters, settings, *more)
        for group in self._adam.param_groups:
            group["params"].clear()
        for name, p in parameters.items():
            if of(name, p):
                self.masters[name] = p.data
                self._own.add(name)
                self._sums.pop(name, None)
                p._post_accumulate_grad_hooks = None
            self._adam.param_groups[0]["params"].append(p if name in self._own else self.masters[name])

    stand.patch.setattr(Adam, "__init__", init)


def bf16_weights(stand: Stand, wrong: bool) -> set[str]:
    if wrong:
        in_low_precision(stand, lambda name, p: True)
    return stand.look_on_model(stand.recipe(DATA + TRAIN.replace("1e-3", "1e-5"), dtype="bfloat16"))


def small_parameters_in_bf16(stand: Stand, wrong: bool) -> set[str]:
    if wrong:
        in_low_precision(stand, lambda name, p: p.ndim == 1)
    return stand.look_on_model(stand.recipe(DATA + TRAIN.replace("1e-3", "1e-5"), dtype="bfloat16"))


def mean_over_batches(stand: Stand, wrong: bool) -> set[str]:
    class Mean:
        def __init__(self, losses: list[float]) -> None:
            self.mean = sum(losses) / len(losses)

    if wrong:
        stand.everywhere(
            held_out_loss, lambda model, batches, *loss: Mean([held_out_loss(model, [b], *loss).mean for b in batches])
        )
    return stand.look_on_model(stand.recipe())


def stops_not_written(stand: Stand, wrong: bool) -> set[str]:
    """The base model stops at its end of text; turns are trained to end otherwise."""
    (stand.model / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))

    def as_base(place: Path, model: CausalLM) -> None:
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))

    if wrong:
        written(stand, as_base)
    return stand.look_on_model(stand.recipe())


def later_weights_saved(stand: Stand, wrong: bool) -> set[str]:
    """Nothing is copied before training goes on: the thread reads what is there when it comes to it."""
    if wrong:
        finish, join, go = Saver._finish, Saver.wait, threading.Event()

        def late(self: Saver, *a: Any) -> None:
            go.wait()
            finish(self, *a)

        def joined(self: Saver) -> None:
            if self._thread is not None:
                go.set()
            join(self)

        stand.patch.setattr(saver, "_copies_in_memory", lambda state, size: True)
        stand.patch.setattr(Staging, "take", lambda self, group, alive: dict(group))
        stand.patch.setattr(Saver, "_finish", late)
        stand.patch.setattr(Saver, "wait", joined)
    return stand.look_on_model(stand.recipe())


IN_MODEL = (
    Failure(
        number=1,
        what="The loss is averaged for each micro-batch, then over micro-batches",
        how="the loss divides by its own micro-batch's weight",
        by="P26 fail",
        show=mean_of_means,
        fast=True,
    ),
    Failure(
        number=10,
        what="Examples of a pack see each other",
        how="attention is told that the pack is one document, after the proof at load (which would train every row alone)",
        by="P24 fail",
        show=packs_leak,
        fast=True,
    ),
    Failure(
        number=11,
        what="Positions go on counting through a pack",
        how="batches are built so, for a model with learned positions",
        by="P26 fail",
        show=positions_run_on,
    ),
    Failure(
        number=12,
        what="A head that is the embedding is lost when the model is saved",
        how="the exported config says that it is not tied",
        by="P27 fail",
        show=tied_head_lost,
    ),
    Failure(
        number=13,
        what="LoRA with new tokens: their embeddings are neither trained nor saved",
        how="the model is loaded without their ids",
        by="P22 fail",
        show=new_tokens_frozen,
    ),
    Failure(
        number=14,
        what="Another dtype is written than was planned",
        how="the export's weights are written in bf16 where they are fp32",
        by="P27 fail",
        show=other_dtype_on_disk,
    ),
    Failure(
        number=15,
        what="bf16 weights under Adam lose most updates",
        how="parameters are their own masters, in bf16",
        by="P22 fail",
        show=bf16_weights,
    ),
    Failure(
        number=21,
        what="Held-out loss depends on how rows are batched",
        how="it is the mean of the batches' means",
        by="P50 fail",
        show=mean_over_batches,
    ),
    Failure(
        number=22,
        what="The exported generation config does not name the stop token that was trained",
        how="it is left as the base model's",
        by="P27 fail",
        show=stops_not_written,
    ),
    Failure(
        number=25,
        what="A checkpoint that is written beside the training holds later weights",
        how="nothing is copied, and the thread that writes comes late",
        by="P27 fail",
        show=later_weights_saved,
        fast=True,
    ),
    Failure(
        number=29,
        what="Parameters whose updates are small are kept in bf16",
        how="vectors are their own masters, in bf16",
        by="P22 fail",
        show=small_parameters_in_bf16,
    ),
)
