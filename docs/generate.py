"""Write what the pages take from the code: the picture and lists of rooms, the settings, the metrics.

    python docs/generate.py

The picture, docs/architecture.svg, comes from the imports in grpo_lab/, the order of the rooms from ROOMS in
tests/test_house.py, the rest from docstrings. tests/test_architecture.py fails when one of them has changed: then run
this again. The picture's description holds the graph that was drawn, for that test.
"""

import ast
import json
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_house import MODULES, PACKAGE, ROOMS, imports_of, module_of  # noqa: E402

from grpo_lab.training.config import GRPOConfig  # noqa: E402
from grpo_lab.training.metrics import METRICS  # noqa: E402

WIDTH, LINE, GAP = 9.0, 0.19, 0.42  # inches: of the picture, of a line of text, between two levels
SPANS = {
    "cli": (0.28, 1.0), "interop": (0.0, 0.2), "planning": (0.28, 0.6), "course": (0.66, 1.0),
    "training": (0.0, 0.48), "tasks": (0.52, 1.0), "rewards": (0.0, 1.0), "rollout": (0.0, 1.0),
    "models": (0.52, 1.0), "hardware": (0.52, 1.0), "algorithm": (0.0, 0.48),
}  # fmt: skip
"""Where a room lies from left to right; its level follows from its arrows."""
FOLDERS = {
    "notebooks/": "The course; solutions/ holds the solved notebooks, and make.py, which makes the others from them.",
    "runs/": "Recorded runs, with a card for each group: sweeps, presets, collapses.",
    "tests/": "In the folders of the rooms; cli/test_seed.py holds every promise of the specification.",
    "benchmarks/": "Where the figures come from.",
    "docs/": "Commands, runs, hardware, correctness, speed, architecture; and LOG.md, what was tried and failed.",
    "binder/": "What Binder builds.",
}
"""What stands beside the package."""


def architecture() -> dict[str, dict[str, list[str]]]:
    """Return the modules of each room, and the rooms that it imports from; rooms from the bottom up."""
    modules: dict[str, set[str]] = {room: set() for room in [*ROOMS, "interop"]}
    imports: dict[str, set[str]] = {room: set() for room in modules}
    for path in MODULES:
        room, *rest = module_of(path).split(".")
        if room not in modules:  # the package itself, and train_grpo, which only calls the command line
            continue
        imports[room] |= {other.split(".")[0] for other in imports_of(path)} - {room}
        if rest:
            modules[room].add(rest[0] if len(rest) == 1 and path.name != "__init__.py" else f"{rest[0]}/")
    shown = {room: sorted(name for name in names if not name.startswith("__")) for room, names in modules.items()}
    return {"modules": shown, "imports": {room: sorted(others) for room, others in imports.items()}}


def drawn_graph() -> dict[str, dict[str, list[str]]]:
    """Return what the committed picture shows, from its description."""
    text = PICTURE.read_text(encoding="utf-8")
    return json.loads(re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)[1])


