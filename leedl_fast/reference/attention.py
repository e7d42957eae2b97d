r"""Dot-product attention with everything that the fused kernels take, in plain PyTorch.

    Z_ij = softmax_scale * q_i . k_j                       S_ij = cap(Z_ij) + bias_ij - slope |d_ij|
    cap(z) = softcap * tanh(z / softcap)                   d_ij = i + seqlen_k - seqlen_q - j
    lse_i = log(exp(sink) + sum_j exp(S_ij))               P_ij = exp(S_ij - lse_i)
    out_i = sum_j D_ij P_ij v_j                            D_ij = 0 or 1 / (1 - dropout_p)

over the visible j (Vaswani et al. 2017, equation 1; softcap: Gemma 2, 2024; slopes: ALiBi, Press
et al. 2022; the sink is one more key of value zero, gpt-oss 2025). Each of cap, bias, slope, sink
and D is absent unless asked for. With dout and dlse the gradients of a scalar loss, and
delta_i = dout_i . out_i - dlse_i,

    dP_ij = D_ij dout_i . v_j                              dv_j = sum_i D_ij P_ij dout_i
    dS_ij = P_ij (dP_ij - delta_i)                         dbias_ij = dS_ij
    dZ_ij = dS_ij (1 - tanh(Z_ij / softcap)^2)             dsink = -sum_i exp(sink - lse_i) delta_i
    dq_i = softmax_scale sum_j dZ_ij k_j                   dk_j = softmax_scale sum_i dZ_ij q_i

(Dao et al. 2022, appendix B.2; the lse term follows from d lse_i / d S_ij = P_ij.) The other
normalizers have no lse and no sums over a row: P_ij = relu(S_ij) with dS_ij = dP_ij [S_ij > 0], and
P_ij = sigmoid(S_ij) with dS_ij = dP_ij P_ij (1 - P_ij).

This is the derivation that the fused kernels follow; here autograd finds the same gradients, to any
order.
"""

from itertools import pairwise

import torch
from torch import Tensor

from leedl_fast.reference.philox import attention_dropout_mask


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    window_left: int,
    window_right: int,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Boolean mask, True where query i sees key j; (seqlen_q, seqlen_k), or (batch, 1, seqlen_q,
    seqlen_k) with key_lengths.

    None when every query sees every key.
    """
    shift = seqlen_k - seqlen_q
    limited_left = (
        window_left < seqlen_k - 1
    )  # the last query, at position seqlen_k - 1, reaches key 0 otherwise
    limited_right = (
        window_right < seqlen_q - 1
    )  # likewise the first query, at position shift, the last key
    mask = None
    if limited_left or limited_right:
        position = torch.arange(seqlen_q, device=device)[:, None] + shift
        key = torch.arange(seqlen_k, device=device)[None, :]
        mask = (key >= position - window_left) & (key <= position + window_right)
    if key_lengths is not None:
        inside = torch.arange(seqlen_k, device=device) < key_lengths[:, None, None, None]
        mask = inside if mask is None else mask & inside
    return mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    normalizer: str = "softmax",
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = True,
    first_sample: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """out (batch, num_heads, seqlen_q, head_dim_v) and lse (batch, num_heads, seqlen_q), or None
    unless wanted (and for other normalizers than softmax).

    The scores after their product, the softmax and lse are made in float32 (float64 for float64). A
    row that sees nothing gives zeros and lse = -inf. Sample b takes the dropout mask of sample
    first_sample + b.
    """
    options = {
        "softmax_scale": softmax_scale,
        "window_left": window_left,
        "window_right": window_right,
        "normalizer": normalizer,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "return_lse": return_lse,
    }
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        return _packed(q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed, options)
    batch, num_heads, seqlen_q = q.shape[:3]
    seqlen_k = k.shape[2]
    groups = num_heads // k.shape[1] if k.shape[1] else 1
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-2, -1)) * softmax_scale
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        position = torch.arange(seqlen_q, device=q.device)[:, None] + (seqlen_k - seqlen_q)
        distance = (position - torch.arange(seqlen_k, device=q.device)).abs()
        scores = scores - alibi_slopes[..., None, None] * distance

    mask = visible_keys(seqlen_q, seqlen_k, window_left, window_right, key_lengths, q.device)
    if bias is not None:
        unmasked = ~bias.isneginf()
        mask = unmasked if mask is None else mask & unmasked
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)

    lse = None
    if normalizer == "softmax":
        probabilities, lse = _softmax(scores, mask, sinks, return_lse)
    else:
        probabilities = torch.relu(scores) if normalizer == "relu" else torch.sigmoid(scores)
    if dropout_p > 0:
        assert seed is not None
        keep = attention_dropout_mask(
            seed, first_sample, batch, num_heads, seqlen_q, seqlen_k, dropout_p
        )
        probabilities = probabilities * keep / (1 - dropout_p)
    return probabilities.to(v.dtype) @ v, lse


def _softmax(
    scores: Tensor, mask: Tensor | None, sinks: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if sinks is not None:
        sink_column = sinks[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink_column), dim=-1)
        lse = torch.logsumexp(scores, dim=-1) if return_lse else None
        return torch.softmax(scores, dim=-1)[..., :-1], lse
    if mask is None:
        return torch.softmax(scores, dim=-1), scores.logsumexp(dim=-1) if return_lse else None
    # Rows that see nothing get scores of zero, so that no NaN enters the graph.
    hidden = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(hidden, 0.0)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    lse = None
    if return_lse:
        lse = torch.logsumexp(scores, dim=-1).masked_fill(hidden.squeeze(-1), -torch.inf)
    return probabilities, lse


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    options: dict,
) -> tuple[Tensor, Tensor | None]:
    """One sequence after the other; sequence s is sample s of a batch."""
    parts = []
    ranges = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for sample, ((begin_q, end_q), (begin_k, end_k)) in enumerate(ranges):
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[sample : sample + 1]
        keys = slice(begin_k, end_k)
        parts.append(
            attention(
                q[:, :, begin_q:end_q],
                k[:, :, keys],
                v[:, :, keys],
                sinks=sinks,
                alibi_slopes=slopes,
                seed=seed,
                first_sample=sample,
                **options,
            )
        )
    if not parts:
        out = q[..., :1].expand(*q.shape[:3], v.shape[3]) * 0
        parts = [(out, out[..., 0].to(torch.promote_types(q.dtype, torch.float32)))]
    lse = [part for _, part in parts if part is not None]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat(lse, dim=2) if lse else None
