"""The Triton and the CUDA backend on a GPU: every sample against float64, as the interpreter and
the emulator run them.
"""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leedl_fast import tuning
from leedl_fast.backends import cuda, table, use_backend
from leedl_fast.kernels import attention_blocks
from leedl_fast.layers import MultiHeadAttention, TransformerEncoderLayer
from leedl_fast.ops import add_layer_norm, attention, diffusion
from leedl_fast.reference.philox import attention_dropout_mask
from leedl_fast.testing.compare import (
    allowed_error,
    assert_conforms,
    max_error,
    poisoned_outputs,
)
from leedl_fast.testing.samples import ATTENTION_EXTRAS, CASES, Case

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no GPU, and these tests run on one"
)
ALL = dict.fromkeys((*CASES, *ATTENTION_EXTRAS))
BACKENDS = ("triton", "cuda")


def _need(backend: str) -> None:
    """Where nothing could build the CUDA kernels there is nothing to test."""
    if backend == "cuda" and cuda.reason() is not None:
        pytest.skip(str(cuda.reason()))


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _parameters() -> Iterator[Any]:
    """float16 is bfloat16 with other roundings: a few samples do."""
    for backend in BACKENDS:
        for case in (case for case in ALL if case.op in table(backend)):
            few = case.op == "attention" and not case.name.endswith("everything")
            for dtype in ("float32", "bfloat16", *(() if few else ("float16",))):
                name = f"{case}-{dtype}" + ("-cuda" if backend == "cuda" else "")
                yield pytest.param(case, getattr(torch, dtype), backend, id=name)


@pytest.mark.parametrize(("case", "dtype", "backend"), list(_parameters()))
def test_conformance(case: Case, dtype: torch.dtype, backend: str) -> None:
    _need(backend)
    try:
        assert_conforms(case, dtype, backend, device="cuda")
    except NotImplementedError as error:  # what the table's `unsupported` says
        pytest.skip(str(error))


