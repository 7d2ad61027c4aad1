"""Renames CLIP weights from transformers to open_clip."""

import re
from pathlib import Path

import torch
from torch import Tensor

from ..files import rename

_PLAIN = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.position_ids": "",  # 0, 1, 2, ..., written by older versions
    "vision_model.embeddings.position_ids": "",
}
_NORMS = {
    "text_model.final_layer_norm": "ln_final",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}
_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "self_attn.q_proj": "attn.in_proj_q",
    "self_attn.k_proj": "attn.in_proj_k",
    "self_attn.v_proj": "attn.in_proj_v",
}
_LAYER = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def from_transformers(weights: dict[str, Tensor], path: Path, what: str) -> dict[str, Tensor]:
    """Rename the weights of a transformers `CLIPModel` (one or both encoders) for open_clip's `CLIP`.

    Raises:
        BadInput: a key does not belong to a `CLIPModel`.
    """
    found = rename(weights, _new_name, path, what)
    for name in ("text_projection", "visual.proj"):
        if name in found:
            found[name] = found[name].T.contiguous()
    for name in [name for name in found if "in_proj_q" in name]:
        parts = [name.replace("in_proj_q", f"in_proj_{letter}") for letter in "qkv"]
        if all(part in found for part in parts):
            joined = name.replace("in_proj_q.", "in_proj_")
            found[joined] = torch.cat([found.pop(part) for part in parts])
    return found


def _new_name(key: str) -> str | None:
    if key in _PLAIN:
        return _PLAIN[key]
    module, _, kind = key.rpartition(".")
    if module in _NORMS and kind in ("weight", "bias"):
        return f"{_NORMS[module]}.{kind}"
    if (match := _LAYER.fullmatch(key)) and match[3] in _PARTS:
        tower = "visual.transformer" if match[1] == "vision" else "transformer"
        return f"{tower}.resblocks.{match[2]}.{_PARTS[match[3]]}.{match[4]}"
    return None
