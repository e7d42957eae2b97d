"""The Triton kernels in Triton's interpreter, on CPU tensors; `conftest.py` runs this file in a
process of its own.
"""

from itertools import pairwise
from typing import Any

import pytest
import rounded_interpreter  # noqa: F401  (before any kernel)
import torch
import triton
from torch import Tensor

from leedl_fast.backends import triton as triton_backend
from leedl_fast.kernels import add_layer_norm as forward_kernels
from leedl_fast.kernels import add_layer_norm_backward as backward_kernels
from leedl_fast.kernels import attention_blocks, attention_decode
from leedl_fast.ops import add_layer_norm, attention
from leedl_fast.reference.philox import attention_dropout_mask
from leedl_fast.testing.compare import assert_conforms, equal_bits
from leedl_fast.testing.noise import noise_is_the_cpus, steps_are_the_cpus
from leedl_fast.testing.samples import ATTENTION_EXTRAS, CASES, Case

# Cases with more tiles than the interpreter gets through in seconds; what they add beside others
# is length alone.
TOO_LONG = {
    "attention-full-long",
    "attention-causal-prime",
    "attention-window-causal",
    "attention-window-more-keys",
    "attention-window-fewer-keys",
    "additive_attention-causal",
    "additive_attention-full",
    "additive_attention-full-long",
    "additive_attention-gqa",
    "additive_attention-head-dim-300",
    "additive_attention-huge",
    "additive_attention-key-lengths",
    "additive_attention-key-lengths-window",
    "additive_attention-mqa-window",
    "additive_attention-one-query",
    "additive_attention-saturated",
    "additive_attention-transposed",
    "additive_attention-unaligned",
    "additive_attention-value-narrower",
    "additive_attention-value-wider",
    "additive_attention-window",
    "additive_attention-window-fewer-keys",
    "additive_attention-window-more-keys",
    "add_layer_norm-many-rows",
    "add_layer_norm-parallel",
    "add_layer_norm-dropout-parallel",
    "diffusion-add_noise-parallel",
    "diffusion-noise_prediction_loss-sum",
    "diffusion-ddpm_step-parallel",
    "linear_cross_entropy-many-rows",
}
ALL = dict.fromkeys((*CASES, *ATTENTION_EXTRAS))
SHORT = [case for case in ALL if case.op in triton_backend.TABLE and str(case) not in TOO_LONG]
# One number of the inputs' dtype is loaded and stored like another, whatever the sizes.
IN_HALF = {
    "attention-full-odd",
    "attention-causal",
    "attention-gqa",
    "attention-key-lengths-window",
    "attention-value-narrower",
    "attention-huge-scores",
    "additive_attention-full-odd",
    "additive_attention-gqa-lengths",
    "attention-bias-for-all",
    "attention-sigmoid-bias",
    "attention-relu",
    "attention-few-queries",
    "attention-everything",
    "attention-packed-everything",
    "add_layer_norm-one",
    "add_layer_norm-odd",
    "add_layer_norm-rms-bias",
    "add_layer_norm-dropout-odd",
    "add_layer_norm-wide-parameters",
    "add_layer_norm-wide-dropout",
    "diffusion-add_noise-noise",
    "diffusion-noise_prediction_loss-v_prediction",
    "diffusion-ddpm_step-guidance-clip",
    "linear_cross_entropy-odd",
    "linear_cross_entropy-none-smoothed",
}


def _check(case: Case, dtype: torch.dtype) -> None:
    try:
        assert_conforms(case, dtype, "triton")
    except NotImplementedError as error:  # what the table's `unsupported` says
        pytest.skip(str(error))


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_conformance_in_float32(case: Case) -> None:
    _check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in SHORT if str(case) in IN_HALF], ids=str)
def test_conformance_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    _check(case, dtype)


