"""The layout of ImageReward.pt; shares no code with the pack."""

WIDTH, TEXT, LAYERS = 16, 24, 2
PUBLISHED = {"width": 1024, "text_width": 768, "blocks": 24, "layers": 12, "inner": 3072, "words": 30524}


def shapes(
    width: int = WIDTH,
    text_width: int = TEXT,
    blocks: int = LAYERS,
    layers: int = LAYERS,
    inner: int = 40,
    words: int = 13,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in ImageReward.pt."""
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    linear: dict[str, tuple[int, int]] = {}
    norms: dict[str, int] = {f"{vision}norm": width, f"{text}embeddings.LayerNorm": text_width}
    for i in range(blocks):
        block = f"{vision}blocks.{i}."
        norms |= {f"{block}norm1": width, f"{block}norm2": width}
        linear |= {f"{block}attn.qkv": (3 * width, width), f"{block}attn.proj": (width, width)}
        linear |= {f"{block}mlp.fc1": (4 * width, width), f"{block}mlp.fc2": (width, 4 * width)}
    for i in range(layers):
        layer = f"{text}encoder.layer.{i}."
        norms |= {f"{layer}output.LayerNorm": text_width}
        for kind, source in (("attention", text_width), ("crossattention", width)):
            linear |= {
                f"{layer}{kind}.self.query": (text_width, text_width),
                f"{layer}{kind}.output.dense": (text_width, text_width),
            }
            linear |= {f"{layer}{kind}.self.{part}": (text_width, source) for part in ("key", "value")}
            norms |= {f"{layer}{kind}.output.LayerNorm": text_width}
        linear |= {f"{layer}intermediate.dense": (inner, text_width), f"{layer}output.dense": (text_width, inner)}
    for place, size in {0: (1024, text_width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        linear[f"mlp.layers.{place}"] = size
    found: dict[str, tuple[int, ...]] = {
        f"{vision}cls_token": (1, 1, width),
        f"{vision}pos_embed": (1, 197, width),
        f"{vision}patch_embed.proj.weight": (width, 3, 16, 16),
        f"{vision}patch_embed.proj.bias": (width,),
        f"{text}embeddings.word_embeddings.weight": (words, text_width),
        f"{text}embeddings.position_embeddings.weight": (512, text_width),
    }
    for name, size in linear.items():
        found |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    for name, size in norms.items():
        found |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return found
