"""Sample problems of the residual connection with its norm."""

from typing import Any

from torch import Tensor

from leedl_fast.ops import add_layer_norm
from leedl_fast.testing.samples.case import Case, Tensors


def _add_layer_norm(
    tensors: Tensors, backend: str | None, *, wide: tuple[str, ...] = (), **options: Any
) -> tuple[Tensor, ...]:
    """wide: what is float32 where the inputs are bfloat16 or float16."""
    arguments: dict[str, Any] = {
        name: tensor.float() if name in wide and tensor.dtype.itemsize == 2 else tensor
        for name, tensor in tensors.items()
    }
    return add_layer_norm(**arguments, backend=backend, **options)


def _add_layer_norm_case(
    name: str,
    shape: tuple[int, ...],
    weight: bool = True,
    bias: bool = True,
    *,
    scale: float = 1.0,
    offset: int = 0,
    transposed: bool = False,
    **options: Any,
) -> Case:
    shapes = {"x": shape, "residual": shape}
    shapes |= {"weight": shape[-1:]} if weight else {}
    shapes |= {"bias": shape[-1:]} if bias else {}
    return Case("add_layer_norm", name, shapes, _add_layer_norm, scale, transposed, offset, options)


ADD_LAYER_NORM = (
    _add_layer_norm_case("one", (1, 1)),
    _add_layer_norm_case("row", (77,)),
    _add_layer_norm_case("small", (64, 256)),
    _add_layer_norm_case("odd", (3, 5, 67)),
    _add_layer_norm_case("many-rows", (1031, 33)),
    _add_layer_norm_case("long-rows", (5, 4099)),
    _add_layer_norm_case("parallel", (700, 512)),
    _add_layer_norm_case("no-weight", (9, 48), weight=False),
    _add_layer_norm_case("no-bias", (9, 48), bias=False),
    _add_layer_norm_case("plain", (9, 48), weight=False, bias=False),
    _add_layer_norm_case("rms", (33, 100), bias=False, norm="rms"),
    _add_layer_norm_case("rms-bias", (7, 129), norm="rms"),
    _add_layer_norm_case("eps", (9, 48), scale=1e-3, eps=1e-2),
    _add_layer_norm_case("huge", (9, 48), scale=1e4),
    _add_layer_norm_case("unaligned", (11, 50), offset=1),
    _add_layer_norm_case("no-rows", (0, 16)),
    _add_layer_norm_case("dropout", (6, 64), dropout_p=0.3, seed=7),
    _add_layer_norm_case("dropout-odd", (5, 3, 67), offset=1, dropout_p=0.1, seed=-1),
    _add_layer_norm_case("dropout-parallel", (301, 259), dropout_p=0.5, seed=2**40 + 3),
    _add_layer_norm_case("dropout-rms", (7, 1), bias=False, norm="rms", dropout_p=0.2, seed=0),
    _add_layer_norm_case("wide-residual", (9, 50), wide=("residual",)),
    _add_layer_norm_case("wide-parameters", (9, 50), wide=("weight", "bias")),
    _add_layer_norm_case(
        "wide-dropout", (9, 50), wide=("residual", "bias"), weight=False, dropout_p=0.2, seed=5
    ),
)
