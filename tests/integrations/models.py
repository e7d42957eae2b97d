"""Small models of transformers with random weights, by what is special about their attention."""

import transformers as hf
from transformers import PreTrainedModel

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
HEADS = GROUPED | {"head_dim": 8}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), None)
T5 = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 60}

DECODERS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**GPT2, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    ),
    "llama, grouped queries": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "mistral, a window": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**GROUPED, sliding_window=5)
    ),
    "gemma 2, softcap and a window in turns": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**HEADS, sliding_window=5, attn_logit_softcapping=2.0)
    ),
    "gpt-oss, sinks": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **HEADS,
            sliding_window=5,
            num_local_experts=2,
            num_experts_per_tok=1,
            experts_implementation="eager",  # the faster ones know no float64
        )
    ),
}
ENCODERS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL)),
    "modernbert, a window on both sides": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(
            **SMALL, **NO_TOKENS, pad_token_id=0, local_attention=6, global_attn_every_n_layers=2
        )
    ),
}
OTHERS = {
    "t5, position bias, cross-attention": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "vit, no mask": lambda: hf.ViTModel(
        hf.ViTConfig(**(SMALL | {"image_size": 16, "patch_size": 4}))
    ),
}


ALL = DECODERS | ENCODERS | OTHERS


def make(name: str) -> PreTrainedModel:
    return ALL[name]().eval()
