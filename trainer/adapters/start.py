"""Reads an existing LoRA file with ComfyUI's key names, to start training from it or to evaluate it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..config import LoraConfig
from ..models.base import FusedRows
from ..utils.errors import BadInput, cut, shorten

_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
)
"""Suffixes of the two matrices' names, in the forms that ComfyUI reads."""
_ALPHA = ".alpha"

Layer = tuple[Tensor, Tensor, float]
"""Down projection `[r, in]`, up projection `[out, r]`, and the scale of their product.

For a convolution, `in` is the number of weights of a filter.
"""


def check_start(config: LoraConfig) -> None:
    """Check the header of the file `lora.start_from`.

    Raises:
        BadInput: it is missing, is not a safetensors file, or contains no LoRA.
    """
    if config.start_from is not None:
        what = _what(config)
        _layer_names(list(_header(Path(config.start_from), what)), what)


def start_weights(
    config: LoraConfig,
    modules: list[str],
    key: Callable[[str], str | FusedRows],
    aliases: Callable[[str], list[str]],
    fresh: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Initial LoRA weights from the file `lora.start_from`; layers that it lacks keep their fresh weights.

    Another rank or alpha is converted exactly: with a lower rank the remaining rows stay fresh, and a different scale
    alpha / rank is multiplied into the up projection.

    Args:
        modules: names of the modules that are trained.
        key: the name under which ComfyUI loads a module's LoRA, or its part of a fused layer.
        aliases: further names under which ComfyUI loads it.
        fresh: the untrained weights by parameter name, `<module>.lora_A.default.weight`, whose product is 0.

    Raises:
        BadInput: the file changes layers that are not trained, its rank is above `lora.rank`, or a size differs.
    """
    return fitted_weights(Path(config.start_from), _what(config), config, modules, key, aliases, fresh)


def fitted_weights(
    path: Path,
    what: str,
    config: LoraConfig,
    modules: list[str],
    key: Callable[[str], str | FusedRows],
    aliases: Callable[[str], list[str]],
    fresh: dict[str, Tensor],
) -> dict[str, Tensor]:
    """`start_weights` for any file.

    Args:
        what: name of the file in messages.
        config: rank and alpha of the LoRA that gets the weights.
    """
    layers = _read_layers(path, what)
    result, used = dict(fresh), set()
    for module in modules:
        name = _found(module, key, aliases, layers)
        if name is None:
            continue
        used.add(name)
        native = key(module)
        down_name, up_name = (f"{module}.lora_{side}.default.weight" for side in "AB")
        layer = layers[name] if isinstance(native, str) else _part(layers[name], native, fresh[up_name].shape[0])
        result[down_name], result[up_name] = _fitted(
            layer, fresh[down_name], fresh[up_name], config, f"{what}: layer {shorten(name)}"
        )
    if unused := sorted(set(layers) - used):
        raise BadInput(
            f"{what} changes {len(unused)} layers that this run does not train, such as {shorten(unused[0])}: name "
            "them in lora.targets, or start from a LoRA of this model alone"
        )
    return result


def changed_modules(
    path: Path,
    what: str,
    modules: list[str],
    key: Callable[[str], str | FusedRows],
    aliases: Callable[[str], list[str]],
) -> list[str]:
    """The linear layers of a model that a LoRA file changes, from its header.

    Raises:
        BadInput: it is no LoRA, or changes layers that the model has not.
    """
    layers, found, used = _layer_names(list(_header(path, what)), what), [], set()
    for module in modules:
        try:
            name = _found(module, key, aliases, layers)
        except BadInput:  # ComfyUI has no name for this layer, so no file has one
            continue
        if name is not None:
            found.append(module)
            used.add(name)
    if unused := sorted(set(layers) - used):
        raise BadInput(
            f"{what} changes {len(unused)} of {len(layers)} layers that the model does not have, such as "
            f"{shorten(unused[0])}: it belongs to another model"
        )
    return found


def highest_rank(path: Path, what: str) -> int:
    """The largest rank of a LoRA file's layers, from its header.

    Raises:
        BadInput: it is no LoRA.
    """
    shapes = _header(path, what)
    names = _layer_names(list(shapes), what)
    return max((shapes[down] or (1,))[0] for down, _ in names.values())


def _found(
    module: str, key: Callable[[str], str | FusedRows], aliases: Callable[[str], list[str]], layers: dict[str, object]
) -> str | None:
    """The name under which a file holds a module's LoRA, if it does."""
    native = key(module)
    names = _names(native.key if isinstance(native, FusedRows) else native, module) + aliases(module)
    return next((name for name in names if name in layers), None)


def _what(config: LoraConfig) -> str:
    return f"lora.start_from: {cut(config.start_from, 200)}"


def _header(path: Path, what: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name.

    Raises:
        BadInput: it is not a readable safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadInput(f"{what}: there is no file of this name")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{what} is not a safetensors file ({cut(str(error), 100)})") from error


def _layer_names(names: list[str], what: str) -> dict[str, tuple[str, str]]:
    """The names of the down and up projection of each layer.

    Raises:
        BadInput: there are none, one is without the other, or there is something else than LoRA layers.
    """
    known, layers, rest = set(names), {}, []
    for name in names:
        pair = next(((down, up) for down, up in _PAIRS if name.endswith((down, up))), None)
        if pair is None:
            rest += [] if name.endswith(_ALPHA) else [name]
            continue
        base = name.removesuffix(pair[0]).removesuffix(pair[1])
        layers[base] = (base + pair[0], base + pair[1])
    if rest:
        raise BadInput(f"{what} contains {shorten(rest[0])}, which is not part of a plain LoRA or LoCon")
    if not layers:
        raise BadInput(f"{what} contains no LoRA")
    for base, (down, up) in layers.items():
        if not {down, up} <= known:
            raise BadInput(f"{what} contains only one of the two matrices of layer {shorten(base)}")
    return layers


def _read_layers(path: Path, what: str) -> dict[str, Layer]:
    from safetensors.torch import load_file

    names = _layer_names(list(_header(path, what)), what)
    tensors, layers = load_file(path), {}
    for base, (down_name, up_name) in names.items():
        down, up = (_matrix(tensors[name], what, name) for name in (down_name, up_name))
        if down.shape[0] != up.shape[1]:
            raise BadInput(f"{what}: the two matrices of layer {shorten(base)} have different ranks")
        alpha = tensors.get(base + _ALPHA)
        factor = 1.0 if alpha is None else float(alpha.float().reshape(-1)[0]) / down.shape[0]
        layers[base] = (down, up, factor)
    return layers


def _matrix(tensor: Tensor, what: str, name: str) -> Tensor:
    """A projection as a float32 matrix, a row for each filter of a convolution."""
    if tensor.ndim > 2:
        tensor = tensor.flatten(1)
    if tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.isfinite().all() or not tensor.numel():
        raise BadInput(f"{what}: {shorten(name)} is not a finite matrix")
    return tensor.float()


def _names(key: str, module: str) -> list[str]:
    """Names under which ComfyUI finds a layer; the one that this program writes comes first.

    Args:
        key: in this program's files, such as `diffusion_model.blocks.0.attn.qkv`.
        module: in diffusers' network or in ComfyUI's, such as `transformer_blocks.0.attn.to_q`.
    """
    names = [key]
    for name in (key.partition(".")[2], module):
        flat = name.replace(".", "_")
        names += [f"{start}.{name}" for start in ("diffusion_model", "transformer", "unet", "base_model.model")]
        names += [f"{start}_{flat}" for start in ("lora_unet", "lora_transformer", "lycoris")]
        names.append(name)
    return list(dict.fromkeys(names))


def _part(layer: Layer, rows: FusedRows, count: int) -> Layer:
    """A module's part of a layer that is fused in ComfyUI, without columns that do not affect it."""
    down, up, factor = layer
    own = up[rows.first : rows.first + count]
    reached = own.any(0)
    return down[reached], own[:, reached], factor


def _fitted(layer: Layer, down: Tensor, up: Tensor, config: LoraConfig, what: str) -> tuple[Tensor, Tensor]:
    """The layer as weights of the run's own rank and alpha.

    Args:
        down, up: the fresh weights, `[rank, in]` and `[out, rank]`, or those of a convolution.
    """
    new_down, new_up, factor = layer
    rank = new_down.shape[0]
    width = down[0].numel()
    if new_down.shape[1] != width or new_up.shape[0] != up.shape[0]:
        sizes = f"{new_down.shape[1]} to {new_up.shape[0]}, not {width} to {up.shape[0]}"
        raise BadInput(f"{what} maps {sizes}: it belongs to another model")
    if rank > config.rank:
        raise BadInput(f"{what} has rank {rank}, which is above lora.rank {config.rank}: raise lora.rank to {rank}")
    down, up = down.detach().clone(), torch.zeros_like(up)
    down[:rank] = new_down.to(down.device).view_as(down[:rank])
    up[:, :rank] = (new_up * (factor / (config.alpha / config.rank))).to(up.device).view_as(up[:, :rank])
    return down, up
