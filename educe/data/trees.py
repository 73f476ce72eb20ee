"""OpenAssistant's trees of messages → paths through them, each a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from educe.data.tools import Row, Unfit, a_kind

_ROLES = {"prompter": "user", "assistant": "assistant"}
Path = tuple[Row, ...]


def paths_of(root: Any, *, best: bool, max_rank: int | None, languages: Sequence[str]) -> list[Path]:
    """Paths from the root to an answer, as nodes: with `best` one, through the best-ranked answer (or the first) at each turn; else
    all, the best first. Messages that were deleted or rejected in review, answers ranked worse than `max_rank` (0 is the best)
    and other languages are left out, with what follows them. Raises `Unfit` where nothing is left.
    """
    if not isinstance(root, dict):
        raise Unfit("E-DATA-152", f"prompt is {a_kind(root)}, no message.", "Give the tree's first message.")
    found: list[Path] = []
    stack: list[Path] = [(root,)] if _usable(root, None, languages) else []
    while stack:
        path = stack.pop()
        replies = path[-1].get("replies") or []
        kept = [r for r in replies if isinstance(r, dict) and _usable(r, max_rank, languages)]
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
        raise Unfit("E-DATA-152", "the tree has no answer that is kept.", "Keep more: trees: {max_rank, languages}.")
    return found


def turns_of(path: Path) -> list[Row]:
    return [{"role": _ROLES.get(n.get("role", ""), n.get("role")), "content": n.get("text")} for n in path]


def _usable(node: Row, max_rank: int | None, languages: Sequence[str]) -> bool:
    if node.get("deleted") or node.get("review_result") is False or node.get("role") not in _ROLES:
        return False
    if languages and node.get("lang") not in languages:
        return False
    rank = node.get("rank")
    return max_rank is None or node["role"] != "assistant" or not isinstance(rank, int) or rank <= max_rank


def _answered(node: Row) -> bool:
    return bool(node.get("replies"))


def is_message(row: Row) -> bool:
    """Whether a row is one message of a tree: several rows make a tree."""
    return "message_id" in row and "parent_id" in row and "text" in row and "replies" not in row


def joined(rows: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """(place, row) of a file; messages that follow each other and belong to one tree become one row, the tree, at the place of its
    first message. Other rows pass."""
    place: Any = None
    tree: list[Row] = []
    for at, row in rows:
        mine = isinstance(row, dict) and is_message(row)
        if tree and not (mine and row.get("parent_id") is not None):
            yield place, _tree(tree)
            tree = []
        if not mine:
            yield at, row
            continue
        place = place if tree else at
        tree.append(row)
    if tree:
        yield place, _tree(tree)


def _tree(messages: Sequence[Row]) -> Row:
    """Messages, parents before their replies, as one tree; the replies of a message that is not there are left out with it."""
    nodes = {m["message_id"]: {**m, "replies": []} for m in messages}
    for m in messages[1:]:
        if (parent := nodes.get(m["parent_id"])) is not None:
            parent["replies"].append(nodes[m["message_id"]])
    first = messages[0]
    return {"message_tree_id": first.get("message_tree_id", first["message_id"]), "prompt": nodes[first["message_id"]]}
