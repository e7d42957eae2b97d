"""What every rank runs for test_split_sequences.py; all of them draw the same numbers."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import leedl_fast.distributed
from leedl_fast.distributed import HaloCache, gather_seqlens, halo_caches
from leedl_fast.distributed.halo import fetch, halo_of
from leedl_fast.models.gpt import GPT, GPTConfig
from leedl_fast.ops import attention, linear_cross_entropy
from leedl_fast.testing.compare import (
    allowed_error,
    expected_outputs_and_gradients,
    max_error,
    outputs_and_gradients,
)
from leedl_fast.testing.samples.attention import attention_case


def own(seqlens, x, dim=2):
    """This rank's part of x."""
    return x.split(seqlens, dim=dim)[dist.get_rank()]


def draw(seqlens, dtype=torch.float64, heads=(4, 2, 2, 4), widths=(8, 8, 12, 12)):
    """q, k, v and the gradient of the output, of the whole sequence."""
    shapes = [(2, head, sum(seqlens), width) for head, width in zip(heads, widths, strict=True)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


class _Gather(torch.autograd.Function):
    """The whole of which each rank has a part."""

    @staticmethod
    def forward(ctx, seqlens, part):
        parts = [None for _ in seqlens]
        dist.all_gather_object(parts, part.detach())
        ctx.seqlens = seqlens
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx, grad):
        return None, own(ctx.seqlens, grad)


def _whole_and_split(seqlens, options):
    """A case of attention on the whole sequence, and the same on the parts of all ranks."""
    whole = attention_case(
        "split", 2, 4, sum(seqlens), 16, heads_k=2, head_dim_v=24, **dict(options)
    )

    def call(tensors, backend, **options):
        options["return_lse"] = options.get("normalizer", "softmax") == "softmax"
        for name in ("alibi_slopes", "key_lengths"):
            if name in options:
                options[name] = torch.tensor(options[name])
        parts = {name: own(seqlens, x) if x.dim() == 4 else x for name, x in tensors.items()}
        results = leedl_fast.distributed.attention(**parts, **options, backend=backend)
        results = results if options["return_lse"] else (results,)
        return tuple(_Gather.apply(seqlens, part) for part in results)

    return whole, replace(whole, call=call)


def _outputs_and_gradients(split, dtype):
    """Of all ranks together."""
    results = outputs_and_gradients(split, dtype, None)
    for name in results:
        if name.startswith("d"):  # zeros in the parts of the others, and of sinks a share
            results[name] = results[name].to(torch.promote_types(dtype, torch.float32))
            dist.all_reduce(results[name])
    return results


def is_as_in_one_process(seqlens, options):
    """Outputs and gradients in float64, but for the order of sums."""
    whole, split = _whole_and_split(seqlens, options)
    actual = _outputs_and_gradients(split, torch.float64)
    expected = outputs_and_gradients(whole, torch.float64, "eager")
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def is_as_exact_as_one_process(seqlens, dtype, options):
    """Outputs and gradients may be twice as far off as plain PyTorch's."""
    whole, split = _whole_and_split(seqlens, options)
    actual = _outputs_and_gradients(split, dtype)
    if dist.get_rank() == 0:
        expected = expected_outputs_and_gradients(whole, dtype)
        plain = outputs_and_gradients(whole, dtype, "eager")
        for name, value in actual.items():
            error = max_error(value, expected[name])
            allowed = allowed_error(plain[name], expected[name], dtype)
            assert error <= allowed, f"{name}: {error} > {allowed}"


