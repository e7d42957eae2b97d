"""Parity with transformers, from random configurations: outputs, losses and every gradient."""

import copy

import pytest
import torch
import transformers
from torch import nn

from leedl_fast import use_backend
from leedl_fast.models.huggingface import from_huggingface

LENGTHS = torch.tensor([17, 4, 11])
PLACES = torch.arange(17)
SEEN = LENGTHS[:, None] > PLACES
TOKENS = torch.randint(3, 37, (3, 17), generator=torch.Generator().manual_seed(1))
SEGMENTS = (LENGTHS[:, None] // 2 <= PLACES).long() * SEEN
TARGETS = TOKENS.roll(1).masked_fill((TOKENS % 3 != 0) | ~SEEN, -100)

NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def randomise(module):
    """New weights that no initialisation makes look right."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
        if parameter.dim() == 1:
            parameter.data += 0.5
    return module


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=23, n_layer=2, n_head=4, n_embd=32, bos_token_id=None,
        eos_token_id=None, **NO_DROPOUT | options,
    )  # fmt: skip
    return randomise(transformers.GPT2LMHeadModel(config))


def bert(kind="BertForMaskedLM", **options):
    config = transformers.BertConfig(
        vocab_size=37, max_position_embeddings=23, num_hidden_layers=2, num_attention_heads=4,
        hidden_size=32, intermediate_size=72, **NO_DROPOUT | options,
    )  # fmt: skip
    return randomise(getattr(transformers, kind)(config))


def relative_errors(values, exact):
    assert values.keys() == exact.keys()
    return {
        name: ((values[name] - exact[name]).abs().max() / exact[name].abs().max()).item()
        for name in exact
    }


def assert_same(original, call_original, call_ours):
    """As near to float64 as the original: within twice its worst relative error, plus an ulp."""

    def results(module, call):
        module.zero_grad()
        values = call(module)
        values["loss"].backward()
        values |= {
            name: parameter.grad
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
        return {name: value.detach().double() for name, value in values.items()}

    def renamed(gradients):
        """Gradients of the original under our names: what copies weights copies them too."""
        carrier = copy.deepcopy(original).double()
        carrier.load_state_dict(
            {name: torch.zeros_like(value) for name, value in carrier.state_dict().items()}
        )
        for name, parameter in carrier.named_parameters():
            parameter.data.copy_(gradients.get(name, torch.zeros_like(parameter)))
        ours = dict(from_huggingface(carrier).named_parameters())
        rest = {name: value for name, value in gradients.items() if name in ("output", "loss")}
        return rest | {name: value.data for name, value in ours.items() if "pooler" not in name}

    exact = renamed(results(copy.deepcopy(original).double(), call_original))
    plain = relative_errors(renamed(results(original, call_original)), exact)
    fast = results(from_huggingface(original), call_ours)
    fast = {name: value for name, value in fast.items() if "pooler" not in name}
    allowed = 2 * max(plain.values()) + torch.finfo(torch.float32).eps
    worse = {n: error for n, error in relative_errors(fast, exact).items() if not error <= allowed}
    assert not worse, f"allowed relative error {allowed:.2e}, got {worse}"


backends = pytest.mark.parametrize("backend", ["cpu", "eager"])


@backends
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_function": "gelu", "layer_norm_epsilon": 1e-2},
        {"activation_function": "quick_gelu", "n_inner": 50},
        {"activation_function": "relu"},
    ],
    ids=str,
)
def test_gpt2(backend, options):
    def theirs(module):
        out = module(input_ids=TOKENS, labels=TOKENS)
        return {"output": out.logits, "loss": out.loss}

    def ours(module):
        targets = TOKENS.roll(-1, 1)
        targets[:, -1] = -100
        return {"output": module(TOKENS), "loss": module.loss(TOKENS, targets)}

    with use_backend(backend):
        assert_same(gpt2(**options), theirs, ours)


@backends
@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2}, {"hidden_act": "silu"}],
    ids=str,
)
def test_masked_language_model(backend, options):
    def theirs(module):
        out = module(
            input_ids=TOKENS, attention_mask=SEEN.long(), token_type_ids=SEGMENTS, labels=TARGETS
        )
        return {"output": out.logits[SEEN], "loss": out.loss}

    def ours(module):
        return {
            "output": module(TOKENS, SEGMENTS, LENGTHS)[SEEN],
            "loss": module.loss(TOKENS, TARGETS, SEGMENTS, LENGTHS),
        }

    with use_backend(backend):
        assert_same(bert(**options), theirs, ours)


@backends
def test_bert_model(backend):
    model = bert("BertModel", type_vocab_size=3).eval()
    with use_backend(backend), torch.no_grad():
        ours = from_huggingface(model)
        wanted = model(TOKENS, attention_mask=SEEN.long(), token_type_ids=SEGMENTS)
        hidden = ours(TOKENS, SEGMENTS, LENGTHS)
        torch.testing.assert_close(hidden[SEEN], wanted.last_hidden_state[SEEN])
        torch.testing.assert_close(ours.pooled(hidden), wanted.pooler_output)


def test_generation_is_theirs():
    """Greedy, with our cache and theirs."""
    model = gpt2().eval()
    wanted = model.generate(TOKENS[:, :5], max_new_tokens=18, do_sample=False, pad_token_id=0)
    new = torch.stack(list(from_huggingface(model).generate(TOKENS[:, :5], 18, temperature=0)), 1)
    assert torch.equal(torch.cat((TOKENS[:, :5], new), dim=1), wanted)


def test_dropout_and_mode_are_copied():
    ours = from_huggingface(gpt2(resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3).train())
    layer = ours.transformer.layers[0]
    assert (layer.dropout1.p, layer.dropout2.p, layer.dropout.p) == (0.1, 0.1, 0.0)
    assert (ours.dropout.p, layer.self_attn.dropout, ours.training) == (0.2, 0.3, True)
    assert not from_huggingface(bert().eval()).training


def test_what_cannot_be_copied():
    with pytest.raises(TypeError, match=r"model must be one of BertForMaskedLM, .*, got Linear"):
        from_huggingface(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="scale_attn_weights must be True, got False"):
        from_huggingface(gpt2(scale_attn_weights=False))
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'mish'"):
        from_huggingface(bert(hidden_act="mish"))
    with pytest.raises(ValueError, match="is_decoder must be False, got True"):
        from_huggingface(bert(is_decoder=True))
