"""Models of other libraries at the sizes of ours: rotary positions, RMSNorm, SwiGLU, tied embeddings."""

from typing import Any

from torch import nn

from lookfar.config import ModelConfig
from lookfar.model.decoder import hidden_width


def llama(config: ModelConfig, *, longest: int, **settings: Any) -> nn.Module:
    """Llama of transformers, on torch's fused attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=hidden_width(config),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=longest,
            attn_implementation="sdpa",
            tie_word_embeddings=True,
            **settings,
        )
    )


def x_transformers(config: ModelConfig, *, longest: int) -> nn.Module:
    """The decoder of x-transformers, on its fused attention."""
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=config.vocabulary,
        max_seq_len=longest,
        use_abs_pos_emb=False,
        tie_embedding=True,
        attn_layers=Decoder(
            dim=config.width,
            depth=config.layers,
            heads=config.heads,
            attn_dim_head=config.width // config.heads,
            rotary_pos_emb=True,
            attn_flash=True,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=hidden_width(config) / config.width,
        ),
    )
