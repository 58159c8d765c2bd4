"""The figures of the study's report, as SVG elements to put inside a page.

Colours are written as placeholders and become the page's CSS variables (``--ink``, ``--muted``, ``--grid``,
``--first``, ``--second``, ``--third``), so that one figure serves a light and a dark page; text stays text, in the
page's own font.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitfast.analysis.calibration import ReliabilityDiagram
from vitfast.train.attention_view import AttentionView
from vitfast.train.evaluate import Evaluation
from vitfast.train.loop import EpochLog

__all__ = [
    "FIRST",
    "MUTED",
    "SECOND",
    "THIRD",
    "accuracy_curves",
    "attention_by_offset",
    "attention_distances",
    "attention_on_images",
    "loss_curves",
    "noise_curves",
    "reliability",
    "step_bars",
]

INK, MUTED, GRID, FIRST, SECOND, THIRD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", FIRST: "--first", SECOND: "--second", THIRD: "--third"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vitfast",  # the same figure has the same identifiers in every run
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
_SIZE = (4.4, 2.9)  # inches; small, so that text is readable where a phone shows the figure at its full width

Curves = Sequence[tuple[str, str, Sequence[EpochLog]]]


def accuracy_curves(name: str, curves: Curves) -> str:
    """Accuracy in % over the epochs; ``curves`` holds (title, colour, logs), ``name`` makes its identifiers unique."""

    def draw(figure):
        axes = _epoch_axes(figure, curves, "accuracy (%)")
        lowest = 100.0
        for title, colour, logs in curves:
            epochs = [log.epoch for log in logs]
            held_out = [100 * log.held_out_accuracy for log in logs]
            train = [100 * log.train_accuracy for log in logs]
            axes.plot(epochs, held_out, color=colour, marker="o", markersize=2.5, label=f"{title}, held out")
            axes.plot(epochs, train, color=colour, linestyle=":", label=f"{title}, training")
            lowest = min(lowest, *held_out, *train)
        axes.set_ylim(max(0, lowest - 3), 101)
        axes.legend()

    title = "Accuracy over the epochs: " + "; ".join(
        f"{title} ends at {100 * logs[-1].held_out_accuracy:.1f} % on held-out images" for title, _, logs in curves
    )
    return _svg(name, title, draw)


def loss_curves(name: str, curves: Curves) -> str:
    """Training loss and held-out NLL over the epochs; arguments as in `accuracy_curves`."""

    def draw(figure):
        from matplotlib.ticker import LogLocator, NullLocator

        axes = _epoch_axes(figure, curves, "nats")
        for title, colour, logs in curves:
            epochs = [log.epoch for log in logs]
            held_out = [log.held_out_nll for log in logs]
            axes.plot(epochs, held_out, color=colour, marker="o", markersize=2.5, label=f"{title}, held-out NLL")
            axes.plot(
                epochs, [log.train_loss for log in logs], color=colour, linestyle=":", label=f"{title}, training loss"
            )
        axes.set_yscale("log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
        axes.legend()

    title = "Loss over the epochs: " + "; ".join(
        f"{title} ends at {logs[-1].held_out_nll:.3f} nats on held-out images" for title, _, logs in curves
    )
    return _svg(name, title, draw)


def noise_curves(name: str, curves: Sequence[tuple[str, str, dict[float, Evaluation]]]) -> str:
    """Accuracy in % against the standard deviation of noise, with 95 % intervals; ``curves`` as in `accuracy_curves`,
    with the evaluations by deviation in place of the logs."""

    def draw(figure):
        axes = figure.subplots()
        for title, colour, evaluations in curves:
            deviations = list(evaluations)
            axes.plot(
                deviations,
                [100 * e.accuracy for e in evaluations.values()],
                color=colour,
                marker="o",
                markersize=3,
                label=title,
            )
            low, high = zip(*(e.accuracy_interval for e in evaluations.values()), strict=True)
            axes.fill_between(
                deviations, [100 * a for a in low], [100 * a for a in high], color=colour, alpha=0.15, linewidth=0
            )
        axes.set(xlabel="standard deviation of the noise", ylabel="accuracy (%)", ylim=(0, 101))
        axes.legend()

    title = "Accuracy on images with noise: " + "; ".join(
        f"{title} {100 * evaluations[max(evaluations)].accuracy:.1f} % at deviation {max(evaluations)}"
        for title, _, evaluations in curves
    )
    return _svg(name, title, draw)


def reliability(name: str, title: str, colour: str, diagram: ReliabilityDiagram) -> str:
    """Accuracy against confidence, and below it how many images have that confidence."""

    def draw(figure):
        axes, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        left, width = diagram.edges[:-1].numpy(), diagram.edges.diff().numpy()
        centre = left + width / 2
        filled = (diagram.count > 0).numpy()
        style = {"width": 0.92 * width[filled], "color": colour}
        axes.bar(centre[filled], diagram.accuracy.numpy()[filled], alpha=0.75, **style)
        axes.plot((0, 1), (0, 1), color=INK, linewidth=1, linestyle="--", label="perfectly calibrated")
        axes.plot(
            diagram.confidence.numpy()[filled],
            diagram.accuracy.numpy()[filled],
            color=INK,
            linestyle="none",
            marker="o",
            markersize=3,
            label="mean confidence of the bin",
        )
        axes.set(ylim=(0, 1.04), xlim=(0, 1), ylabel="accuracy", title=title)
        figure.legend(loc="outside upper center", ncols=2)  # beside the axes: the bars may reach anywhere
        shares.bar(centre[filled], 100 * (diagram.count / diagram.count.sum()).numpy()[filled], **style)
        shares.set(ylim=(0, 105), ylabel="images (%)", xlabel="confidence")

    description = (
        f"Reliability diagram of {title}: expected calibration error "
        f"{100 * diagram.expected_calibration_error:.1f} %; {int(diagram.count[-1])} of {int(diagram.count.sum())} "
        "images lie in the bin of highest confidence"
    )
    return _svg(name, description, draw, size=(_SIZE[0], 3.6))


def step_bars(name: str, bars: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Median time of a training step as bars, every single one as a dot; ``bars`` holds (label, colour, seconds)."""
    medians = [1e3 * statistics.median(seconds) for _, _, seconds in bars]

    def draw(figure):
        axes = figure.subplots()
        for place, ((_, colour, seconds), middle) in enumerate(zip(bars, medians, strict=True)):
            axes.barh(place, middle, height=0.62, color=colour, alpha=0.75)
            spread = [place + 0.5 * (i / max(len(seconds) - 1, 1) - 0.5) for i in range(len(seconds))]
            axes.plot([1e3 * s for s in seconds], spread, color=INK, linestyle="none", marker="o", markersize=1.8)
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        # An interrupted step can take ten times as long; it must not squeeze the rest into a corner.
        axes.set_xlim(0, 1.5 * max(medians))
        axes.set_xlabel("milliseconds per training step")

    title = "Median time of a training step: " + "; ".join(
        f"{label.replace(chr(10), ' ')} {middle:.1f} ms" for (label, _, _), middle in zip(bars, medians, strict=True)
    )
    return _svg(name, title, draw, size=(_SIZE[0], 2.2))


