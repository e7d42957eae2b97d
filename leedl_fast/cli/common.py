"""What all commands share: the application, and errors in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended

app = typer.Typer(
    help="Fused attention, residual + LayerNorm and diffusion steps for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Backend = Annotated[
    str | None,
    typer.Option(
        help="One that `doctor` lists. Default: the fastest that takes each problem.",
        show_default=False,
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="An option that `leedl-fast models NAME` lists."
    ),
]
Checkpoint = Annotated[Path, typer.Option(help="What `train` wrote.")]


def check_folder_of(path: Path, name: str) -> None:
    """Before the work whose result `path` is for: the option `name` must be in a folder."""
    if not path.parent.is_dir() or path.is_dir():
        what = ", which is a folder" if path.is_dir() else ""
        raise ValueError(f"{name} must be a file in a folder that exists, got {str(path)!r}{what}")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can put right is told in one line, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # `| head` has seen enough: Typer ends quietly
        raise
    except (
        ValueError,
        NotImplementedError,
        ArithmeticError,
        OSError,
        ModuleNotFoundError,
    ) as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(EXIT_USER_ERROR) from None
