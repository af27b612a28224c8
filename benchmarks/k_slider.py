"""Draw docs/k_slider.gif: notebook 04's slider of the group size K, from 2 to 64 and back.

    python benchmarks/k_slider.py

Each frame is the notebook's own figure (grpo_lab.course.lessons.advantage_figures.draw_groups) under a drawn slider.
"""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from grpo_lab.course.lessons.advantage_figures import draw_groups, ground_of_groups

PICTURE = Path(__file__).parents[1] / "docs" / "k_slider.gif"
DPI, SIZE, P = 96, (9, 5.6), 0.3
STOPS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 26, 32, 40, 48, 56, 64)
STEP, REST = 250, 1800  # milliseconds: while it moves, and at both ends
COLOURS = 128


def pixels(figure: Figure) -> np.ndarray:
    """Return the figure as [height, width, 3] bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def slider(K: int) -> Figure:
    """Draw the slider with its knob at K."""
    figure = Figure((SIZE[0], 0.5), DPI)
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, SIZE[0]), ylim=(0, 0.5))
    panel.axis("off")
    panel.text(0.3, 0.2, f"group size K   {K}", va="center", fontsize=12)
    low, high = 2.2, 5.2
    knob = low + (high - low) * (K - 2) / 62
    panel.plot([low, high], [0.2, 0.2], color="#BBC4CC", linewidth=4, solid_capstyle="round")
    panel.plot([low, knob], [0.2, 0.2], color="#0072B2", linewidth=4, solid_capstyle="round")
    panel.plot(knob, 0.2, "o", color="#0072B2", markersize=11)
    panel.text(SIZE[0] - 0.25, 0.2, f"chance of a right answer p = {P}", va="center", ha="right", color="#5A6670")
    return figure


def frame(K: int) -> np.ndarray:
    """Return the slider at K, and under it what the notebook shows there."""
    figure = Figure(SIZE, DPI)
    ground_of_groups(figure)
    draw_groups(figure, K, P)
    return np.vstack([pixels(slider(K)), pixels(figure)])


def main() -> None:
    """Write the moving picture."""
    frames = {K: Image.fromarray(frame(K)) for K in STOPS}
    # one palette for all frames, else colours flicker; this method keeps white white
    palette = frames[STOPS[1]].quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE)
    course = [*STOPS, *STOPS[-2:0:-1]]
    images = [frames[K].quantize(palette=palette, dither=Image.Dither.NONE) for K in course]
    rests = [REST if K in (STOPS[0], STOPS[-1]) else STEP for K in course]
    images[0].save(PICTURE, save_all=True, append_images=images[1:], duration=rests, loop=0, optimize=True)
    print(f"{PICTURE.name}: {len(images)} frames, {PICTURE.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()