def attention_on_images(name: str, images: Tensor, views: Sequence[AttentionView]) -> str:
    """Images, uint8 (n, channels, height, width), a row each, and beside them what every block attends to in them."""

    def draw(figure):
        panels = figure.subplots(len(images), 1 + len(views), squeeze=False)
        _hide_axes(panels)
        panels[0, 0].set_title("image\n")
        for panel, image in zip(panels[:, 0], images, strict=True):
            panel.imshow(
                image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="none"
            )
        for column, view in enumerate(views, start=1):
            received = view.received[: len(images)]
            for panel, values in zip(panels[:, column], received, strict=True):
                heat = _draw_heat(panel, values, received)
                _draw_windows(panel, view)
            panels[0, column].set_title(f"block {column}\n{view.map_size[0]} x {view.map_size[1]} places")
            _draw_scale(figure, heat, panels[:, column], location="bottom", pad=0.02)

    description = f"Attention received by each place of {len(images)} held-out images in {len(views)} attention blocks"
    return _svg(name, description, draw, size=(1.35 * (1 + len(views)), 1.25 * len(images) + 0.8))


def attention_by_offset(name: str, views: Sequence[AttentionView], *, heads: int = 6) -> str:
    """The attention to each offset from the query, a row for each block, a column for each of its first ``heads``."""
    columns = max(min(heads, len(view.by_offset)) for view in views)

    def draw(figure):
        panels = figure.subplots(len(views), columns, squeeze=False)
        _hide_axes(panels)
        for place, (view, row) in enumerate(zip(views, panels, strict=True), start=1):
            row[0].set_ylabel(f"block {place}")
            shown = view.by_offset[:heads]
            for head, (panel, values) in enumerate(zip(row, shown, strict=False), start=1):
                heat = _draw_heat(panel, values, shown)
                panel.plot(*(size - 1 for size in reversed(view.window_size)), color="white", marker="+", markersize=5)
                panel.set_title(f"head {head}")
            for panel in row[len(shown) :]:
                panel.set_visible(False)
            _draw_scale(figure, heat, row, location="right", aspect=8)

    description = "Mean attention to each offset from the query, per attention block and head"
    return _svg(name, description, draw, size=(0.95 * columns + 0.6, 1.15 * len(views) + 0.1))


