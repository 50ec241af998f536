"""Sizes of Llama models, where only the shape of a model counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SHAPES", "LlamaShape"]


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama model, or of a mixture of experts of that kind (Mixtral).

    Attributes:
        experts: of each block; 0 for one MLP.
        experts_used: by each token.
    """

    layers: int
    width: int
    ff_width: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    experts: int = 0
    experts_used: int = 0

    def linear_layers(self) -> list[tuple[str, int, int]]:
        """(name, rows, inputs) of the matrices of all blocks, in the order of the file.

        The experts of a block are one tensor, row after row. Their router is not among these.
        """
        kv_width = self.width // self.heads * self.kv_heads
        number, suffix = (self.experts, "_exps") if self.experts else (1, "")
        found = []
        for layer in range(self.layers):
            block = f"blk.{layer}."
            found += [
                (f"{block}attn_q", self.width, self.width),
                (f"{block}attn_k", kv_width, self.width),
                (f"{block}attn_v", kv_width, self.width),
                (f"{block}attn_output", self.width, self.width),
                (f"{block}ffn_gate{suffix}", number * self.ff_width, self.width),
                (f"{block}ffn_up{suffix}", number * self.ff_width, self.width),
                (f"{block}ffn_down{suffix}", number * self.width, self.ff_width),
            ]
        return found

    def matrices(self) -> list[tuple[str, int, int]]:
        """The same with embedding and output, which come first."""
        ends = [("token_embd", self.vocabulary, self.width), ("output", self.vocabulary, self.width)]
        return ends + self.linear_layers()


SHAPES = {
    "1.1b": LlamaShape(layers=22, width=2048, ff_width=5632, heads=32, kv_heads=4),
    "7b": LlamaShape(layers=32, width=4096, ff_width=11008, heads=32, kv_heads=32),
}
"""TinyLlama's and Llama 2's smallest."""
