"""`educe export`: the tuned model as a directory for transformers and vLLM, and proof that it answers the same."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from educe.chat.tokens import ChatTokenizer
from educe.errors import MachineError, ModelError, RunError
from educe.files.atomic import directory, need_space
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.device import Device
from educe.model.export import check_tokenizer, merged, write_model
from educe.model.load import CausalLM, load_model
from educe.model.proof import random_batch
from educe.model.source import Say
from educe.recipes.eval import answering_device, data_of, final_weights, recipe_of
from educe.recipes.finding import finding
from educe.recipes.preflight import keep


def export(run: RunDir, target: Path, say: Say) -> Path:
    """Write `target` (new or empty), load it back, compare logits to the bit and the tokenizer to the id."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(203, str(target), "is not an empty directory.", "Give a directory that does not exist yet.")
    recipe = recipe_of(run)
    device = answering_device(recipe, run, say)
    settings = write_tuned(run, target, device, say).settings
    say(f"read back: logits are the same to the bit ({device.dtype}), token ids and template are those of the training")
    found = finding("P90", "export", "0 apart", "read back: logits to the bit, token ids and template as in training")
    with contextlib.suppress(MachineError):  # a run that cannot be written to can be exported all the same
        keep(run, "export", [found])
    if recipe.data.system is not None:
        say("its chat template puts the recipe's system prompt before a conversation that has none, as in training")
    if settings:
        say(f"it was trained with settings of the template; serve it with them: {_serve(target, settings)}")
    return target


def write_tuned(run: RunDir, target: Path, device: Device, say: Say) -> ChatTokenizer:
    """The finished run's model as a directory, in the device's arithmetic, read back before it has its name; returns the tokenizer."""
    recipe = recipe_of(run)
    weights = final_weights(run, say)
    prepared = data_of(run, recipe, say)
    base, tokenizer, settings = prepared.model_dir, prepared.tokenizer, prepared.tokenizer.settings
    facts = describe_model(base, recipe.model)
    need_space(target, 2 * facts.num_parameters * (2 if device.dtype == "bfloat16" else 4), "the exported model")
    model = merged(base, weights, recipe.tuning, device, new_ids=tokenizer.new_tokens.values())
    provenance = run.load(run.provenance)
    scores = run.load(run.scores) if run.scores.is_file() else None
    with directory(target, about={"stage": "export", "run": run.path.name}, private=False) as part:
        card = _card(recipe.name, provenance, scores, settings)
        write_model(model, base, tokenizer, card, part, system=recipe.data.system)
        read_back(part, model, device)
        check_tokenizer(part, tokenizer, system=recipe.data.system)
    return tokenizer


def _serve(place: Path | str, settings: Mapping[str, Any]) -> str:
    """A command that serves the model with the template settings it was trained with."""
    given = shlex.quote(json.dumps(dict(settings)))
    return f"vllm serve {shlex.quote(str(place))} --default-chat-template-kwargs {given}"


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


def _card(name: str, provenance: dict[str, Any], scores: dict[str, Any] | None, settings: Mapping[str, Any]) -> str:
    base = provenance["model"]
    lines = [
        "---",
        f"base_model: {base['name']}",
        f"license: {base['licence']}",
        "library_name: transformers",
        "tags: [sft, educe]",
        "---",
        "",
        f"# {name}",
        "",
        f"{base['name']} tuned with educe {provenance['educe']} ({provenance['weights_step']} steps).",
    ]
    if scores is not None and scores["metric"] == "text":
        lines += ["", f"**{scores['verdict']}**"]
    elif scores is not None:
        lines += ["", f"**{scores['verdict']}**", "", "| system | right | 95 % interval |", "|---|---|---|"]
        for system, s in scores["systems"].items():
            lines.append(f"| {system} | {s['correct']} of {scores['num_rows']} | {s['low']:.1%} to {s['high']:.1%} |")
    if settings:
        said = "Trained with these settings of the chat template, so serve it with them (`chat_template_kwargs`):"
        lines += ["", said, "", "```bash", _serve(".", settings), "```"]
    lines += [
        "",
        "```json",
        json.dumps({k: provenance[k] for k in ("data", "packages", "device")}, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)
