"""`leedl-fast tune`: tile sizes of the kernels of attention and add_layer_norm, measured on the
user's own GPU.

The kernels look into the table that is written here before their own (kernels/attention_blocks.py).
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from leedl_fast.files import write_file
from leedl_fast.ops import add_layer_norm, attention

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD_DIMS = (64, 128, 256)
ROW_LENGTHS = (64, 256, 1024)  # of add_layer_norm, many of them


def tune(
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[str] = ("bfloat16",),
    *,
    report: Callable[[str], None] = print,
) -> Path:
    """Measure every kernel of attention for each head_dim and dtype, wide and with a narrow window,
    and add_layer_norm of many short rows for each dtype.

    Args:
        head_dims: of HEAD_DIMS; smaller heads take the tiles of the next one.
        dtypes: names, of DTYPES; bfloat16 and float16 share their tiles.
        report: is told what was found, one line at a time.

    Returns:
        The file that the kernels read from now on, in the user's cache folder.

    Raises:
        ValueError: a head_dim or dtype is not one of these. NotImplementedError: there is no GPU.
    """
    for name, values, allowed in (
        ("head_dim", head_dims, HEAD_DIMS),
        ("dtype", dtypes, tuple(DTYPES)),
    ):
        for value in values:
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if not torch.cuda.is_available():
        raise NotImplementedError("tune measures on a GPU, and torch sees none here")
    from leedl_fast.kernels import attention_blocks

    device = torch.device("cuda", torch.cuda.current_device())
    table = attention_blocks.tuned(device)  # the kernels' own: what is put in counts at once
    for dtype in dtypes:
        for head_dim in head_dims:
            for narrow in (False, True):
                for kernel in attention_blocks.KERNELS:
                    itemsize = DTYPES[dtype].itemsize
                    key = attention_blocks.Key(kernel, itemsize, head_dim, narrow)
                    _tune_one(table, key, DTYPES[dtype], device, report)
                    write_table(attention_blocks.tuned_path(device), table)
        for n in ROW_LENGTHS:
            _tune_rows(table, n, DTYPES[dtype], device, report)
            write_table(attention_blocks.tuned_path(device), table)
    return attention_blocks.tuned_path(device)


def write_table(path: Path, table: dict) -> None:
    from leedl_fast.kernels.attention_blocks import table_content

    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(table_content(table), path)


def _tune_rows(
    table: dict, n: int, dtype: torch.dtype, device: torch.device, report: Callable
) -> None:
    from triton.testing import do_bench

    from leedl_fast.kernels import attention_blocks
    from leedl_fast.kernels.add_layer_norm import launch_forward

    key = attention_blocks.key_of_rows(dtype.itemsize, n)
    x, residual = torch.randn(2, (64 << 20) // (n * dtype.itemsize), n, device=device, dtype=dtype)

    def milliseconds(blocks: tuple) -> float:
        table[key] = blocks
        launch_forward.forget()
        return do_bench(lambda: add_layer_norm(x, residual, backend="triton"), warmup=5, rep=25)

    found = fastest(candidates_for_rows(n), milliseconds)
    assert found is not None
    table[key], best = found
    launch_forward.forget()
    report(f"add_layer_norm {n} {dtype}: {tuple(table[key])}, {best:.3f} ms")


def candidates_for_rows(n: int) -> list[tuple]:
    """For add_layer_norm of many rows of n numbers, a power of two: 1024 to 4096 of them at a time,
    by programs of their own, or by few programs that walk through them.
    """
    from leedl_fast.kernels.attention_blocks import Blocks

    return [
        Blocks(max(1, elements // n), n, num_warps, 3, False, count)
        for elements in (1024, 2048, 4096)
        for num_warps in (2, 4, 8)
        for count in (0, 4, 8, 16)
    ]


def _tune_one(
    table: dict, key: tuple, dtype: torch.dtype, device: torch.device, report: Callable
) -> None:
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    kernel, _, head_dim, narrow = key
    before = table.pop(key, None)
    run = _problem(kernel, head_dim, narrow, dtype, device)

    def milliseconds(blocks: tuple) -> float | None:
        table[key] = blocks
        try:
            return do_bench(run, warmup=5, rep=25)
        except (OutOfResources, PTXASError):
            return None

    found = fastest(candidates(kernel, takes_descriptors(device)), milliseconds)
    if found is not None and kernel in ("forward", "query", "key_value"):
        found = fastest(shared_among_programs(found[0]), milliseconds)
    if found is None:
        table.pop(key)
        if before is not None:
            table[key] = before
        report(f"{kernel} {head_dim} {dtype}: no candidate fits this GPU")
        return
    table[key], best = found
    width = "narrow" if narrow else "wide"
    report(f"{kernel} {head_dim} {dtype} {width}: {tuple(table[key])}, {best:.3f} ms")


def takes_descriptors(device: torch.device) -> bool:
    """The GPUs that the table's tiles are known to suit with descriptors: sm_90 and sm_100."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def fastest(
    options: Iterable[tuple], milliseconds: Callable[[tuple], float | None]
) -> tuple[tuple, float] | None:
    """The option of the least time, and the time; None for what cannot run."""
    timed = [(time, option) for option in options if (time := milliseconds(option)) is not None]
    if not timed:
        return None
    time, option = min(timed)
    return option, time


