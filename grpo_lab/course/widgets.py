"""Figures that follow sliders, a dashboard for a run, and a browser for its samples.

Where no widget runs (GitHub, nbviewer, a PDF) each of them is shown as a picture, and in words with rounded numbers;
the tests of the notebooks compare the words.
"""

import ast
import base64
import html
import inspect
import io
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets
import numpy as np
from IPython.display import HTML, Markdown, display
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

from grpo_lab.course.controls import choice as choice
from grpo_lab.course.controls import slider
from grpo_lab.course.controls import steps as steps  # lessons import all three from here
from grpo_lab.course.tables import completions_table, progress_bar
from grpo_lab.training.figures import training_figure
from grpo_lab.training.metrics import JsonLines

SCREEN_DPI, PRINT_DPI = 80, 160  # a slider's answer should come at once; what is saved should be sharp
Record = TypeVar("Record")


class _Controlled:
    """Controls above a view that is redrawn whenever a control changes; each control is an attribute with its name."""

    def __init__(self, controls: Mapping[str, ipywidgets.Box], view: ipywidgets.Widget, *, continuous: bool = True):
        self._controls = {name: row.control for name, row in controls.items()}
        for name, control in self._controls.items():
            setattr(self, name, control)
            if hasattr(control, "continuous_update"):
                control.continuous_update = continuous
            control.observe(lambda _: self._update(), "value")
        layout = ipywidgets.Layout(flex_flow="row wrap", align_items="center")
        rows = ipywidgets.HBox(list(controls.values()), layout=layout)
        self.widget = ipywidgets.VBox([rows, view])
        self._update()

    @property
    def values(self) -> dict[str, Any]:
        """The current value of each control."""
        return {name: control.value for name, control in self._controls.items()}

    def _update(self) -> None:
        raise NotImplementedError

    def _view(self) -> dict[str, Any]:
        # shown by every front end that has a kernel
        return {
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2, "version_minor": 0, "model_id": self.widget.model_id,
            }
        }  # fmt: skip


class Explorer(_Controlled):
    """A figure that is redrawn when one of its controls changes.

    Args:
        draw: `draw(figure, **values) -> str` draws into the figure and describes it in words and rounded numbers.
            The figure is empty, or has what `ground` drew.
        ground: `ground(figure)` draws what no control changes: axes with their limits, labels and titles. It is called
            once, and `draw` adds to `figure.axes`; a redraw then takes a third of the time.
        size: in inches.
        continuous: redraw while a slider is dragged; use False if a redraw takes more than a tenth of a second.
        controls: `name=slider(...)` or `name=choice(...)`; each is then `explorer.name`, with a `.value`.

    >>> explorer = Explorer(lambda figure, K: f"K = {K}", K=slider("group size K", 2, 64, 8))
    >>> explorer.K.value = 16
    >>> explorer
    K = 16
    >>> explorer.at(K=32), explorer
    (K = 32, K = 16)
    """

    def __init__(self, draw: Callable[..., str], *, ground: Callable[[Figure], None] | None = None, size=(8.0, 3.4),
                 continuous: bool = True, **controls):  # fmt: skip
        self._draw, self._size, self._stage = draw, size, None
        self._again = partial(Explorer, draw, ground=ground, size=size, continuous=continuous)
        self._rows = controls
        if ground is not None:
            ground(figure := Figure(size, SCREEN_DPI))
            self._stage = _Stage(figure)
        self._image = ipywidgets.HTML()
        self._words = ipywidgets.HTML()
        super().__init__(controls, ipywidgets.VBox([self._image, self._words]), continuous=continuous)

    def at(self, **values) -> "Explorer":
        """Return a new Explorer with these values, otherwise the current ones; the present one stays as it is."""
        now = self.values | values
        return self._again(**{name: self._rows[name].anew(value=value) for name, value in now.items()})

    def _update(self) -> None:
        # making a new figure is faster than clearing the old one
        self.figure = self._stage.cleared() if self._stage else Figure(self._size, SCREEN_DPI)
        self.text = self._draw(self.figure, **self.values)
        picture = self._stage.png() if self._stage else png(self.figure, SCREEN_DPI)
        self._image.value = img_tag(picture, self.text, self.figure)
        style = "margin:0; line-height:1.3; white-space:pre-wrap; word-break:normal"
        self._words.value = f"<pre style='{style}'>{html.escape(self.text)}</pre>"

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include=None, exclude=None):
        return _picture(self.figure, self.text, self._view())


