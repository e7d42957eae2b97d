import pytest
import torch
from torch import nn

from leedl_fast.layers import AttentionPooling
from leedl_fast.layers.attention_maps import record_attention

WIDTH, HEADS = 24, 3


class Plain(nn.Module):
    """The layer's formula, sample by sample and head by head; it has the layer's own parameters."""

    def __init__(self, layer):
        super().__init__()
        self.attention, self.query = layer.attention, layer.query

    def forward(self, x, lengths):
        rows = []
        for sample, length in zip(x, lengths, strict=True):
            weight_q, weight_k, weight_v = self.attention.in_proj_weight.chunk(3)
            bias_q, bias_k, bias_v = self.attention.in_proj_bias.chunk(3)
            q = (weight_q @ self.query + bias_q).chunk(HEADS)
            k = (sample[:length] @ weight_k.T + bias_k).chunk(HEADS, dim=1)
            v = (sample[:length] @ weight_v.T + bias_v).chunk(HEADS, dim=1)
            heads = [self.weights(h, k[h], q[h]) @ v[h] for h in range(HEADS)]
            rows.append(self.attention.out_proj(torch.cat(heads)))
        return torch.stack(rows)

    def weights(self, head, k, q):
        if self.attention.score == "additive":
            return (torch.tanh(q + k) @ self.attention.score_weight[head]).softmax(0)
        scores = k @ q / (WIDTH // HEADS) ** 0.5
        normalize = {
            "softmax": lambda s: s.softmax(0),
            "relu": torch.relu,
            "sigmoid": torch.sigmoid,
        }
        return normalize[self.attention.normalizer](scores)


@pytest.mark.parametrize(
    "options", [{}, {"score": "additive"}, {"normalizer": "relu"}, {"normalizer": "sigmoid"}]
)
def test_it_is_the_formula(backend, parity, options):
    layer = AttentionPooling(WIDTH, HEADS, **options)
    nn.init.normal_(layer.attention.in_proj_bias)
    lengths = torch.tensor([13, 1, 6])
    parity(
        Plain(layer),
        layer,
        (torch.randn(3, 13, WIDTH),),
        lambda m, x: m(x, lengths),
        lambda m, x: m(x, key_lengths=lengths),
    )


def test_who_is_attended_to():
    layer = AttentionPooling(WIDTH, HEADS)
    x, lengths = torch.randn(2, 5, WIDTH), torch.tensor([5, 2])
    with record_attention(layer) as maps:
        layer(x, key_lengths=lengths)
    weights = maps["attention"]
    assert weights.shape == (2, HEADS, 1, 5)
    assert (weights[1, :, :, 2:] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 1))