@pytest.mark.parametrize(
    "name",
    ["plain", "rms-bias", "no-weight", "odd", "dropout-odd"],
    ids=lambda name: f"add_layer_norm-{name}",
)
def test_rows_longer_than_the_registers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for such rows, on rows of a few blocks."""
    for kernels in (forward_kernels, backward_kernels):
        monkeypatch.setattr(kernels, "_MAX_N", 16)
        monkeypatch.setattr(kernels, "_WIDE_BLOCK", 32)
    monkeypatch.setattr(backward_kernels, "_parts_of", backward_kernels._parts_of.__wrapped__)
    (case,) = (case for case in CASES if str(case) == f"add_layer_norm-{name}")
    _check(case, torch.float32)


@pytest.mark.parametrize("count", [1, 3])
def test_few_programs_that_walk_the_rows_make_the_same_bits(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, residual = torch.randn(2, 151, 33)
    options = {"dropout_p": 0.2, "seed": 3, "backend": "triton"}
    alone = add_layer_norm(x, residual, **options)
    shared = attention_blocks.Blocks(4, 64, 2, 3, False, count)
    monkeypatch.setattr(forward_kernels, "blocks_for_rows", lambda *_: shared)
    monkeypatch.setattr(attention_blocks, "multiprocessors", lambda device: 5)
    for ours, theirs in zip(add_layer_norm(x, residual, **options), alone, strict=True):
        assert equal_bits(ours, theirs)


@pytest.mark.parametrize("n", [1, 6, 64, 133])
def test_dropout_drops_what_the_cpu_backend_drops(n: int) -> None:
    x = torch.rand(21, n) + 1
    options = {"dropout_p": 0.3, "seed": 2**45 + 9}

    def run(name: str) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        _, summed = add_layer_norm(leaf, torch.zeros_like(x), **options, backend=name)
        return summed == 0, torch.autograd.grad(summed.sum(), leaf)[0] == 0

    of_cpu = run("cpu")
    assert of_cpu[0].any()
    for mask, expected in zip(
        (*run("triton"), *run("eager"), of_cpu[1]), of_cpu * 2 + of_cpu[:1], strict=True
    ):
        assert torch.equal(mask, expected)


needs_exact_fma = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="the interpreter's fma rounds twice before Triton 3.9",
)


@needs_exact_fma
@pytest.mark.parametrize("n", [1, 3, 4, 1023, 1025])
def test_noise_is_the_cpu_backends_bit_for_bit(n: int) -> None:
    assert noise_is_the_cpus("triton", n)


@needs_exact_fma
def test_diffusion_steps_are_the_cpu_backends_bit_for_bit() -> None:
    assert steps_are_the_cpus("triton", 700)


def _lengths_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 3, 2, 70, 16)
    return q, k, v, torch.tensor([70, 37, 0])


def test_attention_reads_no_padding() -> None:
    q, k, v, lengths = _lengths_case()
    poisoned = [x.clone() for x in (k, v)]
    for x in poisoned:
        for sample, length in enumerate(lengths.tolist()):
            x[sample, :, length:] = torch.nan

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attention(*leaves, key_lengths=lengths, window=(20, 30), backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for with_nan, without in zip(run(q, *poisoned), run(q, k, v), strict=True):
        assert equal_bits(with_nan, without)


def test_attention_of_a_sample_does_not_depend_on_its_batch() -> None:
    q, k, v, lengths = _lengths_case()
    whole = attention(q, k, v, key_lengths=lengths, causal=True, backend="triton")
    for i in range(len(q)):
        sample = slice(i, i + 1)
        alone = attention(
            q[sample],
            k[sample],
            v[sample],
            key_lengths=lengths[sample],
            causal=True,
            backend="triton",
        )
        assert equal_bits(whole[sample], alone)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(67, 45), (3, 261)], ids=["rows", "splits"])
def test_dropout_keeps_what_the_reference_keeps(seqlen_q: int, seqlen_k: int) -> None:
    """With the identity for v, out shows which probabilities are left."""
    q, k = torch.randn(2, 2, seqlen_q, 16), torch.randn(2, 2, seqlen_k, 16)
    for begin in range(0, seqlen_k, 256):  # heads are at most so wide
        v = torch.eye(seqlen_k)[:, begin : begin + 256].expand(2, 2, -1, -1)
        seed = begin - 2**63
        out = attention(q, k, v, dropout_p=0.4, seed=seed, backend="triton")
        kept = attention_dropout_mask(torch.tensor([seed]), 0, 2, 2, seqlen_q, seqlen_k, 0.4)
        assert torch.equal(out != 0, kept[..., begin : begin + 256])


def test_packed_sequences_are_each_alone_bit_for_bit() -> None:
    cuts = torch.tensor([0, 70, 70, 71, 133])
    q, k, v = torch.randn(3, 1, 2, 133, 16)
    options = {"causal": True, "window": 40, "backend": "triton"}
    packed = attention(q, k, v, cu_seqlens_q=cuts, **options)
    alone = [
        attention(*(x[:, :, begin:end] for x in (q, k, v)), **options)
        for begin, end in pairwise(cuts.tolist())
    ]
    assert equal_bits(packed, torch.cat(alone, 2))


def test_few_queries_split_the_keys() -> None:
    """Only then, and without the keys out of a window's reach."""
    splits = {}

    def record(problem: Any) -> attention_decode.Splits | None:
        splits[problem.seqlen_q, problem.window_left] = found = splits_of(problem)
        return found

    splits_of = attention_decode.splits_of
    q, kv = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 900, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_decode, "splits_of", record)
        few = attention(q, kv, kv, backend="triton")
        many = attention(q.repeat(1, 1, 20, 1), kv, kv, backend="triton")
        attention(q, kv, kv, causal=True, window=300, backend="triton")
    assert splits == {(2, 902): (0, 4), (40, 940): None, (2, 300): (2, 2)}
    assert torch.allclose(few, many[:, :, :2], rtol=0, atol=1e-6)
