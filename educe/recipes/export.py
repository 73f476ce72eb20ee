"""`educe export`: the tuned model as a directory for one kind of server, and proof that it is the model that was trained."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from educe.chat.tokens import ChatTokenizer
from educe.config import Lora, Recipe
from educe.errors import MachineError, ModelError, RunError, UsageError
from educe.files.atomic import directory, need_space
from educe.files.run_dir import RunDir
from educe.model.blended import Blend, blended
from educe.model.describe import describe_model
from educe.model.device import CLOSE_OTHERS, Device, told_of_memory
from educe.model.export import check_prompts, check_tokenizer, merged, put, stored, write_model, write_tokenizer
from educe.model.export_adapter import adapter_limits, check_adapter, vllm_rank, write_adapter
from educe.model.export_hub import check_push, push
from educe.model.gguf_llama import K_QUANTS, need_llama_cpp
from educe.model.load import CausalLM, load_model
from educe.model.proof import random_batch
from educe.model.source import Say
from educe.recipes.eval import answering_device, data_of, final_weights, recipe_of
from educe.recipes.export_card import adapter_command, base_lines, base_name, blend_lines, card_of, serve_command
from educe.recipes.export_gguf import write_gguf_files
from educe.recipes.finding import finding
from educe.recipes.preflight import keep
from educe.recipes.prepare import Prepared
from educe.recipes.served import said_of_served
from educe.types import Conversation

FORMS = ("merged", "adapter", "gguf-f16", "gguf-bf16", "gguf-q8_0", *(f"gguf-{k}" for k in K_QUANTS))
_COMPARED_PROMPTS = 20
_ROWS = 8  # held-out ones on which a model trained on 4 bits is compared with what is served


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A finished run and what its model is made of; `rows` are some held-out ones, whose prompts are compared."""

    run: RunDir
    recipe: Recipe
    weights: Path
    prepared: Prepared
    device: Device
    rows: Sequence[Conversation]
    blend: Blend | None = None

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.prepared.tokenizer

    @property
    def base(self) -> Path:
        return self.prepared.model_dir

    def merged(self, say: Say) -> CausalLM:
        """The model that is served. Where it is not the one that was trained (a base in 4 bits), says how far it is from that."""
        new_ids, tuning = self.tokenizer.new_tokens.values(), self.recipe.tuning
        if self.blend is not None:
            return blended(self.base, self.blend, tuning, self.device, new_ids=new_ids)
        model = merged(self.base, self.weights, tuning, self.device, new_ids=new_ids)
        if isinstance(tuning, Lora) and tuning.base_bits == 4:
            held_out = self.prepared.store("dev")
            rows = [held_out[i] for i in range(min(_ROWS, len(held_out.lengths)))]
            trained = load_model(self.base, self.device, tuning, new_ids=new_ids)
            put(stored(self.weights, self.device), trained)
            say(said_of_served(trained, model, rows))
        return model


@told_of_memory("exporting", CLOSE_OTHERS)
def export(
    run: RunDir,
    target: Path,
    say: Say,
    form: str = "merged",
    repository: str | None = None,
    blend: Blend | None = None,
    *,
    asked: bool = True,
) -> Path:
    """Write `target` (new or empty) in one of `FORMS`, read it back and compare; then upload it, where `repository` is given.

    `blend`: that instead of the run's own weights. `asked`: a user named this target, and the run keeps what was proved of it, where
    it is of the run's own weights.
    """
    token = check_push(repository) if repository is not None else ""
    recipe = recipe_of(run)
    refuse_early(recipe, target, form, blend)
    device = answering_device(recipe, run, say)
    if form == "merged":
        tokenizer = write_tuned(run, target, device, say, blend).settings
        proof = f"logits are the same to the bit ({device.dtype}), token ids and template are those of the training"
    else:
        tuned = _tuned(run, device, say, blend)
        tokenizer = tuned.tokenizer.settings
        proof = (_write_adapter if form == "adapter" else _write_gguf)(tuned, target, form, say)
    say(f"read back: {proof}")
    if asked and blend is None:
        with contextlib.suppress(MachineError):  # a run that cannot be written to can be exported all the same
            keep(run, "export", [finding("P90", "export", form, f"read back: {proof}")])
    if recipe.data.system is not None:
        say("its chat template puts the recipe's system prompt before a conversation that has none, as in training")
    if tokenizer and form == "merged":
        said = serve_command(target, tokenizer)
        say(f"it was trained with settings of the template; serve it with them: {said}")
    if form == "adapter" and isinstance(recipe.tuning, Lora):
        rank = vllm_rank(recipe.tuning)
        say(f"vLLM serves it, prompted and stopped as trained, by: {adapter_command(target, recipe, rank, tokenizer)}")
    if repository is not None:
        say(f"uploaded: {push(target, repository, token, say)}")
    return target