class _Stage:
    """A figure whose background is kept as pixels; only what is added to its axes is redrawn."""

    def __init__(self, figure: Figure):
        self.figure, self.canvas = figure, FigureCanvasAgg(figure)
        self.still = set(self._artists())
        self.canvas.draw()
        self.pixels = self.canvas.copy_from_bbox(figure.bbox)

    def cleared(self) -> Figure:
        """Remove what was added to the background, and return the figure."""
        for artist in self._added():
            artist.remove()
        for axes in self.figure.axes:
            axes.containers.clear()  # removed bars leave their container behind,
            axes.set_prop_cycle(None)  # and plots without a colour would get the next one
        return self.figure

    def png(self) -> bytes:
        """Return the picture: the background with what was added on top."""
        self.canvas.restore_region(self.pixels)
        for artist in self._added():
            artist.draw(self.canvas.renderer)
        file = io.BytesIO()
        opaque = np.asarray(self.canvas.buffer_rgba())[..., :3]
        imsave(file, opaque, format="png", pil_kwargs={"compress_level": 1})
        return file.getvalue()

    def _artists(self) -> list[Artist]:
        return [artist for axes in self.figure.axes for artist in axes.get_children()]

    def _added(self) -> list[Artist]:
        return sorted((a for a in self._artists() if a not in self.still), key=Artist.get_zorder)


class Picture:
    """A figure together with its description in words; the tests of the notebooks compare the words."""

    def __init__(self, figure: Figure, text: str):
        self.figure, self.text = figure, text

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include=None, exclude=None):
        return _picture(self.figure, self.text)


def png(figure: Figure, dpi: int) -> bytes:
    """Return the figure as the bytes of a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


def img_tag(picture: bytes, alt: str, figure: Figure) -> str:
    """Return the picture as an HTML image, 80 pixels per inch of the figure's width."""
    width = round(figure.get_figwidth() * SCREEN_DPI)
    data = base64.b64encode(picture).decode()
    return f'<img width="{width}" alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def _png_with_words(figure: Figure, text: str) -> bytes:
    # A front end that shows the picture does not show text/plain, so the words are put into the PNG, below the picture.
    width = figure.get_figwidth()
    columns = int(13.2 * width)  # of DejaVu Sans Mono at 9 points, and a margin
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, columns, subsequent_indent="  ",
                                                                          drop_whitespace=False) or [""]]  # fmt: skip
    below = Figure((width, 0.16 + 0.163 * len(lines)))
    below.text(0.09 / width, 1, "\n".join(lines), va="top", family="monospace", fontsize=9, linespacing=1.25,
               parse_math=False)  # fmt: skip
    pixels = [imread(io.BytesIO(png(part, PRINT_DPI))) for part in (figure, below)]
    file = io.BytesIO()
    imsave(file, np.vstack([rows[..., :3] for rows in pixels]), format="png", metadata={"Software": None})
    return file.getvalue()


def _picture(figure: Figure, text: str, more: Mapping[str, Any] | None = None) -> tuple[dict, dict]:
    data = base64.b64encode(_png_with_words(figure, text)).decode()
    size = {"width": round(figure.get_figwidth() * SCREEN_DPI), "alt": text}
    return {"text/plain": text, "image/png": data, **(more or {})}, {"image/png": size}


def show_source(*functions: Callable, when: object = True) -> Markdown:
    """Return the source of functions of the package, without docstrings and comments for tools.

    when: if this is false, such as the verdict on the learner's own version, show only a line that says so.
    """
    if not when:
        return Markdown("The package's own appears here when yours is right.")
    return Markdown("```python\n" + "\n\n\n".join(map(_code, functions)) + "\n```")


def _code(function: Callable) -> str:
    source = textwrap.dedent(inspect.getsource(function))
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    if ast.get_docstring(definition):
        text = definition.body[0]
        del lines[text.lineno - 1 : text.end_lineno]
    return "\n".join(re.sub(r"  # (fmt: skip|noqa.*)$", "", line) for line in lines)


