"""What a user may choose, in one dataclass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from tokenselect import Device
from tokenselect._options import at_least, finite_or_none, layers, odd

__all__ = ["TokenSelectOptions"]

_DEFAULT_THRESHOLD = 0.9


@dataclass(frozen=True, kw_only=True)
class TokenSelectOptions:
    """How layers select, and how their cache is kept.

    - `top_k`: Tokens chosen by vote, at least 1.
    - `n_init`: First tokens of a sequence that are always selected.
    - `n_local`: Last tokens before the current block that are always selected.
    - `block_len`: Tokens of a prompt that share one selection. Short blocks (4 to 16) are nearer to dense attention
      and cost more passes over the keys; 512 is the paper's.
    - `dense_layers`: Layers that attend to all tokens.
    - `thresholds`: Cosine of scoring queries, from -1 to 1, above which a decoding step uses the last selection
      again: for all layers, or by layer (others: 0.9). None selects anew at every step.
    - `max_reuse`: How often one selection may be used again; None for `max(n_local, 1)`.
    - `vote_pool_window`: Odd width of the max-pool over votes; 1 for none.
    - `score_scale`: Factor on scoring dot products; None for the layer's own `scaling`.
    - `positions`: `reassigned`: keys enter the cache before RoPE and are rotated at their rank among the selected
      tokens, so that no position is beyond what the model was trained on. Takes effect by `configure`, which takes
      RoPE away from the model.
    - `page_size`: Tokens of a page, 1 to 256.
    - `max_piece_len`: Tokens of a prompt that one step works on.
    - `max_workspace_bytes`: Most bytes of the workspace in which prompts are read, for each configuration of
      layers.
    - `device`: Where to run; None for the processor, or PyTorch's current stream, by where the tensors lie.

    Raises `ValueError`, which names the option, its rule and what was given.
    """

    top_k: int = 2048
    n_init: int = 128
    n_local: int = 512
    block_len: int = 512
    dense_layers: Collection[int] = ()
    thresholds: float | Mapping[int, float] | None = _DEFAULT_THRESHOLD
    max_reuse: int | None = None
    vote_pool_window: int = 1
    score_scale: float | None = None
    positions: Literal["native", "reassigned"] = "native"
    page_size: int = 16
    max_piece_len: int = 8192
    max_workspace_bytes: int = 1 << 30
    device: Device | None = None

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("n_init", 0), ("n_local", 0), ("block_len", 1), ("max_piece_len", 1)):
            at_least(name, getattr(self, name), least)
        at_least("max_workspace_bytes", self.max_workspace_bytes, 1)
        if self.max_reuse is not None:
            at_least("max_reuse", self.max_reuse, 0)
        at_least("page_size", self.page_size, 1)
        if self.page_size > 256:
            raise ValueError(f"`page_size` must be at most 256, got {self.page_size}")
        odd("vote_pool_window", self.vote_pool_window)
        finite_or_none("score_scale", self.score_scale)
        if self.positions not in ("native", "reassigned"):
            raise ValueError(f"`positions` must be native or reassigned, got {self.positions}")
        object.__setattr__(self, "dense_layers", layers("dense_layers", self.dense_layers))
        if self.device is not None and not isinstance(self.device, Device):
            raise ValueError(
                f"`device` must be a tokenselect.Device, got {self.device!r}; None runs where the tensors of the model lie"
            )
        if isinstance(self.thresholds, Mapping):
            for layer, threshold in self.thresholds.items():
                at_least("thresholds", layer, 0)
                _cosine(threshold)
            object.__setattr__(self, "thresholds", MappingProxyType(dict(self.thresholds)))
        elif self.thresholds is not None:
            _cosine(self.thresholds)

    def threshold(self, layer: int) -> float | None:
        """The threshold of a layer; None without a Selection Cache."""
        if isinstance(self.thresholds, Mapping):
            return self.thresholds.get(layer, _DEFAULT_THRESHOLD)
        return self.thresholds

    def check_layers(self, num_layers: int) -> None:
        """Raises `ValueError` where a layer is named that a model of `num_layers` layers does not have."""
        named = {"dense_layers": self.dense_layers}
        if isinstance(self.thresholds, Mapping):
            named["thresholds"] = self.thresholds
        for name, of_option in named.items():
            for layer in of_option:
                if layer >= num_layers:
                    raise ValueError(f"`{name}` must name layers below {num_layers}, got {layer}")


def _cosine(threshold: object) -> None:
    if not isinstance(threshold, (int, float)) or not -1 <= threshold <= 1:
        raise ValueError(f"`thresholds` must be from -1 to 1, got {threshold!r}")
