"""Parameters in shares, one per device (PyTorch's FSDP2), and whole again where they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from leedl_fast.layers import TransformerDecoder, TransformerEncoder


def shard_layers(module: nn.Module, mesh: DeviceMesh) -> None:
    """Each device keeps its share of every layer's parameters; a layer is whole while it runs.

    The last one of a stack stays whole until its backward, which begins where its forward ends.
    """
    for stack in _stacks(module):
        for layer in stack.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=layer is not stack.layers[-1])
            if stack.norm_first:
                register_fsdp_forward_method(layer, "forward_residual")


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Meanwhile every device has all parameters of `module`, as plain tensors."""
    shards = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in shards:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in shards:
            part.reshard()
        for stack in _stacks(module):
            for layer in stack.layers[:-1]:
                if isinstance(layer, FSDPModule):
                    layer.set_reshard_after_forward(True)


def _stacks(module: nn.Module) -> list[TransformerEncoder | TransformerDecoder]:
    kinds = (TransformerEncoder, TransformerDecoder)
    return [part for part in module.modules() if isinstance(part, kinds)]
