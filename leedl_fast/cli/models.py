"""Training the models, and what they make: models, train, sample, compare."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shlex
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from leedl_fast.cli.common import (
    EXIT_INTERRUPTED,
    Backend,
    Changes,
    Checkpoint,
    app,
    check_folder_of,
    one_line_errors,
)
from leedl_fast.training.registry import TASKS, check_name

Name = Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(TASKS)}.")]


@app.command()
@one_line_errors()
def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME...]",
            help="List this one's options; or run only these, models or rows such as gan/text.",
        ),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Fetch, train and measure them, every variant.")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Folder of what was reached. Default: the one beside the benchmarks.",
            show_default=False,
        ),
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(help="With --run: a Markdown file whose table is written anew."),
    ] = None,
) -> None:
    """List the models: what each shows, its data, what it must reach and what it reached, where.

    With --run the models are trained first; exit code 1 when a goal is missed.
    """
    names = names or []
    for name in names:
        check_name(name.partition("/")[0] if run else name)
    if readme is not None and not run:
        raise ValueError(f"--readme is for --run, got it without: {str(readme)!r}")
    from leedl_fast.training.listing import print_models, print_options

    results = _results_folder() if results is None else results
    if run:
        _run_models(names, results, readme)
    elif not names:
        print_models(results)
    for name in () if run else names:
        print_options(name)


def _run_models(names: list[str], results: Path, readme: Path | None) -> None:
    from leedl_fast.training.table import run_models

    lines = run_models(names, results, readme, report=typer.echo)
    if lines:
        typer.echo("missed:\n" + "\n".join(lines), err=True)
        raise typer.Exit(1)


def _results_folder() -> Path:
    spec = importlib.util.find_spec("leedl_fast.benchmarks")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the package leedl_fast.benchmarks is not installed")
    return Path(spec.submodule_search_locations[0]) / "results"


@app.command()
@one_line_errors()
def train(
    name: Name,
    set_: Changes = None,
    variant: Annotated[str, typer.Option(help="One that `leedl-fast models NAME` lists.")] = "",
    data: Annotated[
        Path | None,
        typer.Option(help="Your own file or folder. Default: the model's.", show_default=False),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the data set first, if it is not here.")
    ] = False,
    backend: Backend = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoint and log. Default: a new one, runs/NAME-N.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint to go on from, with the options it has.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="Lightning's: cpu, gpu, ...")] = "auto",
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    strategy: Annotated[
        str, typer.Option(help="Lightning's: auto, ddp or fsdp, which shares the model out.")
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Train a model and evaluate it.

    Ctrl-C stops after the step at work and leaves a checkpoint to --resume from.
    """
    check_name(name)
    from leedl_fast.data.fetch import fetch as fetch_data
    from leedl_fast.training.checkpoint import KEY, read_checkpoint
    from leedl_fast.training.engine import resumed_run
    from leedl_fast.training.engine import train as run_training
    from leedl_fast.training.registry import configure, task_class
    from leedl_fast.training.settings import parse_changes

    task = task_class(name)
    changes = parse_changes(set_ or (), task.Settings, task.ModelConfig)
    if data is not None:
        changes["data"] = str(data)
    if resume is None:
        run = configure(name, variant, **changes)
        output = _new_folder(Path("runs"), name) if output is None else output
    else:
        run = resumed_run(read_checkpoint(resume, name)[KEY], changes)
        output = resume.parent if output is None else output
    if fetch and run.settings.data is None:
        for data_set in task.data_sets:
            fetch_data(data_set)
    result = run_training(
        run,
        output=output,
        resume=resume,
        backend=backend,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        quiet=quiet,
    )
    if result.rank > 0:
        return
    path = shlex.quote(str(result.checkpoint))
    if result.interrupted:
        typer.echo(
            f"stopped after step {result.steps_done}; "
            f"go on with: leedl-fast train {name} --resume {path}",
            err=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    metrics = ", ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
    typer.echo(
        f"{result.steps_done} steps: loss {result.losses[-1]:.4f}, {metrics}, "
        f"median {statistics.median(result.step_times):.3f} s per step\n"
        f"go on with: leedl-fast sample {name} --checkpoint {path}"
    )


@app.command()
@one_line_errors()
def sample(
    name: Name,
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None, typer.Option(help="Short for --set prompt=...", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    set_: Changes = None,
    output: Annotated[Path, typer.Option(help="Folder for pictures.")] = Path(),
    attention_maps: Annotated[
        str | None,
        typer.Option(
            help="A PNG file for who attends to whom in the last sample; short for "
            "--set attention_maps=...",
            show_default=False,
        ),
    ] = None,
    backend: Backend = None,
) -> None:
    """Show what a trained model makes: text, translations, tags, pictures."""
    check_name(name)
    from leedl_fast.backends import use_backend
    from leedl_fast.training.callbacks import held_out
    from leedl_fast.training.engine import load_task
    from leedl_fast.training.pictures import write_maps
    from leedl_fast.training.registry import task_class
    from leedl_fast.training.settings import parse_changes

    options_class = task_class(name).SampleOptions
    values: dict[str, Any] = {"seed": seed} | parse_changes(set_ or (), options_class)
    if prompt is not None:
        if "prompt" not in {field.name for field in dataclasses.fields(options_class)}:
            raise ValueError(f"--prompt is for models that read a text, got it with {name}")
        values["prompt"] = prompt
    if attention_maps is not None:
        values["attention_maps"] = attention_maps
    options = options_class(**values)
    picture = None if options.attention_maps is None else Path(options.attention_maps)
    if picture is not None:
        check_folder_of(picture, "attention-maps")
    task = load_task(checkpoint, name)
    with contextlib.ExitStack() as stack:
        if backend is not None:
            stack.enter_context(use_backend(backend))
        stack.enter_context(held_out(task))
        maps: dict[str, Any] = {}
        if picture is not None:
            from leedl_fast.layers.attention_maps import record_attention

            maps = stack.enter_context(record_attention(task.inference_model))
        for text in task.sample(options, output):
            sys.stdout.write(text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    if picture is not None:
        write_maps(maps, picture)
        typer.echo(f"wrote {picture}", err=True)


@app.command()
@one_line_errors()
def compare(
    name: Name,
    set_: Changes = None,
    variant: Annotated[str, typer.Option(help="One that `leedl-fast models NAME` lists.")] = "",
    data: Annotated[Path | None, typer.Option(help="Your own file or folder.")] = None,
    backend: Annotated[str, typer.Option(help="The backend beside eager.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Training steps of the loss curves.")] = 50,
    output: Annotated[
        Path, typer.Option(help="The plot, a PNG file; the numbers stand beside it, in JSON.")
    ] = Path("compare.png"),
) -> None:
    """Train a model with plain PyTorch and with the fused kernels from one seed, side by side.

    Exit code 1 when they disagree.
    """
    check_name(name)
    from leedl_fast.training.compare import compare_backends, print_comparison, write_numbers
    from leedl_fast.training.registry import configure, task_class
    from leedl_fast.training.settings import parse_changes

    task = task_class(name)
    check_folder_of(output, "output")
    numbers = output.with_suffix(".json")
    if numbers == output:
        raise ValueError(f"output must be a picture, got {str(output)!r}")
    changes = parse_changes(set_ or (), task.Settings, task.ModelConfig) | {"steps": steps}
    if data is not None:
        changes["data"] = str(data)
    comparison = compare_backends(configure(name, variant, **changes), backend)
    print_comparison(comparison, output)
    write_numbers(comparison, numbers)
    typer.echo(f"wrote {output} and {numbers}")
    if not comparison.agrees:
        raise typer.Exit(1)


def _new_folder(parent: Path, name: str) -> Path:
    from lightning.pytorch.utilities import rank_zero_only

    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    if rank_zero_only.rank > 0 and number > 1:  # type: ignore[attr-defined]
        # Lightning runs the command again for each further device: the first has made the folder.
        number -= 1
    return parent / f"{name}-{number}"
