"""The backward pass of attention in Triton; `leedl_fast.reference.attention` derives the formulas.

Deterministic, without atomics: every gradient has a kernel that owns tiles of it, and loops over
what they are made of. All make the probabilities again from the scores and each row's statistics,
as the forward pass made them: p = exp2(score * factor - base) * inverse_sum.
"""

from typing import Any

from torch import Tensor

from leedl_fast.kernels import attention_bias, attention_key_value, attention_query
from leedl_fast.kernels.attention_arguments import layout_of, statistics_of
from leedl_fast.kernels.attention_blocks import blocks_for
from leedl_fast.kernels.attention_delta import fill_delta
from leedl_fast.kernels.launching import strides_of


def backward(
    problem: Any,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor,
    dsinks: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor | None,
) -> None:
    """Fills the gradients; dlse and the statistics as `attention.forward` has lse and them.

    problem: the Problem of leedl_fast.ops.attention_problem; others: the rest of its Inputs, out,
    and the statistics base and inverse_sum of the forward pass.
    """
    *options, out, base, inverse_sum = others
    layout = layout_of(problem, *options)
    statistics = statistics_of(problem, base, inverse_sum)
    if statistics.delta is not None:
        fill_delta(layout, statistics, dsinks, dlse, dout, out, options)
    inputs = dout, q, k, v
    if dq.numel():
        key = layout, blocks_for("query", problem), *strides_of(dq, *inputs)
        attention_query.launch(key, dq, *inputs, *statistics, *options)
    if dk.numel() or dv.numel():
        key = layout, blocks_for("key_value", problem), *strides_of(dk, dv, *inputs)
        attention_key_value.launch(key, dk, dv, *inputs, *statistics, *options)
    if problem.wants_dbias:
        attention_bias.backward(layout, dbias, inputs, statistics, options)
