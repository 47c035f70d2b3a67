"""Writes small checkpoints with random weights, and what transformers predicts with them.

    make.py DIR [--seed N]

Each folder of DIR is as `save_pretrained` leaves it, with one change: `dtype` in config.json is float32 whatever the type of the
weights, since it is the type of the KV cache, and expected values are computed in f32. Beside the model lies
`expected.safetensors`: `tokens`, and `logits` after each of them. Folders with a tokenizer hold `text.txt` and `expected.json`
instead: its tokens, and the bits of all but the first by the bytes that they stand for.
"""

import argparse
import json
import math
import pathlib

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TOKENS = 40
# Nothing is square: a query is twice as wide as the residual stream.
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
# Of Llama 3 and Qwen, whose look-ahead is more than plain regular expressions have.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = """Of a KV cache of any length, every step selects the tokens that matter and attends to those alone.
The scoring query is the mean of the block's queries; it's scaled, voted on, and the 256 likeliest are chosen:

    q̄ = mean(q),  s = scale · q̄ · k,  v = Σ softmax(s)    — «exact», ties by index. Größe, naïveté, 選択, 🦀🦀!
"""


def randomise(model, generator):
    """Weights with which every part matters: attention to few tokens, logits some units apart."""
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif name.endswith(".bias"):
            values = 0.5 * values
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            values = 1.5 * values / math.sqrt(shape[1])
        elif "embed_tokens" not in name:
            values = values / math.sqrt(shape[1])
        with torch.no_grad():
            parameter.copy_(values)


def save(model_class, config, folder, generator, dtype, **options):
    """Writes a folder, and returns the model as transformers reads it."""
    model = model_class(config)
    randomise(model, generator)
    model.to(dtype).save_pretrained(folder, **options)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields["dtype"] = "float32"
    path.write_text(json.dumps(fields, indent=1))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def predict(model, tokens):
    return model(input_ids=tokens[None], use_cache=False).logits[0].float()


def checkpoint(folder, seed, model_class, config, dtype, **options):
    generator = torch.Generator().manual_seed(seed)
    model = save(model_class, config, folder, generator, dtype, **options)
    tokens = torch.randint(config.vocab_size, (TOKENS,), generator=generator)
    expected = {"tokens": tokens, "logits": predict(model, tokens).contiguous()}
    save_file(expected, folder / "expected.safetensors")


def with_tokenizer(folder, seed):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", pair="<begin> $A $B", special_tokens=[("<begin>", 0)]
    )
    # As some files have it: whole texts must be read all the same.
    tokenizer.enable_truncation(8)
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(**SHAPE | {"vocab_size": 304}, tie_word_embeddings=True)
    model = save(LlamaForCausalLM, config, folder, generator, torch.bfloat16)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>").save_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    # As it was made, whatever has become of it in the wrapper.
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    ids = tokenizer.encode(TEXT).ids
    logits = predict(model, torch.tensor(ids)).double()
    nats = -logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    length = len(TEXT.encode())
    (folder / "text.txt").write_text(TEXT)
    expected = {"ids": ids, "bytes": length, "bits_per_byte": nats / math.log(2) / length}
    (folder / "expected.json").write_text(json.dumps(expected))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    root, seed = arguments.dir, arguments.seed

    def make(name, *rest, **options):
        checkpoint(root / name, seed, *rest, **options)

    llama = LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)
    make("llama_biases_f32", LlamaForCausalLM, llama, torch.float32)
    tied = LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LINEAR)
    make("llama_tied_f16", LlamaForCausalLM, tied, torch.float16)
    mistral = MistralConfig(**SHAPE, sliding_window=None)
    make("mistral_shards_bf16", MistralForCausalLM, mistral, torch.bfloat16, max_shard_size=8_000)
    # Qwen2 has no `head_dim`: its heads are shares of the residual stream.
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    qwen2 = Qwen2Config(**shape | {"hidden_size": 32}, rope_parameters=YARN)
    make("qwen2_bf16", Qwen2ForCausalLM, qwen2, torch.bfloat16)
    qwen3 = Qwen3Config(**SHAPE | {"head_dim": 16}, tie_word_embeddings=True)
    make("qwen3_bf16", Qwen3ForCausalLM, qwen3, torch.bfloat16)
    with_tokenizer(root / "llama_tokenizer", seed)


if __name__ == "__main__":
    main()
