"""The models: the example's GPT on tokens, and Transformers' Llama."""

from __future__ import annotations

import math

from quality_tasks import load_example
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_lightning.savings import linear_weights

_MULTIPLE = 128  # of hidden features, so that every block size divides them

# Name patterns of the layers to make block-sparse. Output heads always stay dense.
PATTERNS = {"mlps": r"re:.*\.mlp\..*", "all": r"re:.*\.(mlp|attention|self_attn)\..*"}


class GPT(nn.Module):
    """The blocks of the example's GPT between an embedding of tokens and an output head.

    Args:
        vocabulary: number of different tokens.
        width, layers, heads: size of the model.
        context: largest number of tokens.
        hidden: hidden features of an MLP.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, context: int, hidden: int
    ) -> None:
        super().__init__()
        block = load_example("gpt").Block
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(block(width, heads, context) for _ in range(layers))
        for block in self.blocks:
            block.mlp[0] = nn.Linear(width, hidden)
            block.mlp[2] = nn.Linear(hidden, width)
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The last matrices of the 2 * layers residual branches have a smaller variance.
                branch_end = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if branch_end else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits `[batch, time, vocabulary]` for `tokens` `[batch, time]`."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class Llama(LlamaForCausalLM):
    """Transformers' Llama, with the inputs and outputs of `GPT`."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers of the decoder."""
        return self.model.layers

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits `[batch, time, vocabulary]` for `tokens` `[batch, time]`."""
        return super().forward(input_ids=tokens, use_cache=False).logits


def build(
    name: str,
    *,
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    context: int,
    mlp_width: float = 1.0,
) -> GPT | Llama:
    """Return a dense model.

    Args:
        name: "gpt" or "llama".
        vocabulary, width, layers, heads, context: as in `GPT`.
        mlp_width: hidden features of the MLPs, relative to 4 * width of the GPT or 8 / 3 * width of
            the Llama, which have equally many parameters.
    """
    ratio = 4 if name == "gpt" else 8 / 3
    hidden = max(1, round(mlp_width * ratio * width / _MULTIPLE)) * _MULTIPLE
    if name == "gpt":
        return GPT(vocabulary, width, layers, heads, context, hidden)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        attn_implementation="sdpa",
    )
    return Llama(config)


def flops_per_token(model: nn.Module, layers: int, width: int, context: int) -> int:
    """Return the FLOPs of a training step per token: three times those of the forward pass.

    It counts the products of linear layers, by their present blocks, and the causal attention.
    """
    present, _ = linear_weights(model)
    return 3 * 2 * (present + layers * context * width)
