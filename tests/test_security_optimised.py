"""The same refusals under `python -O`, where an `assert` is nothing: a process of its own plays the payloads, this one judges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
HERE = Path(__file__).parent

# It asserts nothing: it prints what happened.
PLAY = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
model, place, found = Path(sys.argv[2]), Path(sys.argv[3]), {}
from educe.cli.main import main
from educe.config import load_recipe
from educe.errors import EduceError
from educe.training.checkpoint import newest_checkpoint
from payloads import PAYLOADS
from security_job import write_job
from test_security_files import TRICKS, make
from test_security_secrets import KEYS, RECIPE
from test_security_secrets import TRICKS as RECIPES

def educe(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([str(w) for w in words])
        except SystemExit as e:
            return e.code, said.getvalue()

for number, (what, (plant, code)) in enumerate(PAYLOADS.items()):
    here = place / f"model {number}"
    here.mkdir()
    shutil.copytree(model, here / "model")
    plant(here / "model", here / "ran")
    exit_code, said = educe("train", write_job(here / "job", here / "model"))
    found["model: " + what] = exit_code == 2 and code in said and not (here / "ran").exists()
for number, (what, (spoil, words)) in enumerate(TRICKS.items()):
    here = place / f"checkpoint {number}"
    here.mkdir()
    make(here, 1)
    spoil(make(here, 2))
    said = []
    got = newest_checkpoint(here, said.append, quarantine=True)
    found["checkpoint: " + what] = got is not None and got[0].name == "step-000001" and not (here / "ran").exists()
for what, text in {**RECIPES, **{k: "# " + v.replace("\\n", " ") + "\\n" for k, v in KEYS.items()}}.items():
    (place / "recipe.yaml").write_text(RECIPE.format(text), encoding="utf-8", errors="surrogatepass")
    try:
        load_recipe(place / "recipe.yaml")
        found["recipe: " + what] = False
    except EduceError:
        found["recipe: " + what] = True
print(json.dumps([__debug__, found]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="pipes and links are others there")
def test_nothing_hangs_on_an_assert(tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONOPTIMIZE": "1", "EDUCE_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-c", PLAY, str(HERE), str(tiny_model), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    debug, found = json.loads(done.stdout.splitlines()[-1])
    assert debug is False  # it did run without asserts
    assert len(found) > 95
    assert [what for what, refused in found.items() if not refused] == []