def candidates(kernel: str, with_descriptors: bool = False) -> list[tuple]:
    """Tile sizes worth a try, of attention_blocks.Blocks; each by pointers and, if asked for, by
    tensor descriptors, which the "bias" kernel has no use for.
    """
    from leedl_fast.kernels.attention_blocks import Blocks

    owns = {"decode": (128, 256, 512), "forward": (64, 128)}.get(kernel, (32, 64, 128))
    return [
        Blocks(own, step, num_warps, num_stages, descriptors)
        for own in owns
        for step in (32, 64, 128)
        if own * step <= 128 * 128 or kernel == "decode"
        for num_warps in (4, 8)
        for num_stages in (1, 2, 3)
        for descriptors in ((False, True) if with_descriptors and kernel != "bias" else (False,))
    ]


def shared_among_programs(blocks: tuple) -> list[tuple]:
    """The same tiles by programs of their own, and by few programs that walk through them: a loop
    more, which needs registers that smaller steps and more warps have left.
    """
    from leedl_fast.kernels.attention_blocks import Blocks

    own = Blocks(*blocks)
    same = own
    if own.num_warps == 4 and not own.descriptors:
        # The addresses of a third stage would spill.
        same = own._replace(num_stages=min(own.num_stages, 2))
    tiles = (same, same._replace(step=max(own.step // 2, 16)), own._replace(num_warps=8))
    shared = [tile._replace(programs_per_sm=count) for tile in tiles for count in (1, 2, 4)]
    return list(dict.fromkeys((own, *shared)))


def _problem(
    kernel: str, head_dim: int, narrow: bool, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """A call whose time the kernel's tile sizes change."""
    seqlen_k = 32768 if kernel == "decode" else 4096
    seqlen_q = 1 if kernel == "decode" else seqlen_k
    window = 128 if narrow else None
    q = torch.randn(1, 16, seqlen_q, head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(1, 16, seqlen_k, head_dim, device=device, dtype=dtype) for _ in range(2))
    bias = None
    if kernel == "bias":
        bias = torch.zeros(16, seqlen_q, seqlen_k, device=device, dtype=dtype, requires_grad=True)

    def forward() -> torch.Tensor:
        return attention(q, k, v, bias=bias, causal=True, window=window, backend="triton")

    if kernel in ("forward", "decode"):
        return forward
    leaves = [q, k, v]
    for leaf in leaves:
        leaf.requires_grad_()
    if bias is not None:
        leaves.append(bias)
    out = forward()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