def fetches_what_queries_see(seqlens, left, right, dtype):
    """Bit for bit; the gradients that come back are added in the order of the ranks."""
    rank = dist.get_rank()
    _, k, v, _ = draw(seqlens, dtype)
    halos = [halo_of(seqlens, peer, left, right) for peer in range(len(seqlens))]
    seen = [
        slice(halo.begin - halo.before, halo.begin + seqlen + halo.after)
        for halo, seqlen in zip(halos, seqlens, strict=True)
    ]
    parts = own(seqlens, k).requires_grad_(), own(seqlens, v).requires_grad_()
    for _ in range(2):
        fetched = fetch(halos[rank], *parts, None)
        assert torch.equal(fetched[0], k[:, :, seen[rank]])
        assert torch.equal(fetched[1], v[:, :, seen[rank]])
        factors = [peer + 0.3 for peer in range(len(seqlens))]
        grads = torch.autograd.grad(fetched, parts, [x * factors[rank] for x in fetched])
        for x, grad in zip((k, v), grads, strict=True):
            total = torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32))
            others = (peer for peer in range(len(seqlens)) if peer != rank)
            for peer in (rank, *others):
                total[:, :, seen[peer]] += x[:, :, seen[peer]] * factors[peer]
            assert torch.equal(grad, own(seqlens, total.to(dtype)))


def has_second_derivatives(seqlens, options):
    """Of one process in plain PyTorch."""

    def second(function, q, k, v, dout, weights):
        tensors = [x.clone().requires_grad_() for x in (q, k, v, dout)]
        out = function(*tensors[:3], **options)
        grads = torch.autograd.grad(out, tensors[:3], tensors[3], create_graph=True)
        total = sum((grad * weight).sum() for grad, weight in zip(grads, weights, strict=True))
        return torch.autograd.grad(total, tensors)

    tensors = draw(seqlens)
    weights = draw(seqlens)[:3]
    expected = second(lambda *x, **o: attention(*x, **o, backend="eager"), *tensors, weights)
    parts = [own(seqlens, x) for x in tensors]
    weights = [own(seqlens, x) for x in weights]
    actual = second(leedl_fast.distributed.attention, *parts, weights)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, own(seqlens, y), rtol=1e-10, atol=1e-12)


def has_the_derivative_of_differences(seqlens, options):
    """Along a direction, of a loss to which every rank adds its part."""
    *tensors, dout = [own(seqlens, x) for x in draw(seqlens)]
    direction = [own(seqlens, x) for x in draw(seqlens)[:3]]

    def loss(step):
        moved = [x + step * along for x, along in zip(tensors, direction, strict=True)]
        out = leedl_fast.distributed.attention(*moved, **options)
        return (out * dout).sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(loss(step), step)
    difference = (loss(1e-6) - loss(-1e-6)) / 2e-6
    for value in (derivative, difference):
        dist.all_reduce(value)
    torch.testing.assert_close(derivative, difference, rtol=1e-7, atol=1e-7)


def _counting(patch):
    """Bytes sent by this rank and the seqlens of the keys that the kernels were given."""
    sent, seqlens_k = [], []

    def batch_isend_irecv(operations):
        messages = [operation.tensor for operation in operations if operation.op is dist.isend]
        sent.append(sum(message.nbytes for message in messages))
        return exchange(operations)

    def op(q, k, v, **options):
        seqlens_k.append(k.shape[2])
        return attention(q, k, v, **options)

    exchange = dist.batch_isend_irecv
    patch.setattr(dist, "batch_isend_irecv", batch_isend_irecv)
    patch.setattr(leedl_fast.ops, "attention", op)
    return sent, seqlens_k


def sends_no_more_than_the_window(seqlens, window):
    """(bytes sent forward, backward, keys that the kernel got)."""
    *tensors, dout = [own(seqlens, x) for x in draw(seqlens, torch.float32)]
    tensors = [x.requires_grad_() for x in tensors]
    with pytest.MonkeyPatch.context() as patch:
        sent, seqlens_k = _counting(patch)
        out = leedl_fast.distributed.attention(*tensors, window=window, seqlens=seqlens)
        out.backward(dout)
    return *sent, *seqlens_k


