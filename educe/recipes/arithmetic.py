"""What a model's numbers depend on besides its weights and what it is asked: code, packages, device, arithmetic."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from educe.model.device import Device

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "jinja2")
# Bump when the same model would say something else to the same prompt.
ANSWERS_VERSION = 1


def version_of(package: str) -> str:
    """As installed; "unknown" where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def arithmetic_of(device: Device) -> list[Any]:
    """Of this process: part of the key of whatever is kept of what a model says."""
    return [ANSWERS_VERSION, device.kind, device.dtype, {p: version_of(p) for p in PACKAGES}]
