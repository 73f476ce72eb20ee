"""OpenAssistant's trees of messages → paths through them, each a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from educe.data.tools import Row, Unfit, a_kind

_ROLES = {"prompter": "user", "assistant": "assistant"}
Path = tuple[Row, ...]


def paths_of(root: Any, *, best: bool, max_rank: int | None) -> list[Path]:
    """Paths from the root to an answer, as nodes: with `best` one, through the best-ranked answer (or the first) at each turn; else
    all, the best first. Messages that were deleted or rejected in review, and answers ranked worse than `max_rank` (0 is the best)
    are left out, with what follows them. Raises `Unfit` where nothing is left.
    """
    if not isinstance(root, dict):
        raise Unfit("E-DATA-152", f"prompt is {a_kind(root)}, no message.", "Give the tree's first message.")
    if root.get("parent_id") not in _NO_PARENT:
        said = "a message whose parent does not stand before it."
        raise Unfit("E-DATA-152", said, "Keep a tree's messages together in the file, parents first.")
    found: list[Path] = []
    stack: list[Path] = [(root,)] if _usable(root, None) else []
    while stack:
        path = stack.pop()
        replies = path[-1].get("replies")
        replies = replies if isinstance(replies, list) else []
        kept = [r for r in replies if isinstance(r, dict) and _usable(r, max_rank)]
        kept.sort(key=lambda r: r["rank"] if isinstance(r.get("rank"), int) else 1_000_000)
        if best:
            kept = kept[:1]
        if not kept or (path[-1]["role"] == "assistant" and not any(_answered(r) for r in kept)):
            end = path if path[-1]["role"] == "assistant" else path[:-1]
            if end and end not in found:
                found.append(end)
        stack += [(*path, r) for r in reversed(kept)]
    found = [p for p in found if not any(len(q) > len(p) and q[: len(p)] == p for q in found)]
    if not found:
        raise Unfit("E-DATA-152", "the tree has no answer that is kept.", "Keep more: trees: {max_rank: ...}.")
    return found


def turns_of(path: Path) -> list[Row]:
    return [{"role": _ROLES.get(n.get("role", ""), n.get("role")), "content": n.get("text")} for n in path]


def _usable(node: Row, max_rank: int | None) -> bool:
    if node.get("deleted") or node.get("review_result") is False or not _known(node.get("role")):
        return False
    rank = node.get("rank")
    return max_rank is None or node["role"] != "assistant" or not isinstance(rank, int) or rank <= max_rank


def _known(role: Any) -> bool:
    return isinstance(role, str) and role in _ROLES


def _answered(node: Row) -> bool:
    return bool(node.get("replies"))


_NO_PARENT = (None, "", 0, -1)


def is_message(row: Any) -> bool:
    """Whether a row is one message of a tree: several rows make a tree."""
    have = isinstance(row, dict) and "parent_id" in row and "text" in row and "replies" not in row
    return have and isinstance(row.get("message_id"), (str, int))


def joined(rows: Iterable[tuple[Any, Any]], *, messages: bool) -> Iterator[tuple[Any, Any]]:
    """(place, row) of a file; with `messages`, those that follow each other and belong to one tree become one row, the tree, at the
    place of its first message. Other rows pass. A message whose parent does not stand before it begins a tree of its own, which
    `paths_of` refuses.
    """
    place: Any = None
    nodes: dict[str | int, Row] = {}
    for at, row in rows:
        mine = messages and is_message(row)
        parent = nodes.get(row["parent_id"]) if mine and isinstance(row["parent_id"], (str, int)) else None
        if nodes and (parent is None or row["message_id"] in nodes):
            yield place, _tree(nodes)
            nodes, parent = {}, None
        if not mine:
            yield at, row
            continue
        place = place if nodes else at
        nodes[row["message_id"]] = {**row, "replies": []}
        if parent is not None:
            parent["replies"].append(nodes[row["message_id"]])
    if nodes:
        yield place, _tree(nodes)


def _tree(nodes: Mapping[str | int, Row]) -> Row:
    first = next(iter(nodes.values()))
    return {"message_tree_id": first.get("message_tree_id", first["message_id"]), "prompt": first}
