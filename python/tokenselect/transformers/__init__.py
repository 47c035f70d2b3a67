"""Token selection as an attention implementation of Hugging Face transformers.

    import tokenselect.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tokenselect")
    model.generate(**inputs)  # keys and values in a `TokenSelectCache`

Importing this registers the name. Layers select the tokens that they attend to; those with a sliding window are dense within it.
Options go to a model, `configure(model, top_k=4096)`, or to a cache, `TokenSelectCache(model.config, TokenSelectOptions(…))`.
Other caches are served, too, without a copy; padding on either side, chunks of prompts, beams, sampling and assisted generation
as with any implementation. What is not served is refused with a reason (`NotImplementedError`), never computed otherwise.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import tokenselect_attention
from .cache import TokenSelectCache
from .configure import configure, make_caches
from .contexts import release
from .layer import TokenSelectLayer
from .masks import RowMask, tokenselect_mask
from .options import TokenSelectOptions

__all__ = [
    "RowMask",
    "TokenSelectCache",
    "TokenSelectLayer",
    "TokenSelectOptions",
    "configure",
    "release",
    "tokenselect_attention",
    "tokenselect_mask",
]

AttentionInterface.register("tokenselect", tokenselect_attention)
AttentionMaskInterface.register("tokenselect", tokenselect_mask)
make_caches()
