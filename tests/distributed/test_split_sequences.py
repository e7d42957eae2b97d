"""Attention over a sequence that two or three processes hold parts of, with gloo."""

import pytest
import split_sequences
import torch

LENGTHS = {
    2: [(64, 64), (37, 60), (0, 70), (70, 0), (3, 90), (1, 1)],
    3: [(40, 40, 40), (50, 3, 41), (33, 0, 50), (0, 0, 60), (2, 90, 3), (1, 1, 1)],
}
WINDOWS = [
    {"window": 7},
    {"window": (5, 3)},
    {"window": (0, 0)},
    {"window": (0, 9)},
    {"window": (50, 44)},
    {"window": 500},
    {"window": (None, 4)},
    {"window": (4, None)},
    {},
    {"causal": True},
    {"causal": True, "window": 20},
]
OPTIONS = [
    {"softmax_scale": 0.1, "softcap": 2.0, "window": (12, 5)},
    {"sinks": True, "window": (9, 30)},
    {"normalizer": "relu", "window": 15},
    {"normalizer": "sigmoid", "causal": True},
    {"alibi_slopes": (0.5, 0.1, 0.02, 1.0), "causal": True, "window": 30},
    {"alibi_slopes": (0.5, 0.1, 0.02, 1.0), "window": (40, 0)},
    {"key_lengths": (55, 0), "window": (20, 8)},
    {"key_lengths": (1, 58), "causal": True},
    {"transposed": True, "window": (6, 20)},
]


def seqlens_of(ranks):
    return {2: (37, 60), 3: (50, 3, 41)}[ranks.size]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_windows(ranks, options):
    for seqlens in LENGTHS[ranks.size]:
        ranks(split_sequences.is_as_in_one_process, seqlens, options)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_dtypes(ranks, dtype):
    for options in ({"window": (5, 3)}, {"window": (60, 2)}, {"causal": True}, {}):
        ranks(split_sequences.is_as_exact_as_one_process, seqlens_of(ranks), dtype, options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(ranks, options):
    ranks(split_sequences.is_as_in_one_process, seqlens_of(ranks), options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_halo_is_what_queries_see(ranks, dtype):
    for seqlens in LENGTHS[ranks.size]:
        for left, right in ((7, 7), (0, 0), (60, 2), (0, 100)):
            arguments = seqlens, left, right, dtype
            ranks(split_sequences.fetches_what_queries_see, *arguments)


@pytest.mark.parametrize("options", [{"window": (5, 3)}, {"causal": True}], ids=str)
def test_derivatives(ranks, options):
    for seqlens in LENGTHS[ranks.size][:3]:
        ranks(split_sequences.has_the_derivative_of_differences, seqlens, options)
        ranks(split_sequences.has_second_derivatives, seqlens, options)


def test_messages_and_keys_do_not_grow_with_the_sequence(ranks):
    """A position of k and v is 2 samples x 2 heads x (8 + 12) numbers of 4 bytes."""
    position = 2 * 2 * (8 + 12) * 4
    left, right = 9, 4
    for seqlen in (20, 40, 160):
        seqlens = (seqlen,) * ranks.size
        results = ranks(split_sequences.sends_no_more_than_the_window, seqlens, (left, right))
        for rank, (forward, backward, seqlen_k) in enumerate(results):
            has_before, has_after = rank > 0, rank < ranks.size - 1
            assert forward == position * (right * has_before + left * has_after)
            assert backward == position * (left * has_before + right * has_after)
            assert seqlen_k == seqlen + left * has_before + right * has_after


def test_disagreements_end_the_call_on_every_rank(ranks):
    ranks(split_sequences.finds_disagreements, seqlens_of(ranks))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be left out of a split sequence: "),
        ({"seed": 1}, ValueError, "seed must be left out"),
        ({"bias": torch.zeros(9)}, ValueError, "bias must be left out of .*: a dense bias"),
        ({"cu_seqlens_q": torch.tensor([0, 9])}, ValueError, "cu_seqlens_q must be left out"),
        ({"cu_seqlens_k": torch.tensor([0, 9])}, ValueError, "cu_seqlens_k must be left out"),
        ({"alibi_slopes": torch.ones(4)}, ValueError, "alibi_slopes needs causal=True or"),
        ({"window": -1}, ValueError, "window must not be negative"),
        ({"key_lengths": torch.tensor([1, 2000])}, ValueError, r"key_lengths must lie in \[0, 9"),
        ({"key_lengths": 3}, TypeError, r"key_lengths must be a torch.Tensor, got int"),
        ({"seqlens": (5,)}, ValueError, r"seqlens must hold . lengths, one per rank, got \(5,\)"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"causl": True}, TypeError, "unexpected keyword argument 'causl'"),
    ],
)
def test_what_is_refused(ranks, options, error, message):
    ranks(split_sequences.refuses, seqlens_of(ranks), options, error, message)


def test_lengths_that_differ_are_refused(ranks):
    ranks(split_sequences.refuses_keys_of_another_length, seqlens_of(ranks))


def test_a_group_of_some_ranks(ranks):
    if ranks.size == 3:
        ranks(split_sequences.runs_in_a_group_of_some)


def test_torch_compile(ranks):
    if ranks.size == 2:
        ranks(split_sequences.runs_compiled, seqlens_of(ranks))


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 6}, {"window": 70, "positions": "rotary", "num_heads_k": 2}],
    ids=str,
)
def test_a_gpt_trains_as_in_one_process(ranks, options):
    for seqlens in LENGTHS[ranks.size][1:3]:
        ranks(split_sequences.trains_a_gpt, seqlens, options)
