"""A linear layer with the cross-entropy of its logits in Triton;
`leedl_fast.reference.linear_cross_entropy` has the formulas.

The three matrix products are torch's (cuBLAS, which no kernel of ours would beat), of a chunk of
rows at a time; between them one Triton kernel turns the chunk's logits into losses and into the
logits' gradient, reading them twice where plain PyTorch makes six passes (the design of Liger, Hsu
et al. 2024). Logits are float32; their gradient is rounded to the inputs' dtype, as the products
that follow need it, and each of those is summed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.launching import Launch, Launcher

_MAX_BLOCK = 4096  # classes at a time
_MIN_CHUNK_ROWS = 256  # fewer would leave a GPU's matrix units idle


@triton.jit
def _load_logits(logits_ptr, begin, classes, BLOCK: tl.constexpr):
    column = begin + tl.arange(0, BLOCK)
    return tl.load(logits_ptr + column, column < classes, other=float("-inf"))


@triton.jit
def _loss_kernel(
    loss_ptr,
    dlogits_ptr,
    logits_ptr,
    targets_ptr,
    dloss_ptr,
    classes,
    ignore_index,
    label_smoothing,
    BLOCK: tl.constexpr,
):
    """One program owns a row: its loss, and its row of dlogits where that is wanted (dlogits_ptr
    may be logits_ptr). logits (rows, classes) float32; dloss (rows,) float32."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * classes
    target = tl.load(targets_ptr + row)
    is_ignored = target == ignore_index
    is_class = (target >= 0) & (target < classes)
    target_logit = tl.load(logits_ptr + target, is_class, other=float("nan"))

    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for begin in range(0, classes, BLOCK):
        largest = tl.maximum(largest, _load_logits(logits_ptr, begin, classes, BLOCK))
    row_max = tl.maximum(tl.max(largest, 0), -3.0e38)  # -inf less -inf would be NaN
    sums = tl.zeros((BLOCK,), tl.float32)
    differences = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, classes, BLOCK):
        logits = _load_logits(logits_ptr, begin, classes, BLOCK)
        sums += tl.exp(logits - row_max)
        if label_smoothing != 0:
            is_inside = begin + tl.arange(0, BLOCK) < classes
            differences += tl.where(is_inside, row_max - logits, 0.0)
    row_sum = tl.sum(sums, 0)
    loss = tl.log(row_sum) + (1 - label_smoothing) * (row_max - target_logit)
    if label_smoothing != 0:
        loss += label_smoothing * (tl.sum(differences, 0) / classes)
    tl.store(loss_ptr + row, tl.where(is_ignored, 0.0, loss))

    if dlogits_ptr is not None:
        dlogits_ptr += row * classes
        dloss = tl.load(dloss_ptr + row)
        dloss = tl.where(is_class, dloss, float("nan"))
        for begin in range(0, classes, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            p = tl.exp(_load_logits(logits_ptr, begin, classes, BLOCK) - row_max) / row_sum
            dlogits = (
                p - label_smoothing / classes - tl.where(column == target, 1 - label_smoothing, 0.0)
            )
            dlogits = tl.where(is_ignored, 0.0, dlogits * dloss)
            dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + column, dlogits, column < classes)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and kept in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":  # the interpreter's
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _chunk_rows(rows: int, in_features: int, vocab_size: int) -> int:
    """Rows whose logits are about as many numbers as all of hidden."""
    return max(_MIN_CHUNK_ROWS, triton.next_power_of_2(rows * in_features // vocab_size))


def _loss_launch(
    rows: int,
    classes: int,
    ignore_index: int,
    label_smoothing: float,
    dlogits_dtype: torch.dtype | None,
    device: torch.device,
) -> Launch:
    block = min(_MAX_BLOCK, triton.next_power_of_2(classes))
    return Launch(
        _loss_kernel,
        rows,
        (classes, ignore_index, label_smoothing),
        {"BLOCK": block},
        {"num_warps": max(1, min(8, block // 512)), "enable_fp_fusion": True},
    )


_launch_loss = Launcher(_loss_launch)


def run(
    losses: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """losses, dlosses: (rows,) float32. The gradients, float32, are made all or none, but for
    dbias."""
    rows, in_features = hidden.shape
    vocab_size = weight.shape[0]
    if dweight is not None:
        dweight.zero_()
    if dbias is not None:
        dbias.zero_()
    chunk_rows = _chunk_rows(rows, in_features, vocab_size)
    for begin in range(0, rows, chunk_rows):
        chunk = slice(begin, min(begin + chunk_rows, rows))
        logits = _product(hidden[chunk], weight.t())
        if bias is not None:
            logits += bias
        dlogits = None
        if dhidden is not None:
            is_float32 = hidden.dtype == torch.float32
            dlogits = logits if is_float32 else torch.empty_like(logits, dtype=hidden.dtype)
        dtype = None if dlogits is None else dlogits.dtype
        _launch_loss(
            (logits.shape[0], vocab_size, ignore_index, label_smoothing, dtype, hidden.device),
            losses[chunk],
            dlogits,
            logits,
            targets[chunk],
            dlosses[chunk],
        )
        if dlogits is None or dhidden is None or dweight is None:
            continue
        dhidden[chunk] = _product(dlogits, weight)
        dweight += _product(dlogits.t(), hidden[chunk])
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=torch.float32)