def watch(records: Iterable[Record], total: int, *, seconds: float = 1.0, rows: int = 8) -> Iterator[Record]:
    """Yield the records of a run, and show them as they come: curves, completions, progress, time left.

    Args:
        records: `trainer.steps()`, or anything with `.metrics` and `.completions`.
        total: the number of records.
        seconds: the time between two pictures; drawing one takes about 0.2 s.
        rows: the number of completions in the table; groups whose rewards differ come first.
    """
    history: list[Mapping[str, Any]] = []
    began = shown = time.perf_counter()
    curves = table = None
    for record in records:
        history.append(record.metrics)
        now = time.perf_counter()
        if curves is None or now - shown >= seconds or len(history) == total:
            left = (now - began) / len(history) * (total - len(history))
            picture = Picture(training_figure(history), _state(history, total))
            words = HTML(progress_bar(len(history), total, left) + completions_table(_telling(record)[:rows]))
            if curves is None:
                curves, table = display(picture, display_id=True), display(words, display_id=True)
            else:
                curves.update(picture)
                table.update(words)
            shown = time.perf_counter()
        yield record


def _telling(record) -> list[Mapping[str, Any]]:
    groups = sorted(_by_prompt(record.completions), key=lambda group: not any(row["advantage"] for row in group))
    return [row for group in groups for row in group]


def _state(history: Sequence[Mapping[str, Any]], total: int) -> str:
    last = {name: value for name, value in history[-1].items() if value is not None}
    names = [name for name in ("reward", "kl", "entropy", "completions/mean_length") if name in last]
    return f"step {len(history)} of {total}: " + ", ".join(f"{name} {last[name]:.3f}" for name in names)


class SampleBrowser(_Controlled):
    """Browse the logged completions: the K completions of a prompt at a step, with rewards and advantages.

    It opens at the last logged step whose rewards differ within a group, on the group where they differ most.
    Tokens are coloured by how far the policy had moved from the reference: the log-ratio in nats.

    Args:
        path: the `completions.jsonl` of a run, or its folder.
        tokenizer: needed to colour each token; without it, completions are shown as plain text.
    Raises: ValueError if the run has logged no completions.
    """

    def __init__(self, path: str | Path, tokenizer=None):
        path = Path(path)
        rows = JsonLines(path / "completions.jsonl" if path.is_dir() else path).read()
        if not rows:
            raise ValueError(f"there are no completions in {path}. Has the run logged a step (logging_steps)?")
        self._tokenizer = tokenizer
        self._steps = sorted({row["step"] for row in rows})
        self._groups = {step: _by_prompt([row for row in rows if row["step"] == step]) for step in self._steps}
        self._view_html = ipywidgets.HTML()
        most = max(len(groups) for groups in self._groups.values())
        differ = [step for step in self._steps if any(map(_spread, self._groups[step]))]
        start = differ[-1] if differ else self._steps[-1]
        spreads = list(map(_spread, self._groups[start]))
        super().__init__(
            {
                "step": slider("logged step", 1, len(self._steps), self._steps.index(start) + 1),
                "prompt": slider("prompt", 1, most, spreads.index(max(spreads)) + 1),
            },
            self._view_html,
        )

    def _update(self) -> None:
        step = self._steps[self.step.value - 1]
        groups = self._groups[step]
        rows = groups[min(self.prompt.value, len(groups)) - 1]
        self.text = f"step {step}, {rows[0]['prompt']}: " + ", ".join(
            f"{row['completion']} ({'no reward' if row['reward'] is None else format(row['reward'], '.2f')})"
            for row in rows
        )
        title = f"<b>step {step}</b> · prompt {min(self.prompt.value, len(groups))} of {len(groups)}"
        self.html = title + completions_table(rows, self._tokenizer)
        self._view_html.value = self.html

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/plain": self.text, "text/html": self.html, **self._view()}


def _spread(group: Sequence[Mapping[str, Any]]) -> float:
    rewards = [row["reward"] for row in group if row["reward"] is not None]
    return max(rewards, default=0.0) - min(rewards, default=0.0)


def _by_prompt(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(str(row["prompt"]), []).append(row)
    return list(groups.values())