@pytest.mark.parametrize("window", [None, 300], ids=["causal", "window"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_attention_against_the_reference(head_dim: int, window: int | None) -> None:
    """Many tiles, all three parts of every loop, at the default head sizes."""
    q, k, v = torch.randn(3, 1, 4, 2100, head_dim, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k[:, :2], v[:, :2])]
    dout = torch.randn_like(q)

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        out = attention(*(x.to(dtype) for x in leaves), causal=True, window=window, backend=backend)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    exact = run("eager", torch.float64)
    for name, ours, plain, expected in zip(
        ("out", "dq", "dk", "dv"),
        run("triton", torch.bfloat16),
        run("eager", torch.bfloat16),
        exact,
        strict=True,
    ):
        assert max_error(ours, expected) <= allowed_error(plain, expected, torch.bfloat16), name


LAYERS = {
    "attention": partial(MultiHeadAttention, num_heads_k=2, causal=True, window=20),
    "encoder": partial(TransformerEncoderLayer, window=20),
    "encoder-norm-first": partial(TransformerEncoderLayer, causal=True, norm_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    """Outputs and every gradient of the layers, which pick the backend themselves."""
    layer = LAYERS[name](64, 4).cuda()
    exact = copy.deepcopy(layer).double()
    x = torch.randn(3, 70, 64, device="cuda")
    dout = torch.randn_like(x)

    def run(module: nn.Module, dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
        with use_backend(backend), poisoned_outputs() as ran:
            leaf = x.to(dtype).requires_grad_()
            out = module(leaf)
            parameters = dict(module.named_parameters())
            grads = torch.autograd.grad(out, [leaf, *parameters.values()], dout.to(dtype))
        assert bool(ran) == (backend is None)
        return dict(zip(("out", "x", *parameters), (out, *grads), strict=True))

    expected = run(exact, torch.float64, "eager")
    plain, actual = run(layer, torch.float32, "eager"), run(layer, torch.float32, None)
    for key, value in expected.items():
        assert max_error(actual[key], value) <= allowed_error(plain[key], value, torch.float32), key


def test_gradients_do_not_change_from_run_to_run() -> None:
    q, k, v = (torch.randn(2, 4, 1000, 64, device="cuda", requires_grad=True) for _ in range(3))
    bias = torch.randn(1000, device="cuda", requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out = attention(q, k, v, bias=bias, window=200, dropout_p=0.1, seed=1, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, run(), first))


def test_dropout_keeps_what_the_reference_keeps() -> None:
    q, k = torch.randn(2, 2, 300, 64, device="cuda"), torch.randn(2, 2, 200, 64, device="cuda")
    v = torch.eye(200, device="cuda").expand(2, 2, -1, -1)
    out = attention(q, k, v, dropout_p=0.4, seed=-3, backend="triton")
    kept = attention_dropout_mask(torch.tensor([-3], device="cuda"), 0, 2, 2, 300, 200, 0.4)
    assert torch.equal(out != 0, kept)


def test_packed_sequences_are_each_alone_bit_for_bit() -> None:
    cuts = torch.tensor([0, 700, 700, 701, 1330])
    q, k, v = torch.randn(3, 1, 2, 1330, 64, device="cuda", dtype=torch.bfloat16)
    options = {"causal": True, "window": 400, "backend": "triton"}
    packed = attention(q, k, v, cu_seqlens_q=cuts.cuda(), **options)
    alone = [
        attention(*(x[:, :, begin:end] for x in (q, k, v)), **options)
        for begin, end in pairwise(cuts.tolist())
    ]
    assert torch.equal(packed, torch.cat(alone, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 1023, 1 << 20])
def test_noise_is_the_cpus_bit_for_bit(n: int, backend: str) -> None:
    _need(backend)
    seeds = torch.tensor([0, -1, 2**63 - 1])
    on_gpu = diffusion.randn((3, n), seed=seeds.cuda(), device="cuda", backend=backend)
    on_cpu = diffusion.randn((3, n), seed=seeds, backend="eager")
    assert torch.equal(on_gpu.cpu().view(torch.int32), on_cpu.view(torch.int32))


def test_long_rows_are_addressed_past_2_to_the_31() -> None:
    """The last head of a tensor of 2^31 elements and more."""
    heads, seqlen, head_dim = 65, 1 << 18, 128
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    q = torch.zeros(1, heads, seqlen, head_dim, device="cuda", dtype=torch.bfloat16)
    q[:, -1] = torch.randn(seqlen, head_dim, device="cuda", dtype=torch.bfloat16)
    whole = attention(q, q, q, window=(16, 0), backend="triton")
    last = q[:, -1:].contiguous()
    alone = attention(last, last, last, window=(16, 0), backend="triton")
    assert torch.equal(whole[:, -1:], alone)


@pytest.mark.parametrize("window", [None, (300, 0)], ids=["full", "window"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tensor_descriptors_load_what_pointers_load(
    head_dim: int, window: tuple[int, int] | None
) -> None:
    if not tuning.takes_descriptors(torch.device("cuda")):
        pytest.skip("the kernels use no tensor descriptors on this GPU")
    q, k, v, dout = torch.randn(4, 1, 4, 1500, head_dim, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> tuple[Tensor, ...]:
        out = attention(*leaves, window=window, backend="triton")
        return out, *torch.autograd.grad(out, leaves, dout)

    by_pointers = run()
    with attention_blocks.changed(descriptors=True):
        assert all(map(torch.equal, run(), by_pointers))


@pytest.mark.parametrize("packed", [False, True], ids=["window", "packed"])
def test_few_programs_that_walk_the_tiles_make_the_same_bits(packed: bool) -> None:
    q, k, v = torch.randn(3, 1, 8, 5000, 64, device="cuda", dtype=torch.bfloat16)
    options = {"window": (100, 0), "backend": "triton"}
    if packed:
        options["cu_seqlens_q"] = torch.arange(0, 5001, 50, device="cuda")
    alone = attention(q, k, v, **options)
    for count in (1, 2):
        with attention_blocks.changed(programs_per_sm=count):
            assert torch.equal(attention(q, k, v, **options), alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bound_launches_are_the_first_ones_bit_for_bit(backend: str) -> None:
    """Also on tensors at other addresses, one of them not aligned, and into a CUDA graph."""
    _need(backend)
    x, residual = torch.randn(2, 64, 256, device="cuda")
    weight, bias = torch.randn(2, 256, device="cuda")

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        outputs = add_layer_norm(*leaves, dropout_p=0.2, seed=3, backend=backend)
        return *outputs, *torch.autograd.grad(outputs, leaves, [residual, x])

    inputs = x, residual, weight, bias
    first = run(*inputs)
    for offset in (0, 1, 4):
        shifted = [x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x) for x in inputs]
        for _ in range(2):
            assert all(map(torch.equal, run(*shifted), first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*inputs)
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, captured, first))


def test_attention_and_steps_are_launched_again_bit_for_bit() -> None:
    """With the same tensors elsewhere, and one of them not aligned."""
    schedule = diffusion.NoiseSchedule.linear(10)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        options = {"window": (70, 5), "dropout_p": 0.2, "seed": 3, "backend": "triton"}
        out, lse = attention(*leaves, return_lse=True, **options)
        gradients = torch.autograd.grad((out, lse), leaves, (tensors[0], torch.ones_like(lse)))
        step = diffusion.ddpm_step(
            tensors[0], 5, tensors[1], schedule, seed=4, clip_range=1.0, backend="triton"
        )
        return out, lse, *gradients, step

    tensors = tuple(torch.randn(3, 2, 4, 130, 64, device="cuda"))
    first = run(*tensors)
    for offset in (0, 4, 1):
        shifted = [x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x) for x in tensors]
        for _ in range(2):
            assert all(map(torch.equal, run(*shifted), first))


@pytest.mark.parametrize("n", [768, 4096, 12288, 40000])
def test_cuda_rows_of_any_length_against_the_reference(n: int) -> None:
    _need("cuda")
    x, residual, dnormed = torch.randn(3, 300, n, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2, n, device="cuda", dtype=torch.bfloat16)

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual, weight, bias)]
        normed, summed = add_layer_norm(*leaves, backend=backend)
        return normed, summed, *torch.autograd.grad(normed, leaves, dnormed.to(dtype))

    exact, plain = run("eager", torch.float64), run("eager", torch.bfloat16)
    ours = run("cuda", torch.bfloat16)
    assert all(map(torch.equal, ours, run("cuda", torch.bfloat16)))
    for actual, eager, expected in zip(ours, plain, exact, strict=True):
        assert max_error(actual, expected) <= allowed_error(eager, expected, torch.bfloat16)
