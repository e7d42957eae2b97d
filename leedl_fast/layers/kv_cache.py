"""The keys and values of the tokens so far, kept so that a next token costs one query."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one attention layer while a text is generated.

    Args:
        window: None keeps all keys, in a buffer that doubles when it is full. w keeps, in a ring,
            the last w + 1 keys: those that a causal query with window=w sees, its own included. Its
            memory is flat however long the text.

    The buffers are made by the first `extend`, with its keys' shape, dtype and device.
    """

    differentiable = False  # the buffers are written to

    def __init__(self, *, window: int | None = None) -> None:
        if window is not None and window < 0:
            raise ValueError(f"window must not be negative, got {window}")
        self.window = window
        self.length = 0  # of the text: in a ring more than what it keeps
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @torch.no_grad()
    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys of new tokens; return those that causal queries of these tokens see.

        k and v: (batch, num_heads_k, seqlen, head_dim); so are the results, with their own seqlen.
        They are views into the cache, to be read before the next call. In a ring a single new
        token's keys come in any order, which is all the same to its one query; those of more are
        in the order of the text, so that the causal window, aligned at the end, is right.
        """
        before, self.length = self.length, self.length + k.shape[2]
        if self.window is None:
            return self._extend_all(k, v, before)
        return self._extend_ring(k, v, before, self.window + 1)

    @property
    def kept(self) -> tuple[Tensor, Tensor] | None:
        """The keys and values in the cache, in a ring not in the order of the text."""
        if self._keys is None or self._values is None:
            return None
        size = min(self.length, self._keys.shape[2])
        return self._keys[:, :, :size], self._values[:, :, :size]

    def reorder(self, samples: Tensor) -> None:
        """Sample b becomes what sample samples[b] was (int64): beam search keeps some texts twice,
        others not.
        """
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, samples)
            self._values = self._values.index_select(0, samples)

    def _extend_all(self, k: Tensor, v: Tensor, before: int) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers(k, v, before)
        keys[:, :, before : self.length], values[:, :, before : self.length] = k, v
        return keys[:, :, : self.length], values[:, :, : self.length]

    def _extend_ring(self, k: Tensor, v: Tensor, before: int, size: int) -> tuple[Tensor, Tensor]:
        """The token at position p of the text lies at p % size."""
        keys, values = self._buffers(k, v, 0, size)
        if k.shape[2] == 1:
            place, filled = before % size, min(self.length, size)
            keys[:, :, place], values[:, :, place] = k[:, :, 0], v[:, :, 0]
            return keys[:, :, :filled], values[:, :, :filled]

        def places(first: int, end: int) -> Tensor:
            return torch.arange(first, end, device=k.device) % size

        old = places(max(0, before - size + 1), before)  # what the first new query sees
        all_keys = torch.cat((keys[:, :, old], k), dim=2)
        all_values = torch.cat((values[:, :, old], v), dim=2)
        new = places(max(before, self.length - size), self.length)
        keys[:, :, new] = k[:, :, k.shape[2] - len(new) :]
        values[:, :, new] = v[:, :, v.shape[2] - len(new) :]
        return all_keys, all_values

    def _buffers(
        self, k: Tensor, v: Tensor, before: int, size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Room for `size` keys, or for at least self.length of them, the first `before` kept."""
        keys, values = self._keys, self._values
        if keys is None or values is None or (size is None and keys.shape[2] < self.length):
            size = max(64, 2 * self.length) if size is None else size
            new_keys = k.new_empty(*k.shape[:2], size, k.shape[3])
            new_values = v.new_empty(*v.shape[:2], size, v.shape[3])
            if keys is not None and values is not None:
                new_keys[:, :, :before] = keys[:, :, :before]
                new_values[:, :, :before] = values[:, :, :before]
            keys, values = self._keys, self._values = new_keys, new_values
        expected = (*keys.shape[:2], k.shape[2], keys.shape[3])
        if tuple(k.shape) != expected:
            raise ValueError(f"k must have shape {expected}, as before, got {tuple(k.shape)}")
        return keys, values


class DecoderCache:
    """What a decoder layer keeps: its own keys, and those of the memory, projected once."""

    def __init__(self, self_attention: KVCache) -> None:
        self.self_attention = self_attention
        self.memory = KVCache()

    def reorder(self, samples: Tensor) -> None:
        self.self_attention.reorder(samples)
        self.memory.reorder(samples)
