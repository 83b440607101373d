"""One decoder layer of a Llama with seeded random weights: what language models of that size ask of a compiler.

The layer is transformers' own (Touvron et al. 2023, https://arxiv.org/abs/2302.13971, with grouped queries); the sizes
are those of Llama 3.2 1B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

DISTRIBUTIONS = ("transformers",)


def model(
    hidden: int = 2048, intermediate: int = 8192, heads: int = 32, key_value_heads: int = 8, length: int = 32
) -> torch.nn.Module:
    """``hidden`` (1, length, hidden) float32, of positions 0 to length - 1 -> ``{"hidden_out": the same shape}``."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    class Block(torch.nn.Module):
        """The layer with the angles of its positions and its causal mask."""

        def __init__(self) -> None:
            super().__init__()
            self.wrapped = layer(hidden, intermediate, heads, key_value_heads, length)
            rotary = LlamaRotaryEmbedding(self.wrapped.self_attn.config)
            cosine, sine = rotary(torch.zeros(1), torch.arange(length)[None])
            hidden_keys = torch.full((length, length), -1e4).triu(1)
            self.register_buffer("cosine", cosine)
            self.register_buffer("sine", sine)
            self.register_buffer("mask", hidden_keys[None, None])

        def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            angles = (self.cosine, self.sine)
            return {"hidden_out": self.wrapped(hidden, attention_mask=self.mask, position_embeddings=angles)}

    return initialise(Block())


def layer(hidden: int, intermediate: int, heads: int, key_value_heads: int, length: int) -> LlamaDecoderLayer:
    """transformers' decoder layer of these sizes, for ``length`` positions."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        max_position_embeddings=length,
        attn_implementation="eager",
    )
    return LlamaDecoderLayer(config, layer_idx=0)


def initialise(block: torch.nn.Module) -> torch.nn.Module:
    """``block`` with weights of the global seed: normal with variance 1/fan-in, norms from 0.5 to 1.5; for inference.

    So the branches weigh as much as the residual that they add to.
    """
    import torch

    for weight in block.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return block.eval()
