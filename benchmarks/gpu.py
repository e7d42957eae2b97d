"""What one GPU is asked for, measured: `python -m leedl_fast.benchmarks.gpu OUTPUT.json`.

Large problems in bfloat16 beside the best that PyTorch has, in percent of the ceilings of the same
run. benchmarks/gpu.sh runs this after the tests; nothing is checked for rightness here.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from leedl_fast import add_layer_norm, attention, diffusion
from leedl_fast.backends import cuda
from leedl_fast.files import write_file
from leedl_fast.kernels import add_layer_norm_backward, attention_blocks
from leedl_fast.testing.bench import interleave, is_lost, measure_ceilings, synchronized
from leedl_fast.tuning import takes_descriptors

Function = Callable[[], Any]
Peers = dict[str, Function]
Wrap = Callable[[Function], Function]
DEVICE = torch.device("cuda", 0)
BACKEND = "triton"
BUDGET_S = 0.5  # per comparison
HEAD_DIM = 128
GPU_LOST = 75  # the exit code that benchmarks/gpu.sh knows
OURS = "leedl_fast"
CUDA = "leedl_fast, CUDA C++"
DESCRIPTORS = "leedl_fast, descriptors"
WALKING = "leedl_fast, 2 programs per multiprocessor"  # which walk through the tiles


def _has_cuda_kernels() -> bool:
    return DEVICE.type == "cuda" and (cuda.reason() or cuda.unsupported_device(DEVICE)) is None


def _milliseconds(
    peers: Peers, prepare: Wrap = lambda run: run, wraps: dict[str, Wrap] | None = None
) -> dict[str, float | str]:
    """Medians of interleaved calls of what `prepare` makes of each peer, or why one cannot run.

    wraps: what else is made of the prepared peers of these names.
    """
    runs: Peers = {}
    results: dict[str, float | str] = {}
    for name, peer in peers.items():
        try:
            function = (wraps or {}).get(name, lambda run: run)(prepare(peer))
            function()
        except Exception as error:
            results[name] = repr(error)[:300]
        else:
            runs[name] = synchronized(function, DEVICE)
        if DEVICE.type == "cuda":  # what a peer could not finish must not keep the next from memory
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
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


def _window_mask(seqlen: int, left: int, right: int, block: int = 128) -> BlockMask:
    """FlexAttention's mask of a window, block by block: `create_block_mask` would make it from
    (seqlen, seqlen) tensors, many gigabytes at 64k.
    """

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j >= i - left) & (j <= i + right)

    first = torch.arange(seqlen // block, device=DEVICE) * block
    last = first + block - 1
    query_first, query_last, key_first, key_last = (
        *(x[:, None] for x in (first, last)),
        *(x[None, :] for x in (first, last)),
    )
    is_seen = (key_last >= query_first - left) & (key_first <= query_last + right)
    is_full = (key_first >= query_last - left) & (key_last <= query_first + right)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many key blocks each query block has, and their numbers, those first."""
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1)[None, None].int(), order[None, None].int()

    return BlockMask.from_kv_blocks(
        *listed(is_seen & ~is_full), *listed(is_full), BLOCK_SIZE=block, mask_mod=sees
    )


def _with_tiles(kernels: tuple[str, ...], **fields: Any) -> Wrap:
    """A call with the tiles of these kernels of attention changed."""

    def wrap(run: Function) -> Function:
        def changed_run() -> Any:
            with attention_blocks.changed(kernels, **fields):
                return run()

        return changed_run

    return wrap


def _attention(seqlen: int, heads: int, causal: bool, window: tuple[int, int] | None) -> dict:
    q, k, v = (_randn(1, heads, seqlen, HEAD_DIM) for _ in range(3))
    leaves = [q, k, v]

    def ours(backend: str = BACKEND) -> Tensor:
        return attention(q, k, v, causal=causal, window=window, backend=backend)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def flex() -> Tensor:
        return compiled(q, k, v, block_mask=mask)

    peers: Peers = {OURS: ours}
    wraps: dict[str, Wrap] = {}
    kernels = "forward", "query", "key_value"
    if DEVICE.type == "cuda" and takes_descriptors(DEVICE):
        peers[DESCRIPTORS], wraps[DESCRIPTORS] = ours, _with_tiles(kernels, descriptors=True)
    if window is not None and sum(window) < 256:
        peers[WALKING] = ours
        wraps[WALKING] = _with_tiles(kernels, step=32, programs_per_sm=2)
    if _has_cuda_kernels():
        peers[CUDA] = lambda: ours("cuda")
    if window is None:
        peers["SDPA flash"] = flash
    else:
        mask = _window_mask(seqlen, *window)
        # Whole or not at all: uncompiled it would hold all (seqlen, seqlen) scores.
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        peers["FlexAttention"] = flex
    limited = causal or window is not None
    pairs = _visible_pairs(seqlen, window[0] if window else None) if limited else seqlen**2
    flops = 4 * heads * HEAD_DIM * pairs

    def both(run: Function) -> Function:
        dout = torch.randn_like(q)
        return lambda: torch.autograd.grad(run(), leaves, dout)

    with torch.no_grad():
        forward_ms = _milliseconds(peers, wraps=wraps)
    backward_ms = _milliseconds(peers, lambda run: _gradients(run, leaves), wraps)
    both_ms = _milliseconds(peers, both, wraps)
    return {
        "forward": {"ms": forward_ms, "flops": flops},
        "backward": {"ms": backward_ms, "flops": 2.5 * flops},
        "forward + backward": {"ms": both_ms, "flops": 3.5 * flops},
    }


