"""What runs here and why the rest does not: the body of `leedl-fast doctor`."""

import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import leedl_fast
from leedl_fast import backends, config
from leedl_fast.backends import cpu_modules, cuda, triton


def processor() -> str:
    """The processor's name, as the machine tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(console: Console | None = None) -> bool:
    """Print the backends, each with its state; True when the compiled CPU backend runs.

    Raises:
        ValueError, NotImplementedError: an environment variable asks for what is not there.
    """
    if config.BACKEND is not None:
        backends.check_name(config.BACKEND, "LEEDL_FAST_BACKEND")
    console = console or Console()
    console.print(
        f"leedl_fast {leedl_fast.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads"
    )
    console.print(f"{processor()}, {platform.system()} {platform.machine()}")
    console.print(
        f"LEEDL_FAST_CPU={config.CPU_ISA or '(unset)'}  "
        f"LEEDL_FAST_BACKEND={config.BACKEND or '(unset)'}"
    )
    table = Table("backend", "state", "ops")
    for backend in backends.names():
        for name, state in _states(backend):
            table.add_row(name, state, ", ".join(backends.table(backend)))
    console.print(table)
    return bool(cpu_modules.modules())


def _states(backend: str) -> list[tuple[str, str]]:
    if backend == "triton" and triton.reason() is None and triton.is_interpreted():
        return [(backend, "[green]runs[/] in Triton's interpreter")]
    if backend in ("triton", "cuda"):
        reason = {"triton": triton, "cuda": cuda}[backend].reason()
        if reason is None and not torch.cuda.is_available():
            reason = "torch sees no GPU here"
        if reason is None and backend == "cuda":
            reason = cuda.unsupported_device(torch.device("cuda"))
        if reason is not None:
            return [(backend, f"[yellow]does not run[/]: {reason}")]
        return [(backend, f"[green]runs[/] on {torch.cuda.get_device_name()}")]
    if backend == "eager":
        return [
            (backend, "[green]runs[/]: plain PyTorch, on any device, for what nothing else takes")
        ]
    rows = []
    for isa in cpu_modules.ISAS:
        if isa in cpu_modules.modules():
            state = "[green]runs, in use[/]" if isa == cpu_modules.isa() else "[green]runs[/]"
            products = cpu_modules.modules()[isa].bfloat16_products()
            state += f", bfloat16 attention on {products}"
        else:
            state = f"[yellow]does not run[/]: {cpu_modules.reasons()[isa]}"
        rows.append((f"cpu ({isa})", state))
    return rows
