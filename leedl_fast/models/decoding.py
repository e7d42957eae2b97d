"""What a trained Transformer says: greedy, beam search, and all tokens at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leedl_fast.models.transformer import BEGIN, END, Transformer


@torch.no_grad()
def decode(
    model: Transformer,
    source: Tensor,
    source_lengths: Tensor,
    *,
    beam_size: int = 1,
    length_penalty: float = 0.6,
    max_length: int | None = None,
) -> list[list[int]]:
    """The target tokens of each sample, without BEGIN and END.

    Args:
        source, source_lengths: see Transformer.encode.
        beam_size: partial targets that are kept for each source; 1 is greedy. It must be 1 for a
            model that is not autoregressive.
        length_penalty: finished targets are ranked by log-probability / length^length_penalty.
        max_length: the most tokens of a target, END included; the model's own by default.
    """
    limit = model.config.max_length
    max_length = limit if max_length is None else max_length
    if not 1 <= max_length <= limit:
        raise ValueError(f"max_length must be in [1, {limit}], got {max_length}")
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")
    if model.config.autoregressive:
        tokens = _beam_search(model, source, source_lengths, beam_size, length_penalty, max_length)
    elif beam_size > 1:
        raise ValueError(
            f"beam_size must be 1 for a model that is not autoregressive, got {beam_size}"
        )
    else:
        tokens = _at_once(model, source, source_lengths, max_length)
    return [row[: row.index(END)] if END in row else row for row in tokens.tolist()]


def _beam_search(
    model: Transformer,
    source: Tensor,
    source_lengths: Tensor,
    beam_size: int,
    length_penalty: float,
    max_length: int,
) -> Tensor:
    """(batch, seqlen), each row's END followed by more of them. Without a cache's help each token
    would cost the whole target before it.
    """
    batch = len(source)
    device = source.device
    memory = model.encode(source, source_lengths).repeat_interleave(beam_size, dim=0)
    source = source.repeat_interleave(beam_size, dim=0)
    source_lengths = source_lengths.repeat_interleave(beam_size)
    caches = model.decoder.new_caches()

    target = torch.full((batch * beam_size, 1), BEGIN, device=device)
    scores = torch.zeros(batch, beam_size, device=device, dtype=memory.dtype)
    scores[:, 1:] = -math.inf  # at first all beams are the same
    lengths = torch.zeros(batch, beam_size, device=device, dtype=memory.dtype)
    first_of_batch = torch.arange(batch, device=device)[:, None] * beam_size
    for _ in range(max_length):
        hidden = model.decode(target[:, -1:], memory, source_lengths, caches=caches)
        new = model.log_probabilities(hidden, memory, source, source_lengths)[:, 0]
        ended = target[:, -1] == END
        new[ended] = -math.inf
        new[ended, END] = 0.0  # the only way on, and it costs nothing
        vocab_size = new.shape[1]
        total = (scores.view(-1, 1) + new).view(batch, beam_size * vocab_size)
        scores, chosen = total.topk(beam_size, dim=1)
        beams = (first_of_batch + chosen // vocab_size).flatten()
        tokens = (chosen % vocab_size).flatten()
        lengths = (lengths.flatten()[beams] + ~ended[beams]).view(batch, beam_size)
        target = torch.cat((target[beams], tokens[:, None]), dim=1)
        if bool((tokens == END).all()):
            break
        if beam_size > 1:
            for cache in caches:
                cache.reorder(beams)
    best = (scores / lengths**length_penalty).argmax(dim=1)
    return target.view(batch, beam_size, -1)[torch.arange(batch, device=device), best, 1:]


def _at_once(model: Transformer, source: Tensor, source_lengths: Tensor, max_length: int) -> Tensor:
    memory = model.encode(source, source_lengths)
    lengths = model.length_logits(memory, source_lengths).argmax(dim=-1) + 1
    lengths = lengths.clamp(max=max_length)
    seqlen = int(lengths.max())
    begins = torch.full((len(source), seqlen), BEGIN, device=source.device)
    hidden = model.decode(begins, memory, source_lengths, target_lengths=lengths)
    tokens = model.head(hidden).argmax(dim=-1)
    place = torch.arange(seqlen, device=source.device)
    return tokens.masked_fill(place >= lengths[:, None], END)