def _add_layer_norm(rows: int, n: int) -> dict:
    """Bytes: two tensors read and two written in the forward pass, three and one in the backward
    one. `moved`: what our backward pass reads and writes in fact where rows do not fit registers,
    a row that is read again at once counted once: the sums for its statistics, then for dx (with
    dnormed and dsummed), and both factors of dweight.
    """
    x, residual = _randn(rows, n), _randn(rows, n)
    weight, bias = _randn(n), _randn(n)
    leaves = [x, residual, weight, bias]

    def eager() -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.layer_norm(summed, (n,), weight, bias), summed

    def ours() -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, weight, bias, backend=BACKEND)

    def liger() -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        summed = x + residual
        return LigerLayerNormFunction.apply(summed, weight, bias, 1e-5), summed

    peers: Peers = {OURS: ours, "eager": eager}
    if _has_cuda_kernels():
        peers[CUDA] = lambda: add_layer_norm(x, residual, weight, bias, backend="cuda")
    peers["torch.compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    if find_spec("liger_kernel"):
        peers["Liger"] = liger
    tensor = rows * n * x.element_size()
    with torch.no_grad():
        forward = {"ms": _milliseconds(peers), "bytes": 4 * tensor}
    backward_ms = _milliseconds(peers, lambda run: _gradients(run, leaves))
    backward = {"ms": backward_ms, "bytes": 4 * tensor}
    if add_layer_norm_backward.is_wide(n):
        backward["moved"] = 7 * tensor
    return {"forward": forward, "backward": backward}


def _diffusion(shape: tuple[int, ...]) -> dict:
    """The same timestep for all samples, which is all that diffusers' schedulers take."""
    schedule = diffusion.NoiseSchedule.linear(1000)
    sample, output = (_randn(*shape, dtype=torch.float32).detach() for _ in range(2))
    t = 500
    abar, abar_prev = (float(schedule.alphas_cumprod[i]) for i in (t, t - 1))
    alpha = abar / abar_prev
    deviation = ((1 - abar_prev) / (1 - abar) * (1 - alpha)) ** 0.5

    def clean_sample() -> Tensor:
        return (sample - (1 - abar) ** 0.5 * output) / abar**0.5

    def eager_add_noise() -> Tensor:
        return abar**0.5 * sample + (1 - abar) ** 0.5 * torch.randn_like(sample)

    def eager_ddpm_step() -> Tensor:
        mean = abar_prev**0.5 * (1 - alpha) / (1 - abar) * clean_sample()
        mean = mean + alpha**0.5 * (1 - abar_prev) / (1 - abar) * sample
        return mean + deviation * torch.randn_like(sample)

    def eager_ddim_step() -> Tensor:
        direction = (1 - abar_prev - deviation**2) ** 0.5 * output
        mean = abar_prev**0.5 * clean_sample() + direction
        return mean + deviation * torch.randn_like(sample)

    def ours(backend: str) -> Peers:
        options: dict[str, Any] = {"seed": 3, "backend": backend}
        return {
            "add_noise": lambda: diffusion.add_noise(sample, t, schedule, **options),
            "ddpm_step": lambda: diffusion.ddpm_step(output, t, sample, schedule, **options),
            "ddim_step": lambda: diffusion.ddim_step(
                output, t, sample, schedule, eta=1.0, **options
            ),
        }

    eager = {
        "add_noise": eager_add_noise,
        "ddpm_step": eager_ddpm_step,
        "ddim_step": eager_ddim_step,
    }
    steps: dict[str, Peers] = {
        name: {OURS: run, "eager": eager[name]} for name, run in ours(BACKEND).items()
    }
    if _has_cuda_kernels():
        for name, run in ours("cuda").items():
            steps[name][CUDA] = run
    if find_spec("diffusers"):
        for name, run in _diffusers(sample, output, t).items():
            steps[name]["diffusers"] = run
    tensors = {"add_noise": 2, "ddpm_step": 3, "ddim_step": 3}
    with torch.no_grad():
        return {
            name: {"ms": _milliseconds(peers), "bytes": tensors[name] * sample.nbytes}
            for name, peers in steps.items()
        }


def _diffusers(sample: Tensor, output: Tensor, t: int) -> Peers:
    from diffusers import DDIMScheduler, DDPMScheduler

    options = {"num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": False}
    ddpm, ddim = DDPMScheduler(**options), DDIMScheduler(**options)
    ddim.set_timesteps(1000)
    timesteps = torch.full(sample.shape[:1], t, device=sample.device)
    return {
        "add_noise": lambda: ddpm.add_noise(sample, torch.randn_like(sample), timesteps),
        "ddpm_step": lambda: ddpm.step(output, t, sample).prev_sample,
        "ddim_step": lambda: ddim.step(output, t, sample, eta=1.0).prev_sample,
    }


CASES: dict[str, Callable[[], dict]] = {
    "attention S16k hd128 full": lambda: _attention(16384, 16, False, None),
    "attention S16k hd128 causal": lambda: _attention(16384, 16, True, None),
    "add_layer_norm 65536 x 1024": lambda: _add_layer_norm(65536, 1024),
    "add_layer_norm 64 x 256": lambda: _add_layer_norm(64, 256),
    "diffusion (64, 3, 512, 512)": lambda: _diffusion((64, 3, 512, 512)),
    "attention S64k hd128 window (1024, 0)": lambda: _attention(65536, 8, False, (1024, 0)),
    "add_layer_norm 16384 x 4096": lambda: _add_layer_norm(16384, 4096),
    "add_layer_norm 4096 x 32768": lambda: _add_layer_norm(4096, 32768),
    "attention S64k hd128 window (127, 0)": lambda: _attention(65536, 8, False, (127, 0)),
    "add_layer_norm 1048576 x 64": lambda: _add_layer_norm(1 << 20, 64),
}


def main(output: Path) -> int:
    """Measures the cases that output does not hold yet, and writes it after each of them, so that a
    time limit loses the rest alone. Returns GPU_LOST where the rest needs another process.
    """
    # A backward pass is timed again and again on one graph, which must then keep its buffers.
    torch._functorch.config.donated_buffer = False
    results = json.loads(output.read_text()) if output.exists() else _ceilings()
    for name, case in CASES.items():
        if name in results["cases"]:
            continue
        torch.compiler.reset()  # every case compiles the same functions, of which few are kept
        start = time.perf_counter()
        try:
            measured = case()
        except Exception as error:
            results["cases"][name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        else:
            for part in measured.values():
                _add_rates(part, results)
            results["cases"][name] = measured
        results["seconds"][name] = time.perf_counter() - start
        print(name, json.dumps(results["cases"][name]), flush=True)
        write_file(json.dumps(results, indent=1).encode(), output)
        if is_lost(DEVICE):
            return GPU_LOST
    return 0


def _ceilings() -> dict[str, Any]:
    """The results before the first case."""
    ceilings = measure_ceilings(
        DEVICE, (torch.float32, torch.bfloat16), copy_bytes=1 << 30, matmul_size=8192, budget_s=1.0
    )
    return {
        "device": torch.cuda.get_device_name(DEVICE),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
        "matmul_tflop_per_s": {
            dtype: rate / 1e12 for dtype, rate in ceilings.matmul_flop_per_s.items()
        },
        "cases": {},
        "seconds": {},
    }


def _add_rates(part: dict[str, Any], ceilings: dict[str, Any]) -> None:
    """TFLOP/s or GB/s, and percent of the run's own ceiling."""
    for unit, amount, scale, ceiling in (
        ("tflop_per_s", "flops", 1e12, ceilings["matmul_tflop_per_s"]["bfloat16"]),
        ("gb_per_s", "bytes", 1e9, ceilings["copy_gb_per_s"]),
    ):
        if amount in part:
            milliseconds = {name: ms for name, ms in part["ms"].items() if not isinstance(ms, str)}
            rates = {name: part[amount] / (1e-3 * ms) / scale for name, ms in milliseconds.items()}
            part[unit] = rates
            part["percent_of_ceiling"] = {
                name: 100 * rate / ceiling for name, rate in rates.items()
            }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
