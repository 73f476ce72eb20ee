"""The wheel holds what `pip install` promises."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_carries_data_page_and_licences(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "educe"):  # a copy: building writes beside the sources
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("educe-*.whl"))) as wheel:
        names = set(wheel.namelist())
    wanted = {f"educe/quickstart/{n}" for n in ("train.jsonl", "dev.jsonl", "test.jsonl", "README.md")}
    wanted |= {"educe/report/page.html", "educe/report/page.css", "educe/py.typed"}
    assert wanted <= names
    assert any(n.endswith("LICENSE") for n in names)
    assert not any("tests/" in n for n in names)
