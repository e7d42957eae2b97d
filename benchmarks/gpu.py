"""What one GPU is asked for, measured: `python -m leedl_fast.benchmarks.gpu OUTPUT.json`.

Large problems in bfloat16 beside the best that PyTorch has, in percent of the ceilings of the same
run. benchmarks/gpu.sh runs this after the tests; nothing is checked for rightness here.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from leedl_fast import add_layer_norm, attention, diffusion
from leedl_fast.testing.bench import interleave, measure_ceilings, synchronized

Function = Callable[[], Any]
DEVICE = torch.device("cuda")
BUDGET_S = 0.6  # per comparison


def _milliseconds(
    peers: dict[str, Function], prepare: Callable[[Function], Function] = lambda run: run
) -> dict[str, float | str]:
    """Medians of interleaved calls of what `prepare` makes of each peer, or why one cannot run."""
    runs: dict[str, Function] = {}
    results: dict[str, float | str] = {}
    for name, peer in peers.items():
        try:
            function = prepare(peer)
            function()
        except Exception as error:
            results[name] = repr(error)[:300]
        else:
            runs[name] = synchronized(function, DEVICE)
    timings = interleave(runs, BUDGET_S) if runs else {}
    return results | {name: 1e3 * timing.median for name, timing in timings.items()}


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)


def _gradients(run: Function, inputs: list[Tensor]) -> Function:
    """The backward pass alone."""
    outputs = run()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, douts, retain_graph=True)


def _visible_pairs(seqlen: int, left: int | None) -> int:
    """Under a causal mask, and a window to the left."""
    left = seqlen if left is None else left
    return sum(min(i, left) + 1 for i in range(seqlen))


def _attention(seqlen: int, heads: int, causal: bool, window: tuple[int, int] | None) -> dict:
    q, k, v = (_randn(1, heads, seqlen, 128) for _ in range(3))
    leaves = [q, k, v]

    def ours() -> Tensor:
        return attention(q, k, v, causal=causal, window=window, backend="triton")

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def flex() -> Tensor:
        return compiled(q, k, v, block_mask=mask)

    peers: dict[str, Function] = {"leedl_fast": ours}
    if window is None:
        peers["SDPA flash"] = flash
    else:
        left, right = window

        def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (j >= i - left) & (j <= i + right)

        mask = create_block_mask(sees, None, None, seqlen, seqlen, device=DEVICE)
        compiled = torch.compile(flex_attention)
        peers["FlexAttention"] = flex
    limited = causal or window is not None
    pairs = _visible_pairs(seqlen, window[0] if window else None) if limited else seqlen**2
    flops = 4 * heads * 128 * pairs

    def backward(run: Function) -> Function:
        return _gradients(run, leaves)

    def both(run: Function) -> Function:
        dout = torch.randn_like(q)
        return lambda: torch.autograd.grad(run(), leaves, dout)

    with torch.no_grad():
        forward_ms = _milliseconds(peers)
    return {
        "forward": {"ms": forward_ms, "flops": flops},
        "backward": {"ms": _milliseconds(peers, backward), "flops": 2.5 * flops},
        "forward + backward": {
            "ms": _milliseconds(peers, both),
            "flops": 3.5 * flops,
        },
    }


def _add_layer_norm(rows: int, n: int) -> dict:
    x, residual = _randn(rows, n), _randn(rows, n)
    weight, bias = _randn(n), _randn(n)
    leaves = [x, residual, weight, bias]

    def eager() -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.layer_norm(summed, (n,), weight, bias), summed

    def ours() -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, weight, bias, backend="triton")

    peers: dict[str, Function] = {
        "leedl_fast": ours,
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }

    def backward(run: Function) -> Function:
        return _gradients(run, leaves)

    moved = 4 * rows * n * x.element_size()
    with torch.no_grad():
        forward_ms = _milliseconds(peers)
    return {
        "forward": {"ms": forward_ms, "bytes": moved},
        "backward": {"ms": _milliseconds(peers, backward), "bytes": moved},
    }


def _diffusion(shape: tuple[int, ...]) -> dict:
    schedule = diffusion.NoiseSchedule.linear(1000)
    sample, output = (_randn(*shape, dtype=torch.float32).detach() for _ in range(2))
    t = torch.randint(1, 1000, shape[:1], device=DEVICE)
    options = {"seed": 3, "backend": "triton"}
    steps: dict[str, Function] = {
        "add_noise": lambda: diffusion.add_noise(sample, t, schedule, **options),
        "ddpm_step": lambda: diffusion.ddpm_step(output, t, sample, schedule, **options),
        "ddim_step": lambda: diffusion.ddim_step(
            output, t, sample, schedule, prev_timesteps=t - 1, eta=1.0, **options
        ),
    }
    tensors = {"add_noise": 2, "ddpm_step": 3, "ddim_step": 3}
    return {
        name: {
            "ms": _milliseconds({"leedl_fast": step}),
            "bytes": tensors[name] * sample.numel() * sample.element_size(),
        }
        for name, step in steps.items()
    }


def main() -> None:
    """Writes what is finished after every case, so that a time limit loses the rest alone."""
    output = Path(sys.argv[1])
    ceilings = measure_ceilings(
        DEVICE, (torch.float32, torch.bfloat16), copy_bytes=1 << 30, matmul_size=8192, budget_s=1.0
    )
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
        "matmul_tflop_per_s": {
            dtype: rate / 1e12 for dtype, rate in ceilings.matmul_flop_per_s.items()
        },
        "cases": {},
    }
    cases: dict[str, Callable[[], dict]] = {
        "attention S16k hd128 full": lambda: _attention(16384, 16, False, None),
        "attention S16k hd128 causal": lambda: _attention(16384, 16, True, None),
        "attention S64k hd128 window (1024, 0)": lambda: _attention(65536, 8, False, (1024, 0)),
        "add_layer_norm 65536 x 1024": lambda: _add_layer_norm(65536, 1024),
        "add_layer_norm 16384 x 4096": lambda: _add_layer_norm(16384, 4096),
        "add_layer_norm 4096 x 32768": lambda: _add_layer_norm(4096, 32768),
        "add_layer_norm 64 x 256": lambda: _add_layer_norm(64, 256),
        "diffusion (64, 3, 512, 512)": lambda: _diffusion((64, 3, 512, 512)),
    }
    for name, case in cases.items():
        try:
            measured = case()
        except Exception as error:
            results["cases"][name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            for part in measured.values():
                _add_rates(part)
            results["cases"][name] = measured
        print(name, json.dumps(results["cases"][name]), flush=True)
        output.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()


def _add_rates(part: dict[str, Any]) -> None:
    for unit, amount, scale in (("tflop_per_s", "flops", 1e12), ("gb_per_s", "bytes", 1e9)):
        if amount in part:
            part[unit] = {
                name: part[amount] / (1e-3 * ms) / scale
                for name, ms in part["ms"].items()
                if not isinstance(ms, str)
            }


if __name__ == "__main__":
    main()
