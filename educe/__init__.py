"""educe: supervised fine-tuning, from a file of examples to a model you can serve, with proof of what tuning did.

import educe

educe.init("tickets.jsonl")             # writes recipe.yaml
run = educe.train("recipe.yaml")
print(run.eval()["verdict"])
run.export("tuned")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "check", "curve", "init", "inspect", "lr", "prepare", "template", "train"]

if TYPE_CHECKING:
    from educe.recipes.run import Run, check, curve, init, inspect, lr, prepare, template, train


def __getattr__(name: str) -> Any:
    """Load the API on first use: `import educe` alone is instant."""
    if name in __all__:
        from educe.recipes import run

        return getattr(run, name)
    raise AttributeError(f"module 'educe' has no attribute {name!r}")
