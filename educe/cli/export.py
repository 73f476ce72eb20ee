"""`educe export`: where to, in which form."""

from __future__ import annotations

from pathlib import Path

import click

from educe.errors import UsageError
from educe.files.run_dir import is_staged


@click.command()
@click.argument("places", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="[RUN] DIR")
@click.option(
    "--as",
    "form",
    default="merged",
    show_default=True,
    metavar="FORM",
    help="merged (transformers, vLLM), adapter (peft, vLLM's LoRA), or a file for llama.cpp and Ollama: gguf-f16, gguf-bf16, "
    "gguf-q8_0; gguf-q6_k, gguf-q5_k_m, gguf-q4_k_m with llama-cpp-python installed.",
)
@click.option("--push", metavar="ORG/NAME", help="Then upload it to the Hub; the token is read from HF_TOKEN.")
def export(places: tuple[Path, ...], form: str, push: str | None) -> None:
    """Write the tuned model to DIR for a server, read back and compared."""
    from educe.cli.screens import say
    from educe.recipes.run import Run
    from educe.recipes.which import run_or_last_stage

    run_dir, target = _ordered(places)
    run = Run(run_or_last_stage(run_dir, say))
    run.export(target, form=form, push=push, say=say)
    settings = run.dir.load(run.dir.provenance).get("template_settings")
    serve = ""
    if form == "merged" and not settings:  # with some, a line above says how to serve it
        serve = f" Serve it: vllm serve {target}   or: transformers serve {target}"
    elif form.startswith("gguf"):
        (file,) = target.glob("*.gguf")
        serve = (
            f" Serve it: llama-server -m {file} --jinja   or: ollama create {run.recipe.name} -f {target / 'Modelfile'}"
        )
    click.echo(f"Exported to {target}.{serve}")


def _ordered(places: tuple[Path, ...]) -> tuple[Path | None, Path]:
    """RUN, if it is named, and DIR. Raises `UsageError`, for the two the other way round too."""
    if len(places) > 2:
        raise UsageError(101, "export", f"takes RUN and DIR, not {len(places)} paths.", "educe export [RUN] DIR")
    are_runs = [_is_run(p) for p in places]
    if are_runs == [False, True]:
        found = f"{places[0]} is no run, and {places[1]} is one: RUN comes first."
        raise UsageError(101, "export", found, f"educe export {places[1]} {places[0]}")
    if are_runs == [True]:
        raise UsageError(101, "export", f"{places[0]} is a run; DIR is missing.", f"educe export {places[0]} DIR")
    return (places[0] if len(places) == 2 else None), places[-1]


def _is_run(place: Path) -> bool:
    """RUN, or RUN#STAGE."""
    run, _, stage = place.name.rpartition("#")
    if run and stage and not place.exists():
        return is_staged(place.with_name(run))
    return (place / "recipe.resolved.json").is_file() or is_staged(place)
