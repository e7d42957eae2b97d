r"""Additive attention in plain PyTorch.

    x_ijc = q_ic + k_jc       S_ij = sum_c w_c tanh(x_ijc)       P_ij = exp(S_ij) / sum_j exp(S_ij)
    out_i = sum_j P_ij v_j

over the visible j, with the score of Bahdanau et al. 2015 (appendix A.1.2; w is their v_a, q and k
are W_a s and U_a h). With dout the gradient of a scalar loss and delta_i = dout_i . out_i,

    dS_ij = P_ij (dout_i . v_j - delta_i)                        dv_j = sum_i P_ij dout_i
    dx_ijc = dS_ij w_c (1 - tanh(x_ijc)^2)                       dw_c = sum_ij dS_ij tanh(x_ijc)
    dq_i = sum_j dx_ij                                           dk_j = sum_i dx_ij

Fused kernels never hold x, and may use two identities. With E = exp(2 x) = exp(2 q) exp(2 k) and
r = 1 / (1 + E), tanh(x) = 1 - 2 r and 1 - tanh(x)^2 = 4 r (1 - r): where exp(2 q) and exp(2 k) are
in range, as many exponentials are made as there are numbers in q and k. And sum_c w_c, which then
stands in every score, falls out of the softmax; likewise dw_c = -2 sum_ij dS_ij r_ijc, since
sum_j dS_ij = 0.
"""

import torch
from torch import Tensor

from leedl_fast.reference.attention import visible_keys


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_weight: Tensor,
    key_lengths: Tensor | None,
    *,
    window_left: int,
    window_right: int,
) -> Tensor:
    """out (batch, num_heads, seqlen_q, head_dim_v); score_weight is (num_heads, head_dim).

    The softmax is made in float32 (float64 for float64). A row that sees nothing gives zeros.
    """
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    features = torch.tanh(q[:, :, :, None] + k[:, :, None])  # (..., seqlen_q, seqlen_k, head_dim)
    scores = (features @ score_weight[:, None, :, None]).squeeze(-1)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    mask = visible_keys(
        q.shape[2], k.shape[2], window_left, window_right, key_lengths, device=q.device
    )
    if mask is None:
        probabilities = torch.softmax(scores, dim=-1)
    else:
        # Rows that see nothing get scores of zero, so that no NaN enters the graph.
        hidden = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask, -torch.inf).masked_fill(hidden, 0.0)
        probabilities = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    return probabilities.to(v.dtype) @ v
