"""What several backends make of an op's tensors before their kernels get them."""

from torch import Tensor


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def of_add_layer_norm_backward(
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dnormed: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
    """dx, dweight, dbias, dnormed, dsummed, summed and weight, contiguous: the gradients of
    parameters that are not there are None.
    """
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        dnormed,
        dsummed,
        summed,
        contiguous(weight),
    )