def finds_disagreements(seqlens):
    rank = dist.get_rank()
    q, k, v, _ = (own(seqlens, x) for x in draw(seqlens))
    call = leedl_fast.distributed.attention
    different = "must be the same on every rank, got"

    def of_last_rank(change, x):
        return change(x) if rank == len(seqlens) - 1 else x

    with pytest.raises(ValueError, match=rf"the dtype {different} \[torch.float64, .*float32\]"):
        call(*(of_last_rank(torch.Tensor.float, x) for x in (q, k, v)))
    with pytest.raises(ValueError, match=rf"the heads of k {different} \[2, .*1\]"):
        call(q, *(of_last_rank(lambda x: x[:, :1], x) for x in (k, v)))
    with pytest.raises(ValueError, match=rf"the head_dim of v {different}"):
        call(q, k, of_last_rank(lambda x: x[..., 1:], v))
    with pytest.raises(ValueError, match=rf"window {different} \[5, .*6\]"):
        call(q, k, v, window=of_last_rank(lambda _: 6, 5))
    with pytest.raises(ValueError, match=rf"whether k or v needs gradients {different} \[False"):
        call(q, of_last_rank(torch.Tensor.requires_grad_, k.clone()), v)

    # An error of one rank ends the call on all of them.
    last = len(seqlens) - 1
    if rank == last:
        with pytest.raises(TypeError, match=r"v must have the dtype of q"):
            call(q, k, v.float())
    else:
        with pytest.raises(ValueError, match=f"on rank {last}: v must have the dtype of q"):
            call(q, k, v)


def refuses(seqlens, options, error, message):
    tensors = [own(seqlens, x) for x in draw(seqlens)[:3]]
    with pytest.raises(error, match=message):
        leedl_fast.distributed.attention(*tensors, **options)


def refuses_keys_of_another_length(seqlens):
    q, k, v, _ = (own(seqlens, x) for x in draw(seqlens))
    with pytest.raises(ValueError, match="k must have the seqlen of q, "):
        leedl_fast.distributed.attention(q, k[:, :, 1:], v[:, :, 1:])
    with pytest.raises(ValueError, match=r"seqlens must hold .* what rank"):
        leedl_fast.distributed.attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], seqlens=seqlens)
    with pytest.raises(ValueError, match=r"seqlens must hold .* what rank"):
        HaloCache(seqlens).extend(k[:, :, 1:], v[:, :, 1:])


def runs_in_a_group_of_some():
    """Ranks count within the group."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="group must have this process in it"):
            leedl_fast.distributed.attention(*draw((5,))[:3], group=group)
        return
    seqlens = (6, 9)
    parts = [x.split(seqlens, dim=2)[dist.get_rank() - 1] for x in draw(seqlens)]
    out = leedl_fast.distributed.attention(*parts[:3], window=4, group=group)
    torch.manual_seed(0)
    whole = attention(*draw(seqlens)[:3], window=4)
    torch.testing.assert_close(out, whole.split(seqlens, dim=2)[dist.get_rank() - 1])


def runs_compiled(seqlens):
    """The graph breaks, and the numbers are the same."""

    def function(q, k, v):
        return leedl_fast.distributed.attention(2 * q, k, v, window=(5, 3)) + 1

    parts = [own(seqlens, x).requires_grad_() for x in draw(seqlens)[:3]]
    results = []
    for call in (function, torch.compile(function, backend="eager")):
        out = call(*parts)
        results.append((out, *torch.autograd.grad(out.sum(), parts)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def trains_a_gpt(seqlens, options):
    """Three steps: losses, gradients and parameters of one process that has the whole text."""
    config = GPTConfig(
        vocab_size=50, context_length=200, num_heads=4, embed_dim=32, num_layers=3, **options
    )
    whole = GPT(config).double()
    model = copy.deepcopy(whole)
    optimizers = [torch.optim.AdamW(x.parameters(), lr=1e-2) for x in (whole, model)]
    text = torch.randint(50, (3, 2, sum(seqlens) + 1))
    for step in text:
        tokens, targets = step[:, :-1], step[:, 1:]
        expected = whole.loss(tokens, targets)

        tokens, targets = own(seqlens, tokens, dim=1), own(seqlens, targets, dim=1)
        lengths = gather_seqlens(tokens.shape[1])
        caches = halo_caches(model.transformer, lengths)
        hidden = model.hidden(tokens, caches=caches)
        loss = linear_cross_entropy(hidden, model.head.weight, targets, reduction="sum")
        loss = loss / (len(tokens) * sum(lengths))

        for optimizer, x in zip(optimizers, (expected, loss), strict=True):
            optimizer.zero_grad()
            x.backward()
        for value in (loss.detach(), *(parameter.grad for parameter in model.parameters())):
            dist.all_reduce(value)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-8)
