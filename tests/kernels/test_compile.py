"""Every kernel compiles for every kind of GPU, as its launcher launches it, and none needs a GPU
for that; registers and shared memory suffice.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from leedl_fast.kernels import (
    add_layer_norm,
    add_layer_norm_backward,
    additive_attention,
    additive_attention_backward,
    attention,
    attention_backward,
    attention_blocks,
    diffusion,
    linear_cross_entropy,
)
from leedl_fast.ops.add_layer_norm import Problem as AddLayerNormProblem
from leedl_fast.ops.additive_attention import Problem as AdditiveAttentionProblem
from leedl_fast.ops.attention_problem import Inputs, describe
from leedl_fast.ops.diffusion_operators import Problem as DiffusionProblem

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Where something else runs out or is missing; sm_86 and sm_89 have the kernels of sm_80.
OTHERS = {"sm_120": GPUTarget("cuda", 120, 32), "gfx90a": GPUTarget("hip", "gfx90a", 64)}
SHARED_MEMORY = {
    "sm_80": 101376,  # as much as sm_86 and sm_89 have; itself has 166912
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
    "sm_120": 101376,
    "gfx90a": 65536,
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

_ARCHITECTURES = {
    80: "ampere",
    90: "hopper",
    100: "blackwell",
    120: "ampere",
    "gfx942": "cdna",
    "gfx90a": "cdna",
}

bfloat16, float32 = torch.bfloat16, torch.float32
Launch = Callable[[], None]


def _compile(target: GPUTarget, launch: Launch) -> list[CompiledKernel]:
    """The kernels that `launch` launches, compiled with its arguments instead of run."""
    kernels = []
    backend = make_backend(target)

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        source = ASTSource(self, signature, constants, attributes)
        kernels.append(triton.compile(source, target=target, options=options.__dict__))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(attention_blocks, "architecture", lambda device: _ARCHITECTURES[target.arch])
        launch()
    return kernels


def _spilled(kernel: CompiledKernel, folder: Path) -> int:
    """Bytes of stack (NVIDIA) or vector registers (AMD) that spilled to memory."""
    if "amdgcn" in kernel.asm:
        (count,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        return int(count)
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [str(CUOBJDUMP), "-res-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


def _attention(
    dtype: torch.dtype,
    head_dim: int,
    *,
    seqlen_q: int = 1024,
    window: int = 128,
    normalizer: str = "softmax",
    softcap: float | None = None,
    dropout_p: float = 0.0,
    bias: bool = False,
    packed: bool = False,
    with_backward: bool = True,
    **others: Tensor,
) -> Launch:
    """others: Inputs by name."""
    batch, heads, heads_k, seqlen_k = 1 if packed else 2, 4, 2, 1024
    q = torch.empty(batch, heads, seqlen_q, head_dim, dtype=dtype)
    k = torch.empty(batch, heads_k, seqlen_k, head_dim, dtype=dtype)
    if bias:
        others["bias"] = torch.empty(1, heads, seqlen_q, seqlen_k, dtype=dtype)
    if packed:
        others |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.empty(5, dtype=torch.int64))
    if dropout_p > 0:
        others["seed"] = torch.empty(1, dtype=torch.int64)
    inputs = Inputs(q, k, k, **others)
    problem = describe(inputs, 0.1, window, 0, normalizer, softcap, dropout_p, bias)
    row, dsinks, dbias = torch.empty(q.shape[:3]), torch.empty(heads), torch.empty(0)

    def launch() -> None:
        attention.forward(problem, q, row, row, row, *inputs)
        if with_backward:
            gradients = q, k, k, inputs.bias if bias else dbias, dsinks
            attention_backward.backward(problem, *gradients, q, row, *inputs, q, row, row)

    return launch


def _additive_attention(dtype: torch.dtype, head_dim: int) -> Launch:
    q = torch.empty(2, 4, 1024, head_dim, dtype=dtype)
    k = torch.empty(2, 2, 1024, head_dim, dtype=dtype)
    weight, dweight = torch.empty(4, head_dim, dtype=dtype), torch.empty(4, head_dim)
    rows, lengths = torch.empty(2, 4, 1024), torch.empty(2, dtype=torch.int64)
    problem = AdditiveAttentionProblem(
        2, 4, 2, 1024, 1024, head_dim, head_dim, dtype, q.device, 128, 0
    )
    inputs = q, k, k, weight, lengths

    def launch() -> None:
        additive_attention.forward(problem, q, rows, rows, *inputs)
        additive_attention_backward.backward(problem, q, k, k, dweight, q, *inputs, rows, rows)

    return launch


def _add_layer_norm(
    dtype: torch.dtype, n: int, residual_dtype: torch.dtype | None = None, dropout_p: float = 0.0
) -> Launch:
    x, residual = torch.empty(64, n, dtype=dtype), torch.empty(64, n, dtype=residual_dtype or dtype)
    weight = torch.empty(n, dtype=dtype)
    seed = torch.empty(1, dtype=torch.int64) if dropout_p else None
    dtypes = dtype, residual.dtype, dtype
    problem = AddLayerNormProblem(64, n, *dtypes, x.device, 1e-5, "layer", dropout_p)

    def launch() -> None:
        add_layer_norm.forward(problem, x, residual, x, residual, weight, weight, seed)
        add_layer_norm_backward.backward(
            problem, residual, weight, weight, x, residual, residual, weight
        )
        if seed is not None:
            add_layer_norm.dropout_backward(problem, x, residual, seed)

    return launch


def _diffusion(dtype: torch.dtype) -> Launch:
    batch, n = 2, 4096
    x, seeds = torch.empty(batch, n, dtype=dtype), torch.empty(batch, dtype=torch.int64)
    two, six = (
        torch.empty(batch, 2, dtype=torch.float64),
        torch.empty(batch, 6, dtype=torch.float64),
    )
    sums = torch.empty(batch, dtype=torch.float64)

    problem = DiffusionProblem((batch, n), dtype, x.device, 2.0)
    clipped = problem._replace(clip_range=1.0)

    def launch() -> None:
        diffusion.randn(problem, x, seeds)
        diffusion.add_noise(problem, x, x, None, two, seeds)
        diffusion.noise_prediction_loss_forward(problem, sums, x, x, None, two, seeds)
        diffusion.noise_prediction_loss_backward(problem, x, x, x, None, two, sums, seeds)
        diffusion.step(clipped, x, x, x, x, None, six, seeds, seeds)
        diffusion.step(problem, x, x, x, x, x, six, None, None)

    return launch


def _linear_cross_entropy(dtype: torch.dtype, vocab_size: int, smoothing: float = 0.0) -> Launch:
    hidden, weight = torch.zeros(3, 8, dtype=dtype), torch.zeros(vocab_size, 8, dtype=dtype)
    rows, targets = torch.empty(3), torch.zeros(3, dtype=torch.int64)
    gradients = torch.empty(3, 8), torch.empty(vocab_size, 8), None

    def launch() -> None:
        for outputs in (gradients, (None, None, None)):
            linear_cross_entropy.run(
                *(rows, *outputs, rows, hidden, weight, None, targets),
                ignore_index=-100,
                label_smoothing=smoothing,
            )

    return launch


EXTRAS: dict[str, Any] = {
    "bias": True,
    "softcap": 3.0,
    "dropout_p": 0.1,
    "sinks": torch.empty(4),
    "alibi_slopes": torch.empty(4),
    "key_lengths": torch.empty(2, dtype=torch.int64),
}
CASES: list[tuple[str, Launch, tuple[str, ...]]] = [
    ("attention-bfloat16-64", _attention(bfloat16, 64, window=1024), tuple(TARGETS)),
    ("attention-bfloat16-128", _attention(bfloat16, 128, window=1024), (*TARGETS, "sm_120")),
    ("attention-window", _attention(bfloat16, 128, with_backward=False), ("sm_90", "gfx942")),
    ("attention-float32-64", _attention(float32, 64), ("sm_90",)),
    ("additive_attention-bfloat16-64", _additive_attention(bfloat16, 64), tuple(TARGETS)),
    ("additive_attention-float32-64", _additive_attention(float32, 64), ("sm_90",)),
    ("additive_attention-float32-300", _additive_attention(float32, 300), tuple(TARGETS)),
    ("additive_attention-bfloat16-256", _additive_attention(bfloat16, 256), ("sm_90",)),
    ("attention-extras", _attention(bfloat16, 64, **EXTRAS), ("sm_90",)),
    ("attention-bias", _attention(bfloat16, 64, window=1024, bias=True), ("sm_80",)),
    ("attention-packed", _attention(bfloat16, 128, packed=True), ("sm_90",)),
    ("attention-sigmoid", _attention(bfloat16, 128, normalizer="sigmoid"), ("sm_90",)),
    (
        "attention-few-queries",
        _attention(bfloat16, 128, seqlen_q=1, window=1024, with_backward=False),
        (*TARGETS, *OTHERS),
    ),
    ("add_layer_norm-bfloat16-1024", _add_layer_norm(bfloat16, 1024), tuple(TARGETS)),
    ("add_layer_norm-float32-8192", _add_layer_norm(float32, 8192), tuple(TARGETS)),
    (
        "add_layer_norm-bfloat16-float32-1024-dropout",
        _add_layer_norm(bfloat16, 1024, float32, 0.1),
        tuple(TARGETS),
    ),
    ("add_layer_norm-float32-8192-dropout", _add_layer_norm(float32, 8192, None, 0.1), ("sm_90",)),
    (
        "add_layer_norm-bfloat16-40000-dropout",
        _add_layer_norm(bfloat16, 40000, None, 0.1),
        ("sm_90",),
    ),
    ("add_layer_norm-bfloat16-40000", _add_layer_norm(bfloat16, 40000), tuple(TARGETS)),
    ("linear_cross_entropy-bfloat16-100", _linear_cross_entropy(bfloat16, 100), tuple(TARGETS)),
    ("linear_cross_entropy-float32-30522", _linear_cross_entropy(float32, 30522), tuple(TARGETS)),
    ("linear_cross_entropy-smoothed", _linear_cross_entropy(float32, 9000, 0.1), ("sm_90",)),
    ("diffusion-float32", _diffusion(float32), tuple(TARGETS)),
    ("diffusion-bfloat16", _diffusion(bfloat16), ("sm_90",)),
]


needs_newer_triton = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="Triton 3.6 spills up to 72 bytes here",
)
SPILL_IN_3_6 = ("additive_attention-float32-300", "additive_attention-bfloat16-256")


def _parameters() -> list[Any]:
    return [
        pytest.param(
            launch,
            target,
            id=f"{name}-{target}",
            marks=[needs_newer_triton] if name in SPILL_IN_3_6 else [],
        )
        for name, launch, targets in CASES
        for target in targets
    ]


@pytest.mark.parametrize(("launch", "target"), _parameters())
def test_kernels_compile_without_spills(launch: Launch, target: str, tmp_path: Path) -> None:
    kernels = _compile((TARGETS | OTHERS)[target], launch)
    assert kernels
    for kernel in kernels:
        assert _spilled(kernel, tmp_path) == 0, kernel.metadata.name
        assert kernel.metadata.shared <= SHARED_MEMORY[target], kernel.metadata.name


def test_spills_are_seen(tmp_path: Path) -> None:
    """The check above finds the spills of rows too long for the registers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_layer_norm, "_MAX_N", 32768)
        kernels = _compile(TARGETS["sm_90"], _add_layer_norm(float32, 32768))
    assert _spilled(kernels[0], tmp_path) > 0


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_descriptors_load_and_store_without_spills(target: str, tmp_path: Path) -> None:
    """In the forward pass, both loops of the backward one and decoding, where the table asks for
    them, on what `tuning.takes_descriptors` allows.
    """
    with attention_blocks.changed(descriptors=True):
        whole = _attention(bfloat16, 128, window=1024)
        split = _attention(bfloat16, 128, seqlen_q=1, window=1024, with_backward=False)
        kernels = _compile(TARGETS[target], whole) + _compile(TARGETS[target], split)
    stores = ("_forward_kernel", "_query_kernel")
    with_loop = [
        kernel
        for kernel in kernels
        if kernel.metadata.name not in ("_delta_kernel", "_combine_kernel")
    ]
    assert len(with_loop) == 4
    for kernel in with_loop:
        name, ptx = kernel.metadata.name, kernel.asm["ptx"]
        assert "cp.async.bulk.tensor.4d.shared" in ptx, name
        assert ("cp.async.bulk.tensor.4d.global" in ptx) == (name in stores), name
        assert _spilled(kernel, tmp_path) == 0, name
        assert kernel.metadata.shared <= SHARED_MEMORY[target], name


