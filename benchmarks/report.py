"""The report of a session: the tables in the terminal, and the folder with JSON, plots and page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from leedl_fast.benchmarks import results as r
from leedl_fast.benchmarks.suite import EAGER, OURS
from leedl_fast.files import write_file

PAGE_NAME = "index.html"
# Of the tables in the terminal, with their widths: 80 in all.
COLUMNS = {
    "": 14,
    "ms": 7,
    "quartiles": 15,
    "speed-up": 8,
    "max error": 11,
    "rate": 11,
    "ceiling": 7,
}


def write_report(results: r.Results, folder: Path) -> Path:
    """Write results.json, the plots and the page into an existing folder; the page's path."""
    from leedl_fast.benchmarks.page import render
    from leedl_fast.benchmarks.plots import draw

    r.save(results, folder / "results.json")
    for name, image in draw(results, "light", "png").items():
        write_file(image, folder / f"{name}.png")
    write_file(render(results).encode(), folder / PAGE_NAME)
    return folder / PAGE_NAME


def print_report(results: r.Results, console: Console | None = None) -> None:
    """Tables of every case, then of the speed-ups that the project asks for."""
    console = console or Console()
    console.print()
    for line in describe_machine(results):
        console.print(Text(line, style="dim"))
    for op in dict.fromkeys(case["op"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["op"] == op]
        console.print()
        console.print(_op_lines(op, cases))
    if r.bars(results):
        console.print()
        console.print(_bar_table(results))
    if any(
        row["accurate"] is False for case in results["cases"] for row in case["implementations"]
    ):
        console.print("\n(!) more error than allowed: twice plain PyTorch's own, plus one ulp")
    for curve in results["curves"]:
        console.print()
        console.print(
            f"{curve['title']} ({curve['subtitle']}): the losses differ by at most "
            f"{curve['max_difference']:.1e} over {len(curve['steps'])} steps"
        )
    for failure in results["failures"]:
        console.print()
        console.print(Text(f"FAILED {failure['benchmark']}: {failure['message']}", style="red"))


def describe_machine(results: r.Results) -> list[str]:
    facts, ceilings = results["machine"], results["ceilings"]
    rates = ", ".join(
        f"{dtype} matmul {rate:.3g} GFLOP/s"
        for dtype, rate in ceilings["matmul_gflop_per_s"].items()
    )
    isa = f", {facts['instruction_set']} kernels" if facts["instruction_set"] else ""
    return [
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads{isa}",
        f"leedl_fast {results['version']}, torch {facts['torch']} "
        f"({facts['torch_instruction_set']}), Python {facts['python']}, {facts['system']}",
        f"ceilings: copy {ceilings['copy_gb_per_s']:.1f} GB/s, "
        f"read {ceilings['read_gb_per_s']:.1f} GB/s, {rates}",
    ]


def _op_lines(op: str, cases: list[dict[str, Any]]) -> Group:
    lines: list[Any] = [
        Rule(Text(op, style="bold"), align="left"),
        Text(_columns(COLUMNS), style="dim"),
    ]
    for case in cases:
        lines.append(Text(f"{case['name']}, {case['sizes']}, {case['dtype']}", style="bold"))
        for row in case["implementations"]:
            if row["reason"] is not None:
                lines.append(Text(f" {row['name']}: {row['reason']}", style="dim"))
            else:
                style = "bold cyan" if row["name"] == OURS else ""
                lines.append(Text(_columns(cells(row)), style=style))
        lines += [Text(f" {verdict(case)}", style="green"), Text()]
    return Group(*lines)


def _columns(texts: Iterable[str]) -> str:
    first, *others = zip(texts, COLUMNS.values(), strict=True)
    padded = [f" {first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)]
    return " ".join(padded)


def cells(row: dict[str, Any]) -> list[str]:
    """The columns of one implementation, in the terminal and on the page."""
    faster = "" if row["name"] == OURS else format_speed_up(row["speed_up"])
    return [
        row["name"],
        format_ms(row["median_ms"]),
        f"{format_ms(row['lower_quartile_ms'])} - {format_ms(row['upper_quartile_ms'])}",
        faster,
        format_error(row),
        format_rate(row),
        "" if row["percent"] is None else f"{row['percent']:.0f} %",
    ]


def verdict(case: dict[str, Any]) -> str:
    """ "12x eager, 3.1x the strongest peer (FlexAttention)"."""
    parts = []
    best = r.strongest_peer(case)
    for row in r.peers(case):
        if row["name"] == EAGER and row is not best:
            parts.append(f"{format_speed_up(row['speed_up'])} eager")
    if best is not None:
        parts.append(f"{format_speed_up(best['speed_up'])} the strongest peer ({best['name']})")
    return ", ".join(parts) or "no other implementation was run at this size"


def _bar_table(results: r.Results) -> Group:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for heading in ("case", "against"):
        table.add_column(heading)
    for heading in ("at least", "measured", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for bar in r.bars(results):
        style = "green" if bar["met"] else "red"
        table.add_row(
            f"{bar['op']}: {bar['case']}",
            bar["against"],
            format_speed_up(bar["at_least"]),
            Text(format_speed_up(bar["measured"]), style=style),
            Text("met" if bar["met"] else "missed", style=style),
        )
    return Group(Rule(Text("What the project asks for", style="bold"), align="left"), table)


def format_ms(ms: float) -> str:
    if ms >= 100:
        return f"{ms:.0f}"
    return f"{ms:.3g}" if ms >= 0.01 else f"{ms:.2g}"


def format_speed_up(factor: float | None) -> str:
    if factor is None:
        return "did not run"
    return (
        f"{factor:.0f}x"
        if factor >= 100
        else f"{factor:.1f}x"
        if factor >= 10
        else f"{factor:.2f}x"
    )


def format_error(row: dict[str, Any]) -> str:
    if not row["errors"]:
        return "own noise" if row["accurate"] else "not finite"
    error = "not finite" if row["max_error"] is None else f"{row['max_error']:.1e}"
    return error if row["accurate"] else f"{error} (!)"


def format_rate(row: dict[str, Any]) -> str:
    for name in ("gb_per_s", "read_gb_per_s"):
        if name in row:
            return f"{row[name]:.1f} GB/s"
    return f"{row['gflop_per_s']:.0f} GFLOP/s" if "gflop_per_s" in row else ""
