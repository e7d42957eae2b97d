"""What the attention ops share: tensors of (batch, num_heads, seqlen, head_dim)."""

from torch import Tensor

from leedl_fast.ops import checks
from leedl_fast.ops.checks import Kind


def check_qkv(q: Kind, k: Kind, v: Kind) -> None:
    """Shapes, dtypes and devices of queries, keys and values."""
    for name, (shape, _, _) in (("q", q), ("k", k), ("v", v)):
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, num_heads, seqlen, head_dim), "
                f"got shape {tuple(shape)}"
            )
    q_shape, dtype, device = q
    batch, num_heads, _, head_dim = q_shape
    num_heads_k, seqlen_k = k[0][1:3]
    checks.check_floating("q", dtype)
    for name, given in (("k", k), ("v", v)):
        checks.check_same_dtype(name, given[1], dtype, "q")
        checks.check_same_device(name, given[2], device, "q")
    checks.check_shape("k", k[0], (batch, num_heads_k, seqlen_k, head_dim))
    checks.check_shape("v", v[0], (batch, num_heads_k, seqlen_k, v[0][3]))
    if num_heads != 0 if num_heads_k == 0 else num_heads % num_heads_k:
        raise ValueError(
            "the heads of q must be a multiple of the heads of k, "
            f"got {num_heads} heads of q and {num_heads_k} of k"
        )
    if head_dim == 0:
        raise ValueError(f"q must have head_dim >= 1, got shape {tuple(q_shape)}")


def last_contiguous(x: Tensor) -> Tensor:
    # The first question costs a third of the second.
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def empty_heads(like: Tensor, seqlen: int, head_dim: int) -> Tensor:
    """An empty (batch, num_heads, seqlen, head_dim) tensor in the storage order of `like`."""
    batch, num_heads = like.shape[:2]
    if not like.is_contiguous() and like.stride(1) < like.stride(2):
        return like.new_empty(batch, seqlen, num_heads, head_dim).transpose(1, 2)
    return like.new_empty(batch, num_heads, seqlen, head_dim)
