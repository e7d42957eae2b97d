r"""Scaled dot-product attention with a window, in plain PyTorch.

    S_ij = softmax_scale * q_i . k_j        out_i = sum_j P_ij v_j        P_ij = exp(S_ij - lse_i)
    lse_i = log sum_j exp(S_ij)             over the visible j

(Vaswani et al. 2017, equation 1.) With dout and dlse the gradients of a scalar loss, and delta_i =
dout_i . out_i - dlse_i,

    dS_ij = P_ij (dout_i . v_j - delta_i)
    dq_i = softmax_scale sum_j dS_ij k_j
    dk_j = softmax_scale sum_i dS_ij q_i
    dv_j = sum_i P_ij dout_i

(Dao et al. 2022, appendix B.2; the lse term follows from d lse_i / d S_ij = P_ij.) This is the
derivation that the fused kernels follow; here autograd finds the same gradients, to any order.
"""

import torch
from torch import Tensor


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
    key_lengths: Tensor | None,
    *,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """out (batch, num_heads, seqlen_q, head_dim_v) and lse (batch, num_heads, seqlen_q), or None
    unless wanted.

    The softmax and lse are made in float32 (float64 for float64). A fully masked row gives zeros
    and lse = -inf.
    """
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-2, -1)) * softmax_scale
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    mask = visible_keys(q.shape[2], k.shape[2], window_left, window_right, key_lengths, q.device)
    row_is_visible = None
    if mask is not None:
        row_is_visible = mask.any(-1, keepdim=True)
        # Rows that see nothing stay unmasked, so that no NaN enters the graph, and are zeroed
        # below.
        scores = scores.masked_fill(~mask & row_is_visible, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)
    out = probabilities.to(v.dtype) @ v
    lse = torch.logsumexp(scores, dim=-1) if return_lse else None
    if row_is_visible is not None:
        out = out * row_is_visible
        if lse is not None:
            lse = lse.masked_fill(~row_is_visible.squeeze(-1), -torch.inf)
    return out, lse
