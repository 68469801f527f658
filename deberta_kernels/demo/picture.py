"""Bars side by side for the same inputs, with what the patched model gained written into its bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PATCHED", "STOCK", "Bar", "Panel", "figure_of", "gain"]

STOCK, PATCHED = "#b45309", "#0f766e"
_BAR_INCHES = 0.26
_ROOM = 0.15  # of the longest bar: shorter ones have no room for words


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        value: its length, in the panel's unit; None = not measured, no bar.
        colour: STOCK or PATCHED.
        written: what stands in it; "" = nothing.
    """

    value: float | None
    colour: str
    written: str = ""


@dataclass(frozen=True)
class Panel:
    """One quantity.

    Attributes:
        title: what it is and its unit.
        groups: name of an input or a model -> its bars.
        logarithmic: for values of several sizes.
    """

    title: str
    groups: Mapping[str, Sequence[Bar]]
    logarithmic: bool = True


def gain(before: float | None, after: float | None, word: str = "") -> str:
    """Return how many times as large `before` is, as "12.9x", with a word; "" where one is missing or nothing."""
    if not before or not after:
        return ""
    times = before / after
    return (f"{times:.1f}x" if times < 99.5 else f"{times:.0f}x") + (f" {word}" if word and times > 1 else "")


def figure_of(title: str, conditions: str, panels: Sequence[Panel], legend: bool = True) -> Any:
    """Draw panels side by side.

    Args:
        title: what to see.
        conditions: under the title, in small letters: what was measured on what.
        panels: the quantities; the same groups in each.
        legend: say which colour is which.

    Returns:
        A figure of matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = max(sum(len(group) + 0.6 for group in panel.groups.values()) for panel in panels)
    figure = Figure(figsize=(4.8 * len(panels), 1.6 + bars * _BAR_INCHES), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        _draw_panel(axis, panel)
    if legend:
        _draw_legend(figure)
    room = "\n" * (conditions.count("\n") + 1)
    figure.suptitle(title + room, fontsize=12, fontweight="bold")
    figure.text(0.5, 1 - 0.36 / figure.get_figheight(), conditions, ha="center", va="top", fontsize=7.5)
    return figure


def _draw_panel(axis: Any, panel: Panel) -> None:
    shown = [bar.value for group in panel.groups.values() for bar in group if bar.value]
    low = min(shown, default=1.0) / 6 if panel.logarithmic else 0.0
    high = max(shown, default=1.0)
    place, ticks = 0.0, []
    for group in panel.groups.values():
        ticks.append(place + (len(group) - 1) / 2)
        for bar in group:
            if bar.value:
                axis.barh(place, bar.value, height=0.92, color=bar.colour)
                _label(axis, place, bar, inside=panel.logarithmic or bar.value > _ROOM * high)
            place += 1
        place += 0.6
    axis.set_yticks(ticks, list(panel.groups))
    axis.tick_params(labelsize=8)
    axis.set_ylim(place - 0.8, -0.8)
    if panel.logarithmic:
        axis.set_xscale("log")
    axis.set_xlim(low, high * (3 if panel.logarithmic else 1.2))
    axis.set_xticks([])
    axis.minorticks_off()
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_title(f"{panel.title}{' (log scale)' if panel.logarithmic else ''}", fontsize=9, loc="left")


def _label(axis: Any, place: float, bar: Bar, inside: bool) -> None:
    assert bar.value is not None
    value = f"{bar.value:,.{0 if bar.value >= 10 else 1}f}"
    beside = f" {value}" if inside or not bar.written else f" {value} ({bar.written})"
    axis.text(bar.value, place, beside, va="center", ha="left", fontsize=7.5)
    if inside and bar.written:
        style = {"fontsize": 8, "color": "white", "fontweight": "bold"}
        axis.text(bar.value, place, f"{bar.written} ", va="center", ha="right", **style)


def _draw_legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=STOCK, label="Hugging Face"), Patch(color=PATCHED, label="patched")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
