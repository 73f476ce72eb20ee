"""What must be instant: the package, its help and the rooms that need no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "safetensors", "lm_eval")
ROOMS = ("types", "errors", "config", "files", "seeds", "stats", "data", "chat", "store", "pack", "report")

IMPORT_ALL = """
import importlib, pkgutil, sys
for room in {rooms!r}:
    module = importlib.import_module("educe." + room)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(found.name)
print(*(sorted(m for m in sys.modules if m.startswith("educe."))))
print(*(m for m in {heavy!r} if m in sys.modules))
"""


def python(code: str) -> list[str]:
    """Lines that `python -c code` prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_educe_imports_next_to_nothing() -> None:
    slow = (*HEAVY, "pydantic", "numpy", "jinja2", "tokenizers", "huggingface_hub", "click", "rich")
    assert python(f"import educe, sys; print([m for m in {slow!r} if m in sys.modules])") == ["[]"]


def test_the_api_is_there_on_first_use() -> None:
    code = "import educe, sys; print(educe.train.__name__, educe.Run.__name__, 'torch' in sys.modules); educe.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["train", "Run", "False"]
    assert "AttributeError: module 'educe' has no attribute 'nothing'" in done.stderr


def test_light_rooms_import_no_torch() -> None:
    modules, heavy = python(IMPORT_ALL.format(rooms=ROOMS, heavy=HEAVY))
    assert {f"educe.{r}" for r in ROOMS} <= set(modules.split())
    assert {"educe.chat.render", "educe.data.sources", "educe.report.page"} <= set(modules.split())
    assert heavy == ""


def test_help_lists_the_job_in_order_then_the_rest() -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print(sorted(m for m in sys.modules if m in "
        f"{(*HEAVY, 'pydantic', 'numpy')!r}))); from educe.cli.main import main; main(['--help'])"
    )
    text = "\n".join(python(code))
    first, more = text.split("The job, in order:")[1].split("More:")
    assert re.findall(r"(?m)^  (\w+) ", first) == [
        "init", "check", "inspect", "train", "eval", "report", "chat", "export"
    ]  # fmt: skip
    assert re.findall(r"(?m)^  (\w+) ", more) == [
        "blend", "curve", "data", "judge", "ledger", "lr", "prepare", "quickstart", "rows", "serve", "template", "watch"]  # fmt: skip
    assert text.endswith("[]")


def test_a_mistake_in_a_recipe_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: a\nmodel: m\ndata: {train: t.jsonl}\ntrain: {epochs: 0.3}\n")
    code = (
        f"import sys, atexit; atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules])); "
        f"from educe.cli.main import main; main(['train', {str(tmp_path / 'r.yaml')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "train.epochs is 0.3" in done.stderr
    assert done.stdout.strip() == "[]"


def test_the_terminal_draws_no_pictures_for_names() -> None:
    code = "from educe.cli.screens import say; say('grading by grade.py:boom: it runs as you')"
    assert "grade.py:boom: it runs" in "".join(python(code))
