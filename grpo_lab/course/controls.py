"""Sliders, lists and buttons with names, for the figures of the notebooks."""

import html
import json
from collections.abc import Callable, Sequence
from functools import partial

import ipywidgets


def slider(label: str, low: float, high: float, value: float, step: float = 1) -> ipywidgets.Box:
    """Return a slider beside a field with its name and number, each following the other.

    `.value` and `.observe` of the slider are those of the result's `control`.
    """
    whole = all(float(x).is_integer() for x in (low, high, value, step))
    Slider, Field = (
        (ipywidgets.IntSlider, ipywidgets.BoundedIntText) if whole else
        (ipywidgets.FloatSlider, ipywidgets.BoundedFloatText)
    )  # fmt: skip
    settings = {"min": low, "max": high, "value": value, "step": step}
    control = Slider(**settings, readout=False, layout=ipywidgets.Layout(width="220px"))
    field = Field(**settings, description=label, style={"description_width": "initial"},
                  layout=ipywidgets.Layout(width=f"{len(label) * 8 + 90}px"))  # fmt: skip

    def show(change) -> None:  # the browser adds steps up, and 0.44000000000000006 is no number to show
        field.value = round(change.new, 6)

    def move(change) -> None:
        if abs(change.new - control.value) > step / 1000:
            control.value = change.new

    control.observe(show, "value")
    field.observe(move, "value")
    return _row(partial(slider, label, low, high, step=step), control, field, _spoken(label))


def choice(label: str, options: Sequence[str], value: str | None = None) -> ipywidgets.Box:
    """Return a row of buttons, one of which is pressed."""
    control = ipywidgets.ToggleButtons(
        options=list(options), value=value or options[0], style={"button_width": "auto"},
        layout=ipywidgets.Layout(width="max-content"),
    )  # fmt: skip
    return _row(partial(choice, label, options), control, ipywidgets.Label(label))  # its own label would stand above


def steps(label: str, options: Sequence[str], value: str | None = None) -> ipywidgets.Box:
    """Return a slider over ordered words, or numbers that are not evenly spaced, beside a list of them."""
    settings = {"options": list(options), "value": value or options[0]}
    control = ipywidgets.SelectionSlider(**settings, readout=False, layout=ipywidgets.Layout(width="220px"))
    field = ipywidgets.Dropdown(**settings, description=label, style={"description_width": "initial"},
                                layout=ipywidgets.Layout(width=f"{len(label) * 8 + 90}px"))  # fmt: skip

    def show(change) -> None:
        field.value = change.new

    def move(change) -> None:
        control.value = change.new

    control.observe(show, "value")
    field.observe(move, "value")
    return _row(partial(steps, label, options), control, field, _spoken(label, list(map(str, options))))


def _row(anew: Callable[..., ipywidgets.Box], control, field, *more: ipywidgets.Widget) -> ipywidgets.Box:
    layout = ipywidgets.Layout(margin="0 24px 0 0", align_items="center")
    row = ipywidgets.HBox([field, control, *more], layout=layout)
    row.control, row.anew = control, anew
    return row


# An image that cannot be loaded runs this in the browser: `this` is the image, beside the slider.
SPEAK = """const image = this, words = %s;
(function named(tries) {
  const handle = image.closest('.widget-hbox')?.querySelector('[role=slider]');
  if (!handle) return tries && setTimeout(named, 100, tries - 1);
  const say = () => {
    const text = words ? words[Math.round(handle.ariaValueNow)] : String(+(+handle.ariaValueText).toFixed(6));
    if (handle.ariaValueText !== text) handle.ariaValueText = text;
  };
  handle.ariaLabel = %s;
  new MutationObserver(say).observe(handle, {attributeFilter: ['aria-valuetext']});
  say();
})(50)"""


def _spoken(name: str, words: Sequence[str] | None = None) -> ipywidgets.HTML:
    """Return a hidden widget that tells a screen reader the slider's name and its rounded value, or its word.

    ipywidgets' sliders have no accessible name, and say 0.30000000000000004 or the number of an option.
    """
    script = html.escape(SPEAK % (json.dumps(words), json.dumps(name)), quote=True)
    tag = f'<img alt="" src="data:," onerror="{script}">'
    return ipywidgets.HTML(tag, layout=ipywidgets.Layout(display="none"))
