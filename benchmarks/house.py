"""Draw the house for CONTRIBUTING.md: the packages of lm, and which imports which, as a graph in Mermaid.

    python benchmarks/figures.py house

An arrow that others imply is left out: where a imports b and b imports c, a may import c. Modules that are not packages
are on the ground and used by all; their arrows are left out as well.
"""

from itertools import product

import grimp

ROOT = "lm"


def packages(graph: grimp.ImportGraph) -> dict[str, set[str]]:
    """Return the packages right below the root, and which others each of them imports."""
    boxes = {child for child in graph.find_children(ROOT) if graph.find_children(child)}

    def box(module: str) -> str:
        return ".".join(module.split(".")[:2])

    pairs = {
        (box(module), box(used))
        for module in graph.modules
        for used in graph.find_modules_directly_imported_by(module)
        if box(module) != box(used)
    }
    return {name: {used for user, used in pairs if user == name and used in boxes} for name in sorted(boxes)}


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    """Return all that a package imports, directly or not."""
    found: set[str] = set()
    ahead = list(edges[start])
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += edges[name]
    return found


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the arrows that no others imply.

    Raises:
        ValueError: Packages import each other in a circle.
    """
    below = {name: reachable(edges, name) for name in edges}
    if circle := sorted(name for name in edges if name in below[name]):
        raise ValueError(f"a circle of imports: {', '.join(circle)}")
    return {name: {a for a in used if not any(a in below[b] for b in used)} for name, used in edges.items()}


def drawing() -> str:
    """Return the drawing as a fenced block."""
    graph = grimp.build_graph(ROOT, exclude_type_checking_imports=True, cache_dir=None)
    edges = reduced(packages(graph))
    ground = sorted(graph.find_children(ROOT) - edges.keys() - {f"{ROOT}.__main__"})
    short = {name: name.removeprefix(f"{ROOT}.") for name in edges}
    lines = [f"    {short[user]} --> {short[used]}" for user, used in product(edges, edges) if used in edges[user]]
    alone = [f"    {short[name]}" for name in edges if not any(name in {a, *b} for a, b in edges.items() if b)]
    names = ", ".join(name.removeprefix(f"{ROOT}.") for name in ground)
    return "\n".join(["```mermaid", "graph TD", *lines, *alone, f'    ground["{names}: used by all"]', "```\n"])


if __name__ == "__main__":
    print(drawing(), end="")
