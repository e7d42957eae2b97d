"""Attention over a sequence that is split between processes, on torch.distributed.

Each process has successive positions of every sample. Training's `--devices` splits the batch
instead, whose samples stay whole.
"""

from leedl_fast.distributed.agreement import gather_seqlens
from leedl_fast.distributed.attention import attention
from leedl_fast.distributed.halo_cache import HaloCache, halo_caches

__all__ = ["HaloCache", "attention", "gather_seqlens", "halo_caches"]
