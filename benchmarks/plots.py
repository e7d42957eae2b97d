"""The plots of the report, each drawn for a light and for a dark page."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, whatever the user's settings say
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from leedl_fast.benchmarks import results as r
from leedl_fast.benchmarks.report import format_speed_up
from leedl_fast.benchmarks.suite import OURS

# From Okabe and Ito's palette, which stays distinct for colour-blind readers.
COLORS = {
    OURS: "#0072B2",
    "eager": "#7A7A7A",
    "torch.compile": "#E69F00",
    "SDPA": "#CC79A7",
    "SDPA, mask": "#CC79A7",
    "FlexAttention": "#009E73",
    "torch.randn": "#D55E00",
}
OTHER_COLOR = "#D55E00"
MARKERS = {OURS: "o", "eager": "s", "torch.compile": "^", "SDPA, mask": "D", "FlexAttention": "v"}
THEMES = {
    "light": {"text": "#1f2328", "muted": "#59636e", "grid": "#d8dee4", "ground": "#ffffff"},
    "dark": {"text": "#e6edf3", "muted": "#9198a1", "grid": "#3d444d", "ground": "#151b23"},
}
OURS_ON_DARK = "#4DB5F5"


def draw(results: r.Results, theme: str, image_format: str) -> dict[str, bytes]:
    """The plots that the results have data for, by name, as "png" or "svg"."""
    painters: dict[str, Callable[[r.Results, str], Figure | None]] = {
        "time_vs_seqlen": _time_vs_seqlen,
        "peak_memory": _peak_memory,
        "speed_up": _speed_up,
        "loss_curves": _loss_curves,
    }
    images = {}
    with plt.rc_context(_style(theme)):
        for name, paint in painters.items():
            figure = paint(results, theme)
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format=image_format)
                plt.close(figure)
                images[name] = buffer.getvalue()
    return images


def _style(theme: str) -> dict[str, Any]:
    colors = THEMES[theme]
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
        "font.size": 10,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
        "axes.labelcolor": colors["muted"],
        "axes.edgecolor": colors["grid"],
        "axes.facecolor": colors["ground"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": colors["grid"],
        "grid.linewidth": 0.8,
        "text.color": colors["text"],
        "xtick.color": colors["muted"],
        "ytick.color": colors["muted"],
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "figure.facecolor": colors["ground"],
        "figure.constrained_layout.use": True,
        "savefig.dpi": 160,
        "svg.hashsalt": "leedl_fast",  # equal results make equal files
    }


def color(name: str, theme: str) -> str:
    if name == OURS and theme == "dark":
        return OURS_ON_DARK
    return COLORS.get(name, OTHER_COLOR)


def _time_vs_seqlen(results: r.Results, theme: str) -> Figure | None:
    return _scaling(results, theme, "median_ms", "Time", "milliseconds", _plain_number)


def _peak_memory(results: r.Results, theme: str) -> Figure | None:
    return _scaling(results, theme, "peak_memory_bytes", "Peak memory", "", _bytes)


def _scaling(
    results: r.Results,
    theme: str,
    field: str,
    quantity: str,
    unit: str,
    formatter: Callable[[float, Any], str],
) -> Figure | None:
    """`field` of every implementation against the sequence length, on doubly logarithmic axes."""
    points = [case for case in results["cases"] if case["series"]]
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in sorted(points, key=lambda case: case["x"]):
        for row in case["implementations"]:
            if row.get(field):
                lines.setdefault(row["name"], []).append((case["x"], row[field]))
    if not lines.get(OURS):
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.6))
    (x0, _), (x1, y1) = lines[OURS][0], lines[OURS][-1]
    axes.plot(
        [x0, x1],
        [y1 * x0 / x1, y1],
        color=THEMES[theme]["muted"],
        linewidth=1,
        linestyle=(0, (4, 4)),
        label="proportional",
        zorder=4,
    )
    for name, line in lines.items():
        axes.plot(
            *zip(*line, strict=True),
            color=color(name, theme),
            marker=MARKERS.get(name, "o"),
            markersize=6 if name == OURS else 5,
            linewidth=2.4 if name == OURS else 1.6,
            label=name,
            zorder=3 if name == OURS else 2,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({case["x"] for case in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(formatter))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True)
    axes.set_xlabel("sequence length")
    axes.set_ylabel(unit)
    axes.set_title(f"{quantity}: {points[0]['series']}", pad=50)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: _rank(labels[i]))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        columnspacing=1.2,
        handlelength=1.6,
        fontsize=9,
    )
    return figure


def _rank(name: str) -> int:
    """Of an implementation in a legend; what is none comes last."""
    names = list(COLORS)
    return names.index(name) if name in names else len(names)


def _speed_up(results: r.Results, theme: str) -> Figure | None:
    """One bar per case and peer: how many times faster leedl_fast is."""
    # The points of a scaling plot are shown there, unless the project asks something of them.
    shown = [case for case in results["cases"] if case["bars"] or not case["series"]]
    groups = [(case, r.peers(case)) for case in shown if r.peers(case)]
    if not groups:
        return None
    colors = THEMES[theme]
    height = sum(len(peers) * 0.25 + 0.5 for _, peers in groups)
    figure, axes = plt.subplots(figsize=(8.4, height + 1.1))
    y, ticks = 0.0, {}
    for case, peers in groups:
        title = f"{case['op']}: {case['name']}, {case['sizes']}"
        if case["dtype"] != "float32":
            title += f", {case['dtype']}"
        axes.annotate(
            title,
            (1, y),
            xytext=(-1, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
        )
        axes.vlines(1, y + 0.5, y + len(peers) + 0.5, colors=colors["muted"], linewidth=1.2)
        targets = {bar["against"]: bar["at_least"] for bar in case["bars"]}
        for row in peers:
            y += 1.0
            ticks[y] = row["name"]
            factor, target = row["speed_up"], targets.get(row["name"])
            axes.barh(y, factor - 1, left=1, height=0.7, color=color(row["name"], theme))
            if target is not None:
                axes.vlines(target, y - 0.43, y + 0.43, colors=colors["text"], linewidth=2)
            axes.annotate(
                format_speed_up(factor),
                (max(factor, 1, target or 1), y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        y += 2.0
    factors = [row["speed_up"] for _, peers in groups for row in peers]
    axes.set_xscale("log")
    axes.set_xlim(min(0.9, *(0.9 * f for f in factors)), 2.5 * max(4.0, *factors))
    axes.set_ylim(y - 1.0, -1.0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, axis="x")
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time over the time of leedl_fast; a dark mark is what the project asks for")
    axes.set_title("How many times faster leedl_fast is")
    return figure


def _loss_curves(results: r.Results, theme: str) -> Figure | None:
    """The first pair of runs, one drawn over the other, and their difference."""
    if not results["curves"]:
        return None
    curve, colors = results["curves"][0], THEMES[theme]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.6, 4.9), sharex=True, height_ratios=(3, 1)
    )
    styles = {
        OURS: {"color": color(OURS, theme), "linewidth": 4, "alpha": 0.6},
        "eager": {"color": colors["text"], "linewidth": 1.2},
    }
    for name, losses in curve["losses"].items():
        above.plot(curve["steps"], losses, label=name, **styles[name])
    above.set_ylabel("loss, nats per character")
    above.set_title(f"{curve['title']}\n", linespacing=1.4)
    above.text(0, 1.03, curve["subtitle"], transform=above.transAxes, color=colors["muted"])
    above.grid(True)
    above.legend(loc="upper right")
    pairs = zip(curve["steps"], *curve["losses"].values(), strict=True)
    gaps = [(step, abs(a - b)) for step, a, b in pairs if a != b]
    if gaps:
        below.plot(*zip(*gaps, strict=True), ".", color=color(OURS, theme), markersize=4)
    below.axhline(curve["allowed"], color=colors["muted"], linestyle=(0, (4, 4)), linewidth=1)
    below.annotate(
        "allowed",
        (1, curve["allowed"]),
        xycoords=below.get_yaxis_transform(),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=colors["muted"],
    )
    below.set_yscale("log")
    below.set_ylabel("|difference|")
    below.set_xlabel("training step")
    below.grid(True)
    figure.align_ylabels()
    return figure


def _plain_number(value: float, _: Any) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _bytes(value: float, _: Any) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
