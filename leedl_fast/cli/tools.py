"""doctor, bench and tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leedl_fast.cli.common import app, one_line_errors


@app.command()
@one_line_errors()
def doctor() -> None:
    """Say which backends run on this machine, and why the others do not."""
    from leedl_fast.doctor import report

    report()


@app.command()
@one_line_errors()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes: about 5 minutes.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("bench-report"),
    op: Annotated[
        list[str] | None,
        typer.Option(help="Only this op, gpt or patch; may be given several times."),
    ] = None,
    backend: Annotated[str, typer.Option(help="The backend beside PyTorch's own.")] = "cpu",
    save_results: Annotated[
        bool, typer.Option("--save-results", help="Also keep the numbers of this kind of machine.")
    ] = False,
) -> None:
    """Time every op beside PyTorch's own, check its numbers, and write a report."""
    try:
        from leedl_fast.benchmarks.run import bench as run_bench
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the benchmarks need more packages: pip install 'leedl_fast[bench]' ({error})"
        ) from error
    run_bench(quick, output, op, backend=backend, save_results=save_results)


@app.command()
@one_line_errors()
def tune(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="64, 128 or 256, and again; 64 and 128 by default.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16, the default, float16 or float32.")
    ] = None,
) -> None:
    """Measure the tile sizes of attention and add_layer_norm on this GPU, and keep the best for
    later runs: in $XDG_CACHE_HOME/leedl_fast, ~/.cache/leedl_fast if that is not set.
    """
    from leedl_fast import tuning

    path = tuning.tune(head_dim or (64, 128), dtype or ("bfloat16",), report=typer.echo)
    typer.echo(f"table: {path}")
