"""The report as one HTML page that needs nothing else: styles and plots stand inside it."""

import base64
from html import escape
from importlib.resources import files
from typing import Any

from leedl_fast.benchmarks import results as r
from leedl_fast.benchmarks.plots import draw
from leedl_fast.benchmarks.report import (
    cells,
    format_ms,
    format_speed_up,
    verdict,
)
from leedl_fast.benchmarks.suite import OURS

GAUGE_WIDTH_REM = 7.0
FIGURES = {
    "time_vs_seqlen": "Time against sequence length at a fixed window, both axes logarithmic",
    "peak_memory": "Peak memory against sequence length at a fixed window, both axes logarithmic",
    "loss_curves": "Loss of the same training with the fused kernels and with plain PyTorch",
    "speed_up": "How many times faster leedl_fast is than each other implementation, by case",
}
WIDE_FIGURES = {"speed_up", "loss_curves"}


def render(results: r.Results) -> str:
    """The page."""
    css = (files(__package__) / "page.css").read_text()
    ops = dict.fromkeys(case["op"] for case in results["cases"])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>leedl_fast benchmark</title><style>{css}</style></head><body>",
        _header(results),
        *(
            f'<p class="failure"><b>{escape(failure["benchmark"])}</b>\n'
            f"{escape(failure['message'])}</p>"
            for failure in results["failures"]
        ),
        _bars(results),
        _figures(results),
        *(_op(op, [case for case in results["cases"] if case["op"] == op]) for op in ops),
        _footer(),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _header(results: r.Results) -> str:
    facts, ceilings = results["machine"], results["ceilings"]
    rates = ceilings["matmul_gflop_per_s"]
    entries = {
        "Processor": facts["processor"],
        "Cores and threads": f"{facts['cores']} cores, {facts['threads']} threads",
        "Kernels": f"{results['backend']}, {facts['instruction_set'] or ''}".strip(", "),
        "PyTorch": f"{facts['torch']}, {facts['torch_instruction_set']}",
        "Python": f"{facts['python']}, {facts['system']}",
        "Copy bandwidth here": f"{ceilings['copy_gb_per_s']:.1f} GB/s",
        "Read bandwidth here": f"{ceilings['read_gb_per_s']:.1f} GB/s",
    } | {f"Matrix rate here, {dtype}": f"{rate:.3g} GFLOP/s" for dtype, rate in rates.items()}
    if facts["memory_bytes"]:
        entries["Memory"] = f"{facts['memory_bytes'] / 2**30:.0f} GiB"
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in entries.items()
    )
    created = results["created"].replace("T", " ").replace("+00:00", " UTC")
    return (
        "<h1>leedl_fast benchmark</h1>"
        f'<p class="lead">Version {escape(results["version"])}, {results["tier"]} run, '
        f"{created}</p>"
        f'<dl class="facts">{rows}</dl>'
    )


def _bars(results: r.Results) -> str:
    rows = [
        f"<tr><td>{escape(bar['op'])}: {escape(bar['case'])}</td>"
        f'<td class="text">{escape(bar["against"])}</td>'
        f"<td>{format_speed_up(bar['at_least'])}</td>"
        f'<td class="{_verdict_class(bar)}">{format_speed_up(bar["measured"])}</td>'
        f'<td class="{_verdict_class(bar)}">{"met" if bar["met"] else "missed"}</td></tr>'
        for bar in r.bars(results)
    ]
    if not rows:
        return ""
    return (
        "<h2>What the project asks for</h2>"
        "<p>How many times faster leedl_fast must be, and was in this run.</p>"
        '<div class="scroll"><table><thead><tr><th>Case</th><th class="text">Against</th>'
        "<th>At least</th><th>Measured</th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _verdict_class(bar: dict[str, Any]) -> str:
    return "met" if bar["met"] else "missed"


def _figures(results: r.Results) -> str:
    light, dark = draw(results, "light", "svg"), draw(results, "dark", "svg")
    figures = [
        f"<figure{' class=wide' if name in WIDE_FIGURES else ''}><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark[name])}">'
        f'<img src="{_data_uri(light[name])}" alt="{escape(FIGURES[name])}">'
        "</picture></figure>"
        for name in FIGURES
        if name in light
    ]
    return f'<h2>Plots</h2><div class="figures">{"".join(figures)}</div>' if figures else ""


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _op(op: str, cases: list[dict[str, Any]]) -> str:
    headings = (
        "Implementation",
        "Median",
        "Quartiles, ms",
        "Speed-up",
        "Max error",
        "Rate",
        "Of ceiling",
    )
    head = "".join(
        f"<th{' class=text' if text == 'Median' else ''}>{escape(text)}</th>" for text in headings
    )
    bodies = "".join(_case(case, len(headings)) for case in cases)
    return (
        f"<h2><code>{escape(op)}</code></h2>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{bodies}</table></div>'
    )


def _case(case: dict[str, Any], columns: int) -> str:
    slowest = max(row["median_ms"] for row in r.ran(case))
    rows = "".join(_row(row, slowest, columns) for row in case["implementations"])
    return (
        f'<tbody><tr><th colspan="{columns}" scope="rowgroup">{escape(case["name"])}, '
        f"{escape(case['sizes'])}, {escape(case['dtype'])}"
        f"<small>{escape(verdict(case))}</small></th></tr>{rows}</tbody>"
    )


def _row(row: dict[str, Any], slowest: float, columns: int) -> str:
    name = escape(row["name"])
    if row["reason"] is not None:
        reason = escape(row["reason"])
        return f'<tr><td>{name}</td><td class="reason" colspan="{columns - 1}">{reason}</td></tr>'
    _, _, quartiles, faster, error, rate, percent = (escape(cell) for cell in cells(row))
    width = GAUGE_WIDTH_REM * row["median_ms"] / slowest
    hint = f"{row['samples']} samples of {row['calls_per_sample']} calls"
    if row["compile_s"] is not None:
        hint += f", first call {row['compile_s']:.1f} s"
    return (
        f"<tr{' class=ours' if row['name'] == OURS else ''}><td>{name}</td>"
        f'<td class="time" title="{hint}"><div class="gauge"><i style="width:{width:.2f}rem"></i>'
        f"<span>{format_ms(row['median_ms'])} ms</span></div></td>"
        f'<td class="muted">{quartiles}</td><td>{faster}</td><td>{error}</td>'
        f"<td>{rate}</td><td>{percent}</td></tr>"
    )


def _footer() -> str:
    return (
        "<footer>"
        "<p>Before a case is timed, the outputs and gradients of every implementation are compared "
        "with a float64 reference; the error may be twice that of plain PyTorch "
        "in the same dtype, plus one ulp (one that is larger is marked). Then the implementations "
        "take turns, so that a slow moment of the machine hits all of them. Times are medians with "
        "quartiles, after warm-up and without compilation; a speed-up is the time over that of "
        f"{OURS}.</p>"
        "<p>Percentages are of what the machine was measured to do in the same run: a large copy "
        "for memory-bound operations, a large reduction for decoding, which only reads, a large "
        "matrix product for attention and the model. Only "
        "pairs of a query and a key that it sees count as work.</p>"
        "<p>eager: plain PyTorch. SDPA: <code>F.scaled_dot_product_attention</code>, with a "
        "boolean mask where there is a window. torch.compile: of the eager code.</p></footer>"
    )
