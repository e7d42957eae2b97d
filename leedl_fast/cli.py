"""The command line: leedl-fast doctor | bench | tune | train | sample.

Every heavy import stands inside the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from leedl_fast.models.train_config import TrainConfig

app = typer.Typer(
    help="Fused attention, residual + LayerNorm and diffusion steps for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train a model.", no_args_is_help=True)
sample_app = typer.Typer(help="Sample from a trained model.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(sample_app, name="sample")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended
_DEFAULTS = TrainConfig()


@app.callback()
def _every_command() -> None:
    pass


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
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


@app.command()
@_one_line_errors()
def doctor() -> None:
    """Say which backends run on this machine, and why the others do not."""
    from leedl_fast.doctor import report

    report()


@app.command()
@_one_line_errors()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes: about 5 minutes.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("bench-report"),
    op: Annotated[
        list[str] | None, typer.Option(help="Only this op, or gpt; may be given several times.")
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
@_one_line_errors()
def tune(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="64, 128 or 256, and again; 64 and 128 by default.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16, the default, float16 or float32.")
    ] = None,
) -> None:
    """Measure the tile sizes of attention on this GPU, and keep the best for later runs."""
    from leedl_fast import tuning

    path = tuning.tune(head_dim or (64, 128), dtype or ("bfloat16",), report=typer.echo)
    typer.echo(f"table: {path}")


def _option(help: str, default: object, *names: str) -> object:
    """An option that may be absent: a resumed run has defaults of its own."""
    return typer.Option(*names, help=f"{help} Default: {default}.", show_default=False)


@train_app.command("gpt")
@_one_line_errors()
def train_gpt(
    steps: Annotated[int | None, _option("Optimizer steps.", _DEFAULTS.steps)] = None,
    batch_size: Annotated[
        int | None, _option("Crops of text per step.", _DEFAULTS.batch_size)
    ] = None,
    context: Annotated[int | None, _option("Characters per crop.", _DEFAULTS.context)] = None,
    layers: Annotated[int | None, _option("Transformer layers.", _DEFAULTS.layers)] = None,
    width: Annotated[int | None, _option("Width of the model.", _DEFAULTS.width)] = None,
    heads: Annotated[int | None, _option("Attention heads.", _DEFAULTS.heads)] = None,
    heads_k: Annotated[
        int | None, _option("Heads of keys and values; divides --heads.", "--heads")
    ] = None,
    window: Annotated[
        int | None,
        _option("Characters before its own that one sees per layer.", _DEFAULTS.window),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="No window: a character sees all before it.")
    ] = False,
    dropout: Annotated[float | None, _option("Dropout probability.", _DEFAULTS.dropout)] = None,
    learning_rate: Annotated[
        float | None, _option("Peak learning rate.", _DEFAULTS.learning_rate, "--lr")
    ] = None,
    seed: Annotated[int | None, _option("Seed of all randomness.", _DEFAULTS.seed)] = None,
    data: Annotated[
        Path | None, _option("A text file in UTF-8.", "the Python documentation")
    ] = None,
    backend: Annotated[
        str | None, _option("One that `doctor` lists.", "the fastest that takes each problem")
    ] = None,
    validate_every: Annotated[
        int | None, _option("Steps between validations.", _DEFAULTS.validate_every)
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option("Steps between checkpoints.", _DEFAULTS.checkpoint_every)
    ] = None,
    output: Annotated[
        Path | None, _option("Folder for checkpoint and log.", "a new one, runs/gpt-N")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint to go on from, with the options it has.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Train a GPT on the characters of a text.

    Ctrl-C stops after the step at work and leaves a checkpoint to --resume from.
    """
    from leedl_fast.models.checkpoint import KEY, read_checkpoint
    from leedl_fast.models.train_config import resumed_config
    from leedl_fast.models.training import train

    if full and window is not None:
        raise ValueError(f"--full and --window must not both be given, got --window {window}")
    options: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "context": context,
        "layers": layers,
        "width": width,
        "heads": heads,
        "heads_k": heads_k,
        "window": window,
        "dropout": dropout,
        "learning_rate": learning_rate,
        "seed": seed,
        "data": None if data is None else str(data),
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if full:
        given["window"] = None
    if resume is None:
        config = TrainConfig(**given)
        output = _new_folder(Path("runs"), "gpt") if output is None else output
    else:
        checkpoint = read_checkpoint(resume, "gpt")
        config = resumed_config(checkpoint[KEY], checkpoint["global_step"], given)
        output = resume.parent if output is None else output

    result = train(config, output=output, resume=resume, backend=backend, quiet=quiet)
    done = result.first_step + len(result.losses)
    path = shlex.quote(str(result.checkpoint))
    if result.interrupted:
        typer.echo(
            f"stopped after step {done}; go on with: leedl-fast train gpt --resume {path}", err=True
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    bits = result.validation_losses[done] / math.log(2)
    typer.echo(
        f"{done} steps: loss {result.losses[-1]:.4f}, validation {bits:.3f} bits per character, "
        f"median {_median(result.step_times):.3f} s per step\n"
        f"read on with: leedl-fast sample gpt --checkpoint {path}"
    )


@sample_app.command("gpt")
@_one_line_errors()
def sample_gpt(
    checkpoint: Annotated[Path, typer.Option(help="What `train gpt` wrote.")],
    prompt: Annotated[str, typer.Option(help="The beginning of the text.")] = "The ",
    tokens: Annotated[int, typer.Option(help="Characters to write.")] = 500,
    temperature: Annotated[
        float, typer.Option(help="Below 1 safer, above 1 wilder, 0 the likeliest.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest characters.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the likeliest that sum to this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    backend: Annotated[
        str | None, _option("One that `doctor` lists.", "the fastest that takes each problem")
    ] = None,
) -> None:
    """Continue a text, character by character."""
    from leedl_fast.backends import use_backend
    from leedl_fast.models.sampling import load_gpt, stream_text

    model, vocabulary = load_gpt(checkpoint)
    text = stream_text(
        model,
        vocabulary,
        prompt,
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    with contextlib.nullcontext() if backend is None else use_backend(backend):
        for number, character in enumerate(text):
            if number == 0:  # by now the options are known to be good
                sys.stdout.write(prompt)
            sys.stdout.write(character)
            sys.stdout.flush()
    sys.stdout.write("\n")


def _new_folder(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def _median(values: list[float]) -> float:
    import statistics

    return statistics.median(values)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
