"""Strongly connected parts of a graph, and shortest ways back: what the list-append checker looks for cycles with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

__all__ = ["components", "path"]

N = TypeVar("N", bound=Hashable)


def components(nodes: Iterable[N], after: Callable[[N], Iterable[N]]) -> list[set[N]]:
    """Strongly connected components of more than one node (Tarjan 1972, without recursion)."""
    index: dict[N, int] = {}
    low: dict[N, int] = {}
    on_stack: set[N] = set()
    stack: list[N] = []
    found: list[set[N]] = []
    for root in nodes:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        work = [(root, iter(after(root)))]
        while work:
            node, ahead = work[-1]
            for following in ahead:
                if following not in index:
                    index[following] = low[following] = len(index)
                    stack.append(following)
                    on_stack.add(following)
                    work.append((following, iter(after(following))))
                    break
                if following in on_stack:
                    low[node] = min(low[node], index[following])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part: set[N] = set()
                    while node not in part:
                        part.add(stack.pop())
                    on_stack -= part
                    if len(part) > 1:
                        found.append(part)
    return found


def path(start: N, end: N, after: Callable[[N], Iterable[N]]) -> list[N] | None:
    """A shortest path from `start` to `end`, both included; None when there is none."""
    came: dict[N, N] = {start: start}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        if node == end:
            return _walked(came, start, end)
        for following in after(node):
            if following not in came:
                came[following] = node
                queue.append(following)
    return None


def _walked(came: Mapping[N, N], start: N, end: N) -> list[N]:
    steps = [end]
    while steps[-1] != start:
        steps.append(came[steps[-1]])
    return steps[::-1]
