"A model file of a few thousand random weights, made in a moment: Qwen2's architecture over single bytes."
from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HIDDEN, INTERMEDIATE = 32, 64


def tiny_gguf(
        path: Path, seed: int = 0, name: str = "Tiny Test Instruct", tokenizer: bool = True, end: bool = True,
        template: str = CHATML, kind: str = "qwen2") -> Path:
    "Write it; another seed is another model of the same shape."
    tokens = [*sorted(ByteLevel.alphabet()), "ĠĠ", "ĠĠĠĠ", PAD, START, END]
    file = gguf.GGUFWriter(path, kind)
    file.add_name(name)
    file.add_file_type(gguf.LlamaFileType.ALL_F32)
    file.add_context_length(8192)
    file.add_embedding_length(HIDDEN)
    file.add_block_count(1)
    file.add_feed_forward_length(INTERMEDIATE)
    file.add_head_count(2)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-6)
    if tokenizer: add_tokenizer(file, tokens, end, template)
    draw = np.random.default_rng(seed)
    for weights, shape in shapes(len(tokens)).items():
        spread = 1.0 if weights == "output.weight" else 0.1
        values = np.ones(shape) if "norm" in weights else draw.normal(0, spread, shape)
        file.add_tensor(weights, values.astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def add_tokenizer(file, tokens, end, template):
    "Every byte is a token; two merges, for readers want some."
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("qwen2")
    file.add_token_list(tokens)
    file.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 3) + [gguf.TokenType.CONTROL] * 3)
    file.add_token_merges(["Ġ Ġ", "ĠĠ ĠĠ"])
    if end: file.add_eos_token_id(tokens.index(END))
    file.add_pad_token_id(tokens.index(PAD))
    if template: file.add_chat_template(template)


def shapes(vocabulary: int) -> dict[str, tuple]:
    "Tensors by name."
    square, block = (HIDDEN, HIDDEN), {"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,)}
    for part in "qkv": block |= {f"attn_{part}.weight": square, f"attn_{part}.bias": (HIDDEN,)}
    block |= {"attn_output.weight": square, "ffn_down.weight": (HIDDEN, INTERMEDIATE)}
    block |= {f"ffn_{part}.weight": (INTERMEDIATE, HIDDEN) for part in ("gate", "up")}
    whole = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return whole | {"output.weight": (vocabulary, HIDDEN)} | {f"blk.0.{name}": shape for name, shape in block.items()}