def attention_distances(name: str, colour: str, views: Sequence[AttentionView]) -> str:
    """A dot for the mean distance each head attends over, block by block, and a dash for uniform attention."""

    def draw(figure):
        axes = figure.subplots()
        for place, view in enumerate(views, start=1):
            spread = torch.linspace(-0.2, 0.2, len(view.distance)) if len(view.distance) > 1 else torch.zeros(1)
            dots = axes.plot(place + spread, view.distance, color=colour, linestyle="none", marker="o", markersize=3.5)
            dashes = axes.plot((place - 0.32, place + 0.32), (view.uniform_distance,) * 2, color=INK, linestyle="--")
        axes.legend((*dots, *dashes), ("one head", "uniform attention"), loc="best")
        top = max(1.0, *(max(float(view.distance.max()), view.uniform_distance) for view in views))
        axes.set(ylabel="mean distance (places)", xlim=(0.4, len(views) + 0.6), ylim=(0, 1.15 * top))
        axes.set_xticks(range(1, len(views) + 1), [f"block {i + 1}" for i in range(len(views))])
        axes.grid(axis="x", visible=False)

    title = "Mean attention distance of the heads: " + "; ".join(
        f"block {i} {float(view.distance.min()):.2f} to {float(view.distance.max()):.2f} places, "
        f"uniform {view.uniform_distance:.2f}"
        for i, view in enumerate(views, start=1)
    )
    return _svg(name, title, draw, size=(_SIZE[0], 2.4))


def _draw_heat(panel, values: Tensor, all_values: Tensor):
    """Multiples of uniform attention, in colours that mean the same for ``all_values``."""
    largest = max(2.0, float(all_values.nan_to_num(0).max()))
    return panel.imshow(values.numpy(), cmap="magma", vmin=0, vmax=largest, interpolation="none")


def _draw_scale(figure, heat, panels, **options) -> None:
    from matplotlib.ticker import MaxNLocator

    scale = figure.colorbar(heat, ax=panels, ticks=MaxNLocator(3, steps=(1, 2, 5, 10)), **options)
    scale.outline.set_visible(False)


def _draw_windows(panel, view: AttentionView) -> None:
    for axis, size, window in zip("yx", view.map_size, view.window_size, strict=True):
        line = panel.axhline if axis == "y" else panel.axvline
        for edge in range(window, size, window):
            line(edge - 0.5, color="white", linewidth=0.5, alpha=0.6)


def _hide_axes(panels) -> None:
    for panel in panels.flat:
        panel.set(xticks=(), yticks=())
        panel.grid(visible=False)
        for side in panel.spines.values():
            side.set_visible(False)


def _epoch_axes(figure, curves: Curves, label: str):
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    axes.set(xlabel="epoch", ylabel=label, xlim=(0.8, max(len(logs) for _, _, logs in curves) + 0.2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _svg(name: str, description: str, draw: Callable, size: tuple[float, float] = _SIZE) -> str:
    """The element <svg> that ``draw(figure)`` paints, as wide as its place on the page."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' id="image[0-9a-f]+"', "", text)  # a hash of the pixels: the same for equal images
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)  # unique in a page with several figures
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
