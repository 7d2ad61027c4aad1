"""Qwen2-VL with plain sequential positions, written out on plain tensors in float64; shares no code with the pack."""

import torch
from clip_reference import Weights, attention, gelu, layer_norm, quick_gelu
from torch import Tensor

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sections": [4, 6, 6],
    "vision": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}
# As in the config.json of Qwen2-VL-2B-Instruct and 7B-Instruct.
SIZES_2B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vision": {"depth": 32, "embed_dim": 1280},
}
SIZES_7B = SIZES_2B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def shapes(words: int, sizes: dict = SIZES) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers 4.45 wrote them."""
    hidden, inner, eye = sizes["hidden_size"], sizes["intermediate_size"], sizes["vision"]["embed_dim"]
    narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (words, hidden),
        "visual.patch_embed.proj.weight": (eye, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (eye,),
        "visual.merger.ln_q.bias": (eye,),
        "visual.merger.mlp.0.weight": (4 * eye, 4 * eye),
        "visual.merger.mlp.0.bias": (4 * eye,),
        "visual.merger.mlp.2.weight": (hidden, 4 * eye),
        "visual.merger.mlp.2.bias": (hidden,),
    }
    for i in range(sizes["vision"]["depth"]):
        block = f"visual.blocks.{i}."
        for name, size in (
            ("norm1", (eye,)),
            ("norm2", (eye,)),
            ("attn.qkv", (3 * eye, eye)),
            ("attn.proj", (eye, eye)),
            ("mlp.fc1", (4 * eye, eye)),
            ("mlp.fc2", (eye, 4 * eye)),
        ):
            found |= {f"{block}{name}.weight": size, f"{block}{name}.bias": size[:1]}
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q_proj", hidden), ("k_proj", narrow), ("v_proj", narrow)):
            found |= {f"{layer}self_attn.{name}.weight": (rows, hidden), f"{layer}self_attn.{name}.bias": (rows,)}
        found |= {
            f"{layer}self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return found


def with_lora(plain: dict[str, tuple[int, ...]], rank: int = 64) -> dict[str, tuple[int, ...]]:
    """The same as PEFT writes it: every linear layer of the language model has a LoRA."""
    found: dict[str, tuple[int, ...]] = {}
    for key, size in plain.items():
        module, kind = key.rsplit(".", 1)
        adapted = module.startswith("model.layers.") and module.endswith("_proj")
        found["base_model.model." + (f"{module}.base_layer.{kind}" if adapted else key)] = size
        if adapted and kind == "weight":
            found[f"base_model.model.{module}.lora_A.default.weight"] = (rank, size[1])
            found[f"base_model.model.{module}.lora_B.default.weight"] = (size[0], rank)
    return found


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    x = x @ weights[f"{name}.weight"].T
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def rms_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """`[L, D]` of one head by `[L, D/2]`: the first half of the features pairs with the second."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def heads_rotated(x: Tensor, count: int, angles: Tensor) -> Tensor:
    return torch.cat([rotate(head, angles) for head in x.chunk(count, -1)], -1)


def see(weights: Weights, frames: Tensor) -> Tensor:
    """Merged patches `[N, 64]` of normalised frames `[2 T, 3, H, W]`, in reading order of their 28 x 28 squares."""
    times, rows, columns = len(frames) // 2, frames.shape[2] // 28, frames.shape[3] // 28
    kernel, results = weights["visual.patch_embed.proj.weight"].flatten(1), []
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for t in range(times):
        patches, places = [], []
        for row in range(rows):
            for column in range(columns):
                for y in (2 * row, 2 * row + 1):
                    for x in (2 * column, 2 * column + 1):
                        cut = frames[2 * t : 2 * t + 2, :, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
                        patches.append(cut.transpose(0, 1).flatten())
                        places.append(torch.cat([y * frequencies, x * frequencies]))
        x, angles = torch.stack(patches).double() @ kernel.T, torch.stack(places)
        for i in range(2):
            block = f"visual.blocks.{i}."
            q, k, v = linear(layer_norm(x, weights, f"{block}norm1", 1e-6), weights, f"{block}attn.qkv").chunk(3, -1)
            y = attention(heads_rotated(q, 2, angles), heads_rotated(k, 2, angles), v, 2)
            x = x + linear(y, weights, f"{block}attn.proj")
            y = quick_gelu(linear(layer_norm(x, weights, f"{block}norm2", 1e-6), weights, f"{block}mlp.fc1"))
            x = x + linear(y, weights, f"{block}mlp.fc2")
        x = layer_norm(x, weights, "visual.merger.ln_q", 1e-6).reshape(rows * columns, -1)
        results.append(linear(gelu(linear(x, weights, "visual.merger.mlp.0")), weights, "visual.merger.mlp.2"))
    return torch.cat(results)


def read(weights: Weights, tokens: list[int], pad: int, seen: Tensor) -> Tensor:
    """Last states `[L, 64]`, with what was seen in place of the pads."""
    x = weights["model.embed_tokens.weight"][tokens].clone()
    x[torch.tensor(tokens) == pad] = seen
    frequencies = 1e6 ** (-torch.arange(16, dtype=torch.float64) / 16)
    angles = torch.arange(len(tokens), dtype=torch.float64)[:, None] * frequencies
    hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for i in range(2):
        layer = f"model.layers.{i}."
        y = rms_norm(x, weights, f"{layer}input_layernorm")
        q, k, v = (linear(y, weights, f"{layer}self_attn.{name}_proj") for name in "qkv")
        k, v = heads_rotated(k, 1, angles).repeat(1, 2), v.repeat(1, 2)  # one key head serves both
        x = x + linear(attention(heads_rotated(q, 2, angles), k, v, 2, hidden), weights, f"{layer}self_attn.o_proj")
        y = rms_norm(x, weights, f"{layer}post_attention_layernorm")
        gate = linear(y, weights, f"{layer}mlp.gate_proj")
        y = gate * torch.sigmoid(gate) * linear(y, weights, f"{layer}mlp.up_proj")
        x = x + linear(y, weights, f"{layer}mlp.down_proj")
    return rms_norm(x, weights, "model.norm")