@pytest.mark.parametrize(
    ("tile", "target"),
    [
        ((64, 32, 4, 2, False, 2), "gfx942"),
        ((64, 32, 4, 2, False, 2), "sm_90"),
        ((64, 64, 4, 3, True, 2), "sm_90"),
        *(
            pytest.param(tile, "sm_90", marks=needs_newer_triton)
            for tile in (
                (64, 32, 4, 3, False, 2),
                (64, 64, 4, 2, False, 2),
                (128, 64, 8, 3, False, 1),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True], ids=["window", "packed"])
def test_programs_that_walk_tiles_do_not_spill(
    packed: bool, tile: tuple[int, ...], target: str, tmp_path: Path
) -> None:
    """With some of the tiles that `leedl-fast tune` tries."""
    launch = _attention(bfloat16, 128, packed=packed, with_backward=False)
    fields = attention_blocks.Blocks(*tile)._asdict()
    with attention_blocks.changed(**fields), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "multiprocessors", lambda device: 4)
        (kernel,) = _compile(TARGETS[target], launch)
    assert _spilled(kernel, tmp_path) == 0
    assert kernel.metadata.shared <= SHARED_MEMORY[target]


@pytest.mark.parametrize(("target", "num_stages"), [("sm_90", 2), ("gfx942", 1)])
@pytest.mark.parametrize("packed", [False, True], ids=["window", "packed"])
def test_backward_programs_that_walk_tiles_do_not_spill(
    packed: bool, target: str, num_stages: int, tmp_path: Path
) -> None:
    """With the table's own tiles, but for the stages on gfx942, where two spill 5 registers."""
    launch, names = _attention(bfloat16, 128, packed=packed), ("query", "key_value")
    tiles = attention_blocks.changed(names, programs_per_sm=2, num_stages=num_stages)
    with tiles, pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "multiprocessors", lambda device: 4)
        compiled = {kernel.metadata.name: kernel for kernel in _compile(TARGETS[target], launch)}
    for name in names:
        kernel = compiled[f"_{name}_kernel"]
        assert _spilled(kernel, tmp_path) == 0, name
        assert kernel.metadata.shared <= SHARED_MEMORY[target], name


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("n", [64, 1024])
def test_programs_that_walk_rows_do_not_spill(n: int, target: str, tmp_path: Path) -> None:
    tile = attention_blocks.Blocks(4096 // n, n, 4, 3, programs_per_sm=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_layer_norm, "blocks_for_rows", lambda *_: tile)
        patch.setattr(attention_blocks, "multiprocessors", lambda device: 4)
        kernels = _compile(TARGETS[target], _add_layer_norm(bfloat16, n, None, 0.1))
    assert _spilled(kernels[0], tmp_path) == 0
