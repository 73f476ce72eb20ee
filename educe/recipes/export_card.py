"""The card of an export: what it is, of what, by which settings and data, what it scored, how to serve it. It names no path here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from educe.config import Recipe
from educe.files.run_dir import RunDir, is_staged
from educe.model.blended import Blend

# By form, up to its first hyphen: the library that loads it and what it is to the base model.
_KINDS = {
    "merged": ("transformers", "finetune"),
    "adapter": ("peft", "adapter"),
    "gguf": ("gguf", "quantized"),
}


def card_of(run: RunDir, recipe: Recipe, form: str, settings: Mapping[str, Any], more: Sequence[str]) -> str:
    """Markdown with the front matter that the Hub reads. `settings` are the chat template's, `more` lines on how to use it."""
    provenance = run.load(run.provenance)
    base = provenance["model"]
    library, relation = _KINDS[form.partition("-")[0]]
    lines = [
        "---",
        f"base_model: {base_name(recipe)}",
        f"base_model_relation: {relation}",
        f"license: {base['licence']}",
        f"library_name: {library}",
        "tags: [sft, educe]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"{base_name(recipe)} tuned with educe {provenance['educe']} ({provenance['weights_step']} steps), {form}.",
        *_scores(run),
        *(["", *more] if more else []),
    ]
    if settings:
        said = "Trained with these settings of the chat template, so serve it with them (`chat_template_kwargs`):"
        lines += ["", said, "", "```bash", serve_command(".", settings), "```"]
    lines += [
        "",
        "## Licences",
        "",
        f"The base model's: {base['licence']}. The data's is not known to educe: add it before you share this.",
    ]
    lines += [
        "",
        "## How it was made",
        "",
        "```json",
        json.dumps(_made(recipe, provenance), indent=1, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)


def blend_lines(blend: Blend | None) -> list[str]:
    """What a blend is, and that the scores are not its own."""
    if blend is None:
        return []
    if blend.alpha == 0:
        return [
            "",
            "These are the base model's own weights, with the tokenizer and template of training. The scores are not theirs.",
        ]
    means = ", ".join(f.parent.name for f in blend.weights)
    of = f"the mean of {means}" if len(blend.weights) > 1 else means
    return [
        "",
        f"A blend: base + {blend.alpha:g} x (tuned - base), where tuned is {of} (WiSE-FT, arXiv 2109.01903); chosen without the "
        "test rows. The scores are those of the run itself, not of this blend.",
    ]


def base_name(recipe: Recipe) -> str:
    """The base model's Hub id; of a directory its last name, of a run the directory that `base_lines` has it written to."""
    place = Path(recipe.model).expanduser()
    if _is_run(recipe) and is_staged(place.resolve().parent):  # a stage's name says little without its chain's
        return f"{place.resolve().parent.name}-{place.name}"
    return place.name if place.exists() else recipe.model


def base_lines(recipe: Recipe) -> list[str]:
    """Where the base model is to be had, where that is an earlier run."""
    if not _is_run(recipe):
        return []
    name, place, here = base_name(recipe), Path(recipe.model).expanduser().resolve(), Path.cwd()
    run = place.relative_to(here) if place.is_relative_to(here) else Path(*place.parts[-2:])  # cards are published
    command = f"educe export {shlex.quote(str(run))} {shlex.quote(name)}"
    return [f"Its base model is what `{command}` writes: peft and vLLM look for {name} where they are started."]


def _is_run(recipe: Recipe) -> bool:
    return RunDir(Path(recipe.model).expanduser()).resolved.is_file()


def serve_command(place: Path | str, settings: Mapping[str, Any]) -> str:
    """A command that serves the model with the template settings it was trained with."""
    given = shlex.quote(json.dumps(dict(settings)))
    return f"vllm serve {shlex.quote(str(place))} --default-chat-template-kwargs {given}"


def adapter_command(place: Path | str, recipe: Recipe, rank: int | None, settings: Mapping[str, Any]) -> str:
    """A command that serves the base model with the adapters in `place`, prompted and stopped as they were trained: vLLM takes all
    that from the base model's directory unless told."""
    there = shlex.quote(str(place))
    words = [f"vllm serve {shlex.quote(base_name(recipe))} --enable-lora --lora-modules", f"{recipe.name}={there}"]
    words += [f"--max-lora-rank {rank}"] if rank else []
    words += [f"--tokenizer {there} --generation-config {there}"]
    words += [f"--default-chat-template-kwargs {shlex.quote(json.dumps(dict(settings)))}"] if settings else []
    return " ".join(words)


def _scores(run: RunDir) -> list[str]:
    if not run.scores.is_file():
        return []
    scores = run.load(run.scores)
    lines = ["", f"**{scores['verdict']}**"]
    if scores["metric"] not in ("none", "text"):
        mean = scores.get("measure") == "mean"  # the interval is of the mean, and no row need be fully right
        lines += ["", f"| system | {'mean score' if mean else 'right'} | 95 % interval |", "|---|---|---|"]
        for system, s in scores["systems"].items():
            said = str(s.get("label", system)).replace("|", "\\|")
            value = f"{s['value']:.1%}" if mean else f"{s['correct']} of {scores['num_rows']}"
            lines.append(f"| {said} | {value} | {s['low']:.1%} to {s['high']:.1%} |")
    return lines


def _made(recipe: Recipe, provenance: Mapping[str, Any]) -> dict[str, Any]:
    data = {
        name: {"files": ", ".join(Path(f).name for f in d["file"].split(", ")), "sha256": d["sha256"]}
        for name, d in provenance["data"].items()
    }
    return {
        "data": data,
        "tuning": recipe.tuning.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json"),
        "packages": provenance["packages"],
        "device": provenance["device"],
    }
