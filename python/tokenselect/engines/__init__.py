"""What the attention backends for SGLang and vLLM share: options, contexts, and a step over the engine's own paged cache.

An engine's backend makes one step for each forward, `HostStep` where lengths and page tables are read on the host and `DeviceStep`
where they stay on the device, and every layer calls its `attend`. Queries, keys and values are `[tokens, heads, head_dim]` with
rotated keys, as these engines have them: positions are native.
"""

from .options import EngineOptions

__all__ = ["EngineOptions"]
