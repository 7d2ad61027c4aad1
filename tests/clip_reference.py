"""CLIP written out on plain tensors, from the layouts its weights are published in; shares no code with the pack."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])

TINY = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}

Weights = dict[str, Tensor]


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in shapes.items()}


def open_clip_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an original open_clip file (686 of them for ViT-H-14)."""
    vision, text, embed = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    width, patch = vision["width"], vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (77, text["width"]),
        "text_projection": (text["width"], embed),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    for name, size in (("ln_final", text["width"]), ("visual.ln_pre", width), ("visual.ln_post", width)):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for prefix, size, layers in (
        ("transformer", text["width"], text["layers"]),
        ("visual.transformer", width, vision["layers"]),
    ):
        for layer in range(layers):
            block = f"{prefix}.resblocks.{layer}"
            for name, rows, columns in (
                ("attn.in_proj_", 3 * size, size),
                ("attn.out_proj.", size, size),
                ("mlp.c_fc.", 4 * size, size),
                ("mlp.c_proj.", size, 4 * size),
            ):
                shapes |= {f"{block}.{name}weight": (rows, columns), f"{block}.{name}bias": (rows,)}
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{name}.weight": (size,), f"{block}.{name}.bias": (size,)}
    return shapes


def to_transformers(weights: Weights) -> Weights:
    """The same tensors under the names of a transformers `CLIPModel` file."""
    names = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    found: Weights = {}
    for key, value in weights.items():
        if key in ("visual.proj", "text_projection"):
            found[("visual" if key == "visual.proj" else "text") + "_projection.weight"] = value.T.contiguous()
        elif ".resblocks." in key or key.startswith("transformer."):
            side = "vision" if key.startswith("visual") else "text"
            number, rest = key.split("resblocks.")[1].split(".", 1)
            place = f"{side}_model.encoder.layers.{number}."
            if "in_proj" in rest:
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{place}self_attn.{letter}_proj.{rest.split('_')[-1]}"] = part.clone()
            elif "out_proj" in rest:
                found[place + rest.replace("attn", "self_attn")] = value
            else:
                module, kind = rest.rsplit(".", 1)
                found[f"{place}{inner[module]}.{kind}"] = value
        elif key in names:
            found[names[key]] = value
        elif key.rsplit(".", 1)[0] in names:
            found[names[key.rsplit(".", 1)[0]] + "." + key.rsplit(".", 1)[1]] = value
        else:
            found[key] = value
    return found


# -------------------------------------------------------------------------------------------------------- the networks


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return centered * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor | None = None) -> Tensor:
    """`[L, D]` queries on `[M, D]` keys; `hidden` is True where a key must not be seen."""
    results = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        logits = a @ b.T / a.shape[-1] ** 0.5
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        results.append(logits.softmax(-1) @ c)
    return torch.cat(results, -1)


def blocks(x: Tensor, weights: Weights, prefix: str, heads: int, act: object, hidden: Tensor | None) -> Tensor:
    layers = len({key.split(".")[prefix.count(".") + 2] for key in weights if key.startswith(f"{prefix}.resblocks.")})
    for layer in range(layers):
        name = f"{prefix}.resblocks.{layer}"
        y = layer_norm(x, weights, f"{name}.ln_1")
        y = y @ weights[f"{name}.attn.in_proj_weight"].T + weights[f"{name}.attn.in_proj_bias"]
        y = attention(*y.chunk(3, -1), heads, hidden)
        x = x + y @ weights[f"{name}.attn.out_proj.weight"].T + weights[f"{name}.attn.out_proj.bias"]
        y = layer_norm(x, weights, f"{name}.ln_2")
        y = act(y @ weights[f"{name}.mlp.c_fc.weight"].T + weights[f"{name}.mlp.c_fc.bias"])
        x = x + y @ weights[f"{name}.mlp.c_proj.weight"].T + weights[f"{name}.mlp.c_proj.bias"]
    return x


def patches(pixels: Tensor, size: int) -> Tensor:
    """`[N, 3 size size]` of `[3, H, W]`, row by row."""
    rows = pixels.unfold(1, size, size).unfold(2, size, size)
    return rows.permute(1, 2, 0, 3, 4).reshape(-1, 3 * size * size)


def image_features(weights: Weights, pixels: Tensor, heads: int = 2, act: object = gelu) -> Tensor:
    """Unit vector of one image `[3, S, S]`, in float64."""
    weights = {key: value.double() for key, value in weights.items()}
    kernel = weights["visual.conv1.weight"]
    x = patches(pixels.double(), kernel.shape[-1]) @ kernel.flatten(1).T
    x = torch.cat([weights["visual.class_embedding"][None], x]) + weights["visual.positional_embedding"]
    x = blocks(layer_norm(x, weights, "visual.ln_pre"), weights, "visual.transformer", heads, act, None)
    x = layer_norm(x[0], weights, "visual.ln_post") @ weights["visual.proj"]
    return x / x.norm()


def text_features(weights: Weights, tokens: list[int], heads: int = 2, act: object = gelu) -> Tensor:
    """Unit vector of a text, in float64."""
    weights = {key: value.double() for key, value in weights.items()}
    tokens = tokens + [0] * (77 - len(tokens))
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    hidden = torch.ones(77, 77, dtype=torch.bool).triu(1)
    x = layer_norm(blocks(x, weights, "transformer", heads, act, hidden), weights, "ln_final")
    x = x[tokens.index(49407)] @ weights["text_projection"]
    return x / x.norm()


# ---------------------------------------------------------------------------------------------------------- the images


def file_image(image: Tensor) -> Image.Image:
    """What reading back a PNG of the image gives."""
    return Image.fromarray((image.numpy() * 255).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def standard(image: Image.Image) -> Tensor:
    array = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(array.transpose(2, 0, 1).copy()).float()