def arrows(imports: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return the imports that follow from no others: an arrow from a to c is left out where a leads to b and b to c."""

    def reach(room: str) -> set[str]:
        return {far for other in imports[room] for far in {other, *reach(other)}}

    return [
        (room, other)
        for room, others in imports.items()
        for other in others
        if not any(other in reach(between) for between in others)
    ]


def levels(imports: dict[str, list[str]]) -> dict[str, int]:
    """Return how many rooms stand below each, one on the other."""
    found: dict[str, int] = {}
    while len(found) < len(imports):
        for room, others in imports.items():
            if room not in found and all(other in found for other in others):
                found[room] = 1 + max((found[other] for other in others), default=-1)
    return found


def draw(graph: dict[str, dict[str, list[str]]]) -> Figure:
    """Draw rooms in levels, the bottom one last, and arrows down."""
    level, lines = levels(graph["imports"]), {}
    for room, modules in graph["modules"].items():
        left, right = SPANS[room]
        lines[room] = textwrap.wrap("   ".join(modules), int((right - left) * WIDTH * 11.5)) or ["a module"]
    heights = [max(2.05 + len(lines[r]) for r in lines if level[r] == n) * LINE for n in range(max(level.values()) + 1)]
    total = sum(heights) + GAP * (len(heights) - 1) + 0.2
    figure = Figure((WIDTH, total))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(-0.1, WIDTH + 0.1), ylim=(-0.1, total - 0.1))
    panel.axis("off")
    bottom = [sum(heights[:n]) + GAP * n for n in range(len(heights))]
    for room, words in lines.items():
        (left, right), n = (x * WIDTH for x in SPANS[room]), level[room]
        box = FancyBboxPatch(
            (left + 0.06, bottom[n] + 0.06), right - left - 0.12, heights[n] - 0.12,
            boxstyle="round,pad=0.06", facecolor="#D6E8F5" if room == "algorithm" else "#F3F4F5", edgecolor="#5A6670",
        )  # fmt: skip
        panel.add_patch(box)
        top = bottom[n] + heights[n] - 0.1
        panel.text(left + 0.12, top, room, va="top", fontsize=12, fontweight="bold")
        panel.text(left + 0.12, top - 0.25, "\n".join(words), va="top", fontsize=9, color="#333333", linespacing=1.25)
    for above, below in arrows(graph["imports"]):
        ends = [SPANS[above], SPANS[below]]
        low, high = max(left for left, _ in ends), min(right for _, right in ends)
        # straight down where one stands over the other, else between the corners that face each other
        start, end = ((low + high) / 2,) * 2 if low < high else (low + 0.03, high - 0.03)
        if SPANS[above][0] < SPANS[below][0]:
            start, end = end, start
        panel.annotate(
            "", (end * WIDTH, bottom[level[below]] + heights[level[below]]), (start * WIDTH, bottom[level[above]]),
            arrowprops={"arrowstyle": "-|>", "color": "#0072B2", "linewidth": 1.6, "shrinkA": 1, "shrinkB": 1},
        )  # fmt: skip
    return figure


def purpose(room: str) -> list[str]:
    """Return the paragraphs of the docstring in a room's `__init__`, each in one line."""
    text = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    return [" ".join(paragraph.split()) for paragraph in ast.get_docstring(ast.parse(text)).split("\n\n")]


def table_of_rooms() -> str:
    """Return the rooms from the bottom up, with what is in them and what may not be."""
    rows = [f"| [`{room}/`](../grpo_lab/{room}) | {' '.join(purpose(room))} |" for room in ROOMS]
    return "\n".join(["| room | what is in it |", "|---|---|", *rows])


def tree() -> str:
    """Return the folders, a line each."""
    rooms = {f"  {room}/": purpose(room)[0] for room in ROOMS}
    rooms |= {"  interop.py": ast.get_docstring(ast.parse((PACKAGE / "interop.py").read_text("utf-8"))).split("\n")[0]}
    lines = [f"{name:14}{words}" for name, words in (rooms | FOLDERS).items()]
    return "\n".join(["```text", "grpo_lab/", *lines, "```"])


def table_of_settings() -> str:
    """Return the fields of GRPOConfig with their defaults and docstrings."""
    docs = GRPOConfig.docs()
    rows = []
    for field in fields(GRPOConfig):
        default = f"`{field.default}`" if field.default not in (None, ()) else ""
        if isinstance(field.default, bool):
            default = "on" if field.default else "off"
        rows.append(f"| `{field.name}` | {default} | {' '.join(docs[field.name].split())} |")
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows])


def table_of_metrics() -> str:
    """Return the names of METRICS with their meanings."""
    return "\n".join(["| metric | |", "|---|---|", *(f"| `{name}` | {words} |" for name, words in METRICS.items())])


PARTS = {
    ROOT / "README.md": ("tree", tree),
    ROOT / "docs" / "ARCHITECTURE.md": ("rooms", table_of_rooms),
    ROOT / "docs" / "COMMANDS.md": ("settings", table_of_settings),
    ROOT / "docs" / "RUNS.md": ("metrics", table_of_metrics),
}
"""What is written between `<!-- name -->` and `<!-- /name -->` of a page."""


def rewritten(page: Path) -> str:
    """Return the page with its part as it should be today."""
    name, write = PARTS[page]
    before, rest = page.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- /{name} -->")[1]
    return f"{before}<!-- {name} -->\n{write()}\n<!-- /{name} -->{after}"


def main() -> None:
    """Write all of it."""
    for page in PARTS:
        page.write_text(rewritten(page), encoding="utf-8")
    matplotlib.rcParams["svg.hashsalt"] = "grpo-lab"  # the same bytes every time
    graph = architecture()
    draw(graph).savefig(PICTURE, metadata={"Description": json.dumps(graph), "Date": None, "Creator": None})


if __name__ == "__main__":
    main()