def refuse_early(recipe: Recipe, target: Path, form: str, blend: Blend | None = None) -> None:
    """Before a model is loaded: what cannot be done. Raises `UsageError`, `MachineError`, `RunError`."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(203, str(target), "is not an empty directory.", "Give a directory that does not exist yet.")
    if form not in FORMS:
        near = difflib.get_close_matches(form, FORMS, 1, 0.5)
        fix = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(101, "--as", f"{form[:40]!r} is no form of export.", f"{fix}One of {', '.join(FORMS)}.")
    if form == "adapter" and not isinstance(recipe.tuning, Lora):
        found = "the run tuned all weights (tuning.kind: full), so there is no adapter."
        raise UsageError(101, "--as adapter", found, "Use --as merged.")
    if form == "adapter" and isinstance(recipe.tuning, Lora) and blend is not None:
        what = "a mean of adapters is" if len(blend.weights) > 1 else "a share of DoRA's change is"
        if len(blend.weights) > 1 or (recipe.tuning.variant == "dora" and blend.alpha < 1):
            raise UsageError(101, "--as adapter", f"{what} no adapter of that rank.", "Use --as merged.")
    if form.removeprefix("gguf-") in K_QUANTS:
        need_llama_cpp(form)


def write_tuned(run: RunDir, target: Path, device: Device, say: Say, blend: Blend | None = None) -> ChatTokenizer:
    """The finished run's model as a directory, in the device's arithmetic, read back before it has its name; returns the tokenizer."""
    tuned = _tuned(run, device, say, blend)
    tokenizer, system = tuned.tokenizer, tuned.recipe.data.system
    size = describe_model(tuned.base, tuned.recipe.model).num_parameters * (2 if device.dtype == "bfloat16" else 4)
    need_space(target, int(1.05 * size), "the exported model")
    model = tuned.merged(say)
    about = {"stage": "export", "run": run.path.name, "template_settings": dict(tokenizer.settings)}
    with directory(target, about=about, private=False) as part:
        write_model(
            model,
            tuned.base,
            tokenizer,
            card_of(run, tuned.recipe, "merged", tokenizer.settings, blend_lines(blend)),
            part,
            system=system,
        )
        read_back(part, model, device)
        check_tokenizer(part, tokenizer, system=system)
        check_prompts(part, tokenizer, tuned.rows)
    return tokenizer


def read_back(part: Path, model: CausalLM, device: Device) -> None:
    """Load what was written, before it gets its name, and compare logits to the bit."""
    again = load_model(part, device)
    batch = random_batch(model.vocabulary)
    with torch.no_grad():
        ids = model.tensor(batch.ids_P)[None]
        one, two = (m.network(input_ids=ids, use_cache=False).logits for m in (model, again))
    if not torch.equal(one, two):
        apart = float((one - two).abs().max())
        raise ModelError(
            2, str(part), f"read back, its logits differ by {apart:.3g}.", "Nothing was exported; report this."
        )


def _tuned(run: RunDir, device: Device, say: Say, blend: Blend | None) -> Tuned:
    recipe = recipe_of(run)
    weights = final_weights(run, say)
    prepared = data_of(run, recipe, say)
    rows = [row for split in ("test", "dev") for row in prepared.conversations(split)][:_COMPARED_PROMPTS]
    return Tuned(run=run, recipe=recipe, weights=weights, prepared=prepared, device=device, rows=rows, blend=blend)


def _write_adapter(tuned: Tuned, target: Path, form: str, say: Say) -> str:
    """The adapters in fp32, with the tokenizer; returns what was proved."""
    tuning, tokenizer, system = tuned.recipe.tuning, tuned.tokenizer, tuned.recipe.data.system
    assert isinstance(tuning, Lora)
    new_ids = tokenizer.new_tokens.values()
    with directory(target, about={"stage": "export", "run": tuned.run.path.name, "form": form}, private=False) as part:
        name, of = base_name(tuned.recipe), tuned.blend or Blend(alpha=1, weights=(tuned.weights,))
        model = write_adapter(
            tuned.base, of.weights[0], tuning, tuned.device, part, name=name, tokenizer=tokenizer, alpha=of.alpha
        )
        write_tokenizer(tuned.base, tokenizer, part, system=system)
        whole = tuned.merged(say)
        apart = check_adapter(part, tuned.base, model, whole, random_batch(model.vocabulary), new_ids=new_ids)
        check_tokenizer(part, tokenizer, system=system)
        num_prompts = check_prompts(part, tokenizer, tuned.rows)
        limits = [*base_lines(tuned.recipe), *adapter_limits(part, tuning, tokenizer.new_tokens)]
        for line in limits:
            say(line)
        use = f"`{adapter_command('.', tuned.recipe, vllm_rank(tuning), tokenizer.settings)}`"
        more = [use, *(["", *limits] if limits else []), *blend_lines(tuned.blend)]
        card = card_of(tuned.run, tuned.recipe, form, {}, more)
        (part / "README.md").write_text(card, encoding="utf-8")
    dtype = tuned.device.dtype
    whose = "trained" if of.alpha == 1 else "blended"
    said = (
        f"peft gives the {whose} logits to the bit in fp32; the merged model, in {dtype}, is within {apart:.2g} of them"
    )
    return f"{said}; {num_prompts} held-out prompts have the ids of the training"


def _write_gguf(tuned: Tuned, target: Path, form: str, say: Say) -> str:
    """A GGUF file, a Modelfile and a card; returns what was proved."""
    elements = describe_model(tuned.base, tuned.recipe.model).num_parameters
    kind = form.removeprefix("gguf-")
    size = elements * 5 if kind in K_QUANTS else elements * 2.1
    need_space(target, int(size), "the exported model")
    model = tuned.merged(say)
    recipe, tokenizer = tuned.recipe, tuned.tokenizer
    with directory(target, about={"stage": "export", "run": tuned.run.path.name, "form": form}, private=False) as part:
        licence = tuned.run.load(tuned.run.provenance)["model"]["licence"]
        about = {"license": licence, "quantized_by": "educe", "basename": base_name(recipe)}
        made = write_gguf_files(
            model,
            tokenizer,
            part,
            kind,
            name=recipe.name,
            about=about,
            rows=tuned.rows,
            system=recipe.data.system,
            say=say,
        )
        card = card_of(tuned.run, recipe, form, {}, [*made.usage, *blend_lines(tuned.blend)])
        (part / "README.md").write_text(card, encoding="utf-8")
    return made.proof
