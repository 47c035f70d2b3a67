"""Writes the seeds of the target model_folder: the smallest model folders there are, as the target reads them."""

import json
import struct
from pathlib import Path

VOCAB, HIDDEN, INNER = 256, 2, 1


def folder(name, dtype, family="Llama", biases=False, tied=True, **fields):
    torch_name, size = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}[dtype]
    config = {
        "architectures": [family + "ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": tied,
        "attention_bias": biases,
        "mlp_bias": biases,
        "torch_dtype": torch_name,
        **fields,
    }
    shapes = {"model.embed_tokens.weight": [VOCAB, HIDDEN], "model.norm.weight": [HIDDEN]}
    if not tied:
        shapes["lm_head.weight"] = [VOCAB, HIDDEN]
    layer = "model.layers.0."
    shapes[layer + "input_layernorm.weight"] = [HIDDEN]
    shapes[layer + "post_attention_layernorm.weight"] = [HIDDEN]
    linears = {f"self_attn.{part}_proj": (HIDDEN, 8) for part in "qkv"}
    linears |= {"self_attn.o_proj": (8, HIDDEN), "mlp.gate_proj": (HIDDEN, INNER)}
    linears |= {"mlp.up_proj": (HIDDEN, INNER), "mlp.down_proj": (INNER, HIDDEN)}
    for part, (inputs, outputs) in linears.items():
        shapes[f"{layer}{part}.weight"] = [outputs, inputs]
        if biases or family == "Qwen2" and part[:-5].endswith(("q", "k", "v")):
            shapes[f"{layer}{part}.bias"] = [outputs]
    if family == "Qwen3":
        shapes |= {f"{layer}self_attn.{part}_norm.weight": [8] for part in "qk"}
    header, end = {}, 0
    for tensor, shape in shapes.items():
        begin, end = end, end + size * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    config = json.dumps(config, separators=(",", ":")).encode()
    whole = struct.pack("<H", len(config)) + config + struct.pack("<Q", len(text)) + text + bytes(end)
    (Path(__file__).parent / "model_folder" / name).write_bytes(whole)


folder("tied_bf16", "BF16")
folder("biases_f16", "F16", biases=True, rope_scaling={"rope_type": "linear", "factor": 2.0})
yarn = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 32, "beta_slow": 1}
folder("yarn_bf16", "BF16", rope_scaling=yarn, max_position_embeddings=64)
llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
folder("untied_llama3", "BF16", tied=False, rope_parameters=llama3 | {"original_max_position_embeddings": 64})
folder("mistral_bf16", "BF16", family="Mistral", sliding_window=None)
folder("qwen2_bf16", "BF16", family="Qwen2", use_sliding_window=False, sliding_window=4096)
folder("qwen3_f32", "F32", family="Qwen3", layer_types=["full_attention"])
