"""Connected components by walking along the edges, one node after the other."""

from __future__ import annotations


def components_by_search(edges: list[tuple[int, int]], nodes: int) -> list[int]:
    """The smallest node that each node is connected with."""
    smallest = list(range(nodes))
    for start in range(nodes):
        reached, open_nodes = {start}, [start]
        while open_nodes:
            node = open_nodes.pop()
            for one, other in edges:
                for here, there in ((one, other), (other, one)):
                    if here == node and there not in reached:
                        reached.add(there)
                        open_nodes.append(there)
        smallest[start] = min(reached)
    return smallest
