"""All thirty, in the order of their numbers."""

from __future__ import annotations

from zoo_data import IN_DATA
from zoo_model import IN_MODEL
from zoo_ranks import IN_RANKS
from zoo_run import IN_RUNS
from zoo_stand import Failure

ZOO: tuple[Failure, ...] = tuple(sorted((*IN_DATA, *IN_MODEL, *IN_RUNS, *IN_RANKS), key=lambda f: f.number))
