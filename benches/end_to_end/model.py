"""Decoder-only transformers of well-known shapes with random weights: plain PyTorch around an attention that is passed
in."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812 (its usual name)

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`attend(layer, q, k, v)`: appends `k` and `v`, `[T, num_kv_heads, D]`, and answers the attention of `q`, `[T,
num_qo_heads, D]`. All are rotated already, and may be slices."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    hidden: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    qkv_bias: bool
    rope_theta: float
    eps: float = 1e-6

    @property
    def num_heads(self) -> int:
        """Heads of a fused projection: queries, keys, values."""
        return self.num_qo_heads + 2 * self.num_kv_heads

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one layer in bf16."""
        return 2 * self.num_kv_heads * self.head_dim * 2

    @property
    def weight_bytes(self) -> int:
        """All matrices in bf16."""
        layer = self.hidden * self.head_dim * (self.num_heads + self.num_qo_heads) + 3 * self.hidden * self.intermediate
        return 2 * (self.num_layers * layer + 2 * self.vocabulary * self.hidden)


SHAPES = {
    "qwen2-7b": Shape("qwen2-7b", 3584, 28, 28, 4, 128, 18944, 152064, True, 1e6),
    "llama3-8b": Shape("llama3-8b", 4096, 32, 32, 8, 128, 14336, 128256, False, 5e5, 1e-5),
}
# For testing this program on the processor.
TINY = Shape("tiny", 128, 3, 4, 2, 32, 256, 512, True, 1e4)


@dataclass(frozen=True)
class Rotation:
    """RoPE of some positions: `[T, 1, D]` each, sines with the sign of the rotated half."""

    cos: torch.Tensor
    signed_sin: torch.Tensor


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """`x`, `[T, heads, D]`, rotated."""
    halves_swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, halves_swapped, signed_sin)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """The activation of an MLP, `[T, intermediate]` of `[T, 2 * intermediate]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def fused(function: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """One kernel, where PyTorch can compile one: several would pass over memory, and wait, several times."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return torch.compile(function, dynamic=False)
    return function


class Layer:
    """Weights of a layer."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        heads, hidden = shape.num_qo_heads * shape.head_dim, shape.hidden
        self.qkv = random_matrix(shape.num_heads * shape.head_dim, hidden, device)
        self.qkv_bias = random_matrix(1, shape.num_heads * shape.head_dim, device)[0] if shape.qkv_bias else None
        self.out = random_matrix(hidden, heads, device)
        self.gate_up = random_matrix(2 * shape.intermediate, hidden, device)
        self.down = random_matrix(hidden, shape.intermediate, device)
        self.attention_norm, self.mlp_norm = (torch.ones(hidden, dtype=torch.bfloat16, device=device) for _ in "am")


class Model:
    """All weights, bf16. Linear layers, norms and RoPE are the same whatever attends."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.rotate, self.swiglu = fused(rotate, device), fused(swiglu, device)
        self.embedding = random_matrix(shape.vocabulary, shape.hidden, device)
        self.layers = [Layer(shape, device) for _ in range(shape.num_layers)]
        self.norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        self.head = random_matrix(shape.vocabulary, shape.hidden, device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[T, hidden]` of token numbers, `[T]`."""
        return F.embedding(tokens, self.embedding)

    def rotation(self, begin: int, count: int) -> Rotation:
        """That of the positions `[begin, begin + count)`."""
        half = self.shape.head_dim // 2
        exponents = torch.arange(half, device=self.device, dtype=torch.float64) / half
        positions = torch.arange(begin, begin + count, device=self.device, dtype=torch.float64)
        angles = positions[:, None, None] * self.shape.rope_theta**-exponents
        cos, sin = angles.cos(), angles.sin()
        both = torch.cat([cos, cos], dim=-1).bfloat16(), torch.cat([-sin, sin], dim=-1).bfloat16()
        return Rotation(*both)

    def run_layers(self, hidden: torch.Tensor, rotation: Rotation, attend: Attend, num_layers: int) -> torch.Tensor:
        """The first `num_layers` layers."""
        shape = self.shape
        size, rotated_heads = (shape.hidden,), shape.num_qo_heads + shape.num_kv_heads
        for index, layer in enumerate(self.layers[:num_layers]):
            normed = F.rms_norm(hidden, size, layer.attention_norm, shape.eps)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(-1, shape.num_heads, shape.head_dim)
            qk = self.rotate(qkv[:, :rotated_heads], rotation.cos, rotation.signed_sin)
            q, k, v = qk[:, : shape.num_qo_heads], qk[:, shape.num_qo_heads :], qkv[:, rotated_heads:]
            attended = attend(index, q, k, v).reshape(hidden.shape[0], -1)
            # Added by the product itself; what was given is kept.
            hidden = (torch.addmm if index == 0 else torch.Tensor.addmm_)(hidden, attended, layer.out.t())
            normed = F.rms_norm(hidden, size, layer.mlp_norm, shape.eps)
            hidden.addmm_(self.swiglu(F.linear(normed, layer.gate_up)), layer.down.t())
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[vocabulary]` of the last token."""
        normed = F.rms_norm(hidden[-1:], (self.shape.hidden,), self.norm, self.shape.eps)
        return F.linear(normed, self.head)[0]

    def draw_tokens(self, count: int) -> torch.Tensor:
        """Random token numbers."""
        return torch.randint(0, self.shape.vocabulary, (count,), device=self.device)


def random_matrix(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Normal numbers, scaled so that products keep the size of their input."""
    return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(std=1 / math.sqrt(columns))


class NoAttention:
    """What the linear part costs: an attention that does nothing but answer a tensor that is there."""

    def __init__(self, model: Model, count: int) -> None:
        shape = model.shape
        size = (count, shape.num_qo_heads, shape.head_dim)
        self.out = torch.zeros(size, dtype=torch.bfloat16, device=model.device)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.out

    def after(self, stages: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], object]) -> Attend:
        """Runs some stages and leaves the rest out."""

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            stages(layer, q, k, v)
            return self.out

        return attend
