"""Folders, files and settings that do not fit a family: one sentence, before any network is loaded."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_sd3
from tiny_families import CASES, build_flux, build_sd, build_skyreels, build_wan, write_image

from trainer.config import ModelConfig, PromptsConfig, parse_config
from trainer.loop import Trainer
from trainer.models import Conditions, model_class
from trainer.models.diffusers.family import DiffusersModel
from trainer.models.diffusers.hunyuan_video import HunyuanVideoModel
from trainer.models.diffusers.qwen_image import QwenImageModel
from trainer.models.diffusers.single_file import load_network, network_weights
from trainer.prompts.sets import training_prompts
from trainer.prompts.store import write_conditions
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    builders = {"flux": build_flux, "sd": build_sd, "wan": build_wan, "skyreels": build_skyreels}
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in builders.items()}


@pytest.fixture
def flux(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return shutil.copytree(folders["flux"], tmp_path / "flux")


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(DiffusersModel, "_load_network", fail)


def config_of(family: str, path: Path, **settings: object) -> ModelConfig:
    return ModelConfig(family=family, path=str(path), **{"height": 16, "width": 16, **settings})


@pytest.mark.parametrize(
    ("family", "folder", "settings", "words"),
    [
        ("flux", "sd", {}, "transformer/config.json is missing"),
        ("wan", "flux", {}, "is a FluxPipeline, but family wan needs WanPipeline or WanImageToVideoPipeline"),
        ("sdxl", "sd", {}, "is a StableDiffusionPipeline, but family sdxl needs StableDiffusionXLPipeline"),
        ("flux", "flux", {"width": 24}, None),
        ("flux", "flux", {"frames": 5}, "model.frames is 5: for this model it must be 1, because it generates images"),
        ("wan", "wan", {"frames": 6}, "model.frames is 6: for this model it must be a multiple of 4, plus 1"),
        ("wan", "wan", {"height": 24}, "model.height is 24: it must be a multiple of 16 for this model"),
        (
            "wan",
            "wan",
            {"embedded_guidance": 3.0},
            "model.embedded_guidance is 3.0, but this model has no guidance input: use null",
        ),
        ("flux", "flux", {"network_file": "nowhere.safetensors"}, "model.network_file is 'nowhere.safetensors'"),
        ("flux", "flux", {"network_file": "model.ckpt"}, "give a .safetensors file that exists"),
    ],
)
def test_what_does_not_fit_is_named(
    folders: dict[str, Path], family: str, folder: str, settings: dict, words: str | None
) -> None:
    config = config_of(family, folders[folder], **settings)
    if words is None:
        model_class(config)
        return
    with pytest.raises(BadInput) as caught:
        model_class(config)
    assert words in str(caught.value)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


def unlink_weights(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def rename_class(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "ChromaTransformer2DModel"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("vae"), "vae/config.json is missing"),
        (without("scheduler"), "scheduler/scheduler_config.json is missing"),
        (unlink_weights, "transformer holds no .safetensors weights"),
        (rename_class, "is a ChromaTransformer2DModel, but family flux needs FluxTransformer2DModel"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_missing_and_spoiled_parts_are_named(flux: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(flux)
    with pytest.raises(BadInput, match=words.replace("(", r"\(")):
        model_class(config_of("flux", flux))


def test_missing_text_encoder_is_named_before_encoding(flux: Path) -> None:
    shutil.rmtree(flux / "text_encoder_2")
    config = config_of("flux", flux)
    family = model_class(config)  # with conditions from a file none is needed
    with pytest.raises(BadInput, match="text_encoder_2 is missing"):
        family.encode(config, ["a circle", ""], CPU)


def test_zero_snr_with_a_prediction_of_noise_and_unknown_predictions_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    file = folder / "scheduler" / "scheduler_config.json"
    plain = json.loads(file.read_text())
    zero_snr = {"rescale_betas_zero_snr": True}
    for change, words in (({"prediction_type": "sample"}, "'sample'"), (zero_snr, "zero_snr with .* epsilon")):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(BadInput, match=words):
            model_class(config_of("sd", folder))
    file.write_text(json.dumps(plain | zero_snr | {"prediction_type": "v_prediction"}))
    model_class(config_of("sd", folder))


def trainer(model: dict, rollout: dict, prompts: dict) -> Trainer:
    return Trainer(
        parse_config(
            {
                "model": {"height": 16, "width": 16, **model},
                "prompts": prompts,
                "rollout": {"steps": 4, "group_size": 2, "prompts_per_iteration": 1, **rollout},
                "rewards": [{"name": "brightness"}],
                "runtime": {"device": "cpu"},
            }
        ),
        None,
        Processes("cpu"),
    )


@pytest.mark.parametrize(("family", "kernel"), [("sd", "dance"), ("flux", "ddim")])
def test_kernel_of_the_other_kind_is_refused(folders: dict[str, Path], family: str, kernel: str) -> None:
    model = {"family": family, "path": str(folders[family])}
    with pytest.raises(BadInput, match=f"rollout.kernel is '{kernel}': models of family {family} take"):
        trainer(model, {"kernel": kernel}, {"texts": ["a circle"]})


def test_images_are_asked_for_and_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'a circle' has no image"):
        trainer({"family": "skyreels", "path": str(folders["skyreels"])}, {}, {"texts": ["a circle"]})
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a circle", "image": "a.png"}')
    with pytest.raises(BadInput, match="'a circle' has an image"):
        trainer({"family": "wan", "path": str(folders["wan"])}, {}, {"file": str(tmp_path / "p.jsonl")})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"embeds": torch.zeros(2, 3, 8), "pooled": torch.zeros(2, 16)}, "'embeds' have width 8, but .* needs 16"),
        ({"embeds": torch.zeros(2, 3, 16)}, "has embeds, but family flux in .* needs embeds, pooled: encode"),
    ],
)
def test_conditions_of_another_model_are_refused(
    folders: dict[str, Path], tmp_path: Path, tensors: dict, words: str
) -> None:
    file = tmp_path / "conditions.safetensors"
    write_conditions(file, [("a circle", ""), ("", "")], [Conditions(tensors)])
    with pytest.raises(BadInput, match=words):
        trainer({"family": "flux", "path": str(folders["flux"])}, {}, {"texts": ["a circle"], "conditions": str(file)})


# ------------------------------------------------------------------------------------------------------ every family

EACH = {case.family: (case.build, case.model) for case in reversed(CASES.values())} | {
    "wan": (CASES["wan-i2v"].build, CASES["wan-i2v"].model),
    "sd3": (build_tiny_sd3, {"height": 16, "width": 16}),
}


@pytest.fixture(scope="module", params=EACH)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return EACH[family][0](tmp_path_factory.mktemp(family))


@pytest.fixture
def fitting(family: str, whole: Path) -> ModelConfig:
    return ModelConfig(family=family, path=str(whole), **EACH[family][1])


def refused(config: ModelConfig, *words: str) -> None:
    with pytest.raises(BadInput) as caught:
        model_class(config)
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_family_names_what_does_not_fit_it(
    family: str, whole: Path, fitting: ModelConfig, folders: dict[str, Path], tmp_path: Path
) -> None:
    kind = model_class(fitting)
    other = folders["sd" if kind.component == "transformer" else "flux"]
    refused(fitting.model_copy(update={"path": str(other)}), str(other), f"{kind.component}/config.json is missing")
    step, every = kind.size_step(kind.network_config(fitting), kind.vae_config(fitting))
    for size in ("height", "width"):
        odd = fitting.model_copy(update={size: 8 * step + 1})
        refused(odd, f"model.{size} is {8 * step + 1}", f"multiple of {step}")
    accepted = "1, because it generates images" if every is None else f"a multiple of {every}, plus 1"
    refused(fitting.model_copy(update={"frames": 6}), f"model.frames is 6: for this model it must be {accepted}")
    copy = shutil.copytree(whole, tmp_path / "copy")
    spoiled = fitting.model_copy(update={"path": str(copy)})
    for part in ("vae/config.json", "scheduler/scheduler_config.json", f"{kind.component}/config.json"):
        with hidden(copy / part):
            refused(spoiled, f"{part} is missing")
    for part in ("vae", kind.component):
        with hidden(next((copy / part).glob("*.safetensors"))):
            refused(spoiled, f"{copy / part} holds no .safetensors weights")
    image = write_image(tmp_path / "p.png", 0) if kind.takes_images(fitting) else None
    for encoder in kind.encoder_components(fitting):
        with hidden(copy / encoder), pytest.raises(BadInput, match=f"{encoder} is missing"):
            kind.encode(spoiled, ["a circle", ""], CPU, [image, None])


@contextmanager
def hidden(path: Path) -> Iterator[None]:
    """Inside, there is no such file or folder."""
    away = path.rename(path.with_name("away"))
    yield
    away.rename(path)


def test_every_family_names_a_target_that_matches_nothing(family: str, fitting: ModelConfig) -> None:
    kind = model_class(fitting)
    with pytest.raises(BadInput, match="lora.targets: 'attn.nothing' matches no linear or convolution layer of"):
        kind.check_targets(fitting, ["to_q", "attn.nothing"])
    kind.check_targets(fitting, list(kind.default_targets))


def test_every_family_names_conditions_that_do_not_fit_it(family: str, whole: Path, fitting: ModelConfig) -> None:
    kind = model_class(fitting)
    count = 2 if kind.takes_images(fitting) else 1
    images = [write_image(whole / f"{i}.png", i) for i in range(count)] if count == 2 else [None]
    conditions = kind.encode(fitting, ["a circle"] * count + [""], CPU, [*images, None])
    kind.check_conditions(fitting, conditions)
    masks = {name for name in conditions.tensors if name.endswith("mask")}
    for name in set(conditions.tensors) - masks:
        wider = conditions.tensors | {name: conditions.tensors[name].repeat_interleave(3, -1)}
        with pytest.raises(BadInput, match=f"'{name}' have"):
            kind.check_conditions(fitting, Conditions(wider))
    for name in conditions.tensors:
        fewer = {key: value for key, value in conditions.tensors.items() if key != name}
        with pytest.raises(
            BadInput, match=f"prompts.conditions has .*, but family {family} in .* needs .*: encode the prompts again"
        ):
            kind.check_conditions(fitting, Conditions(fewer))
    if family not in ("qwen-image-edit",) and count == 2:
        with pytest.raises(BadInput, match="for this model.height, width and frames: encode the prompts again"):
            kind.check_conditions(fitting.model_copy(update={"height": 32}), conditions)


def test_a_target_without_a_name_in_comfyui_is_refused_before_loading(folders: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="ComfyUI has no name for '.*timestep_embedder.linear_1'"):
        HunyuanVideoModel.check_targets(config_of("skyreels", folders["skyreels"]), ["to_q", "linear_1"])


@pytest.mark.parametrize("file", [False, True])
def test_every_family_refuses_networks_with_other_inputs(
    family: str, whole: Path, fitting: ModelConfig, file: bool, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    kind = model_class(fitting)
    given = kind.network_config(fitting)["in_channels"]
    copy = shutil.copytree(whole, tmp_path / "copy")
    config = copy / kind.component / "config.json"
    other = given + (5 if family in ("sd", "sdxl") else 1)
    if file:
        weights = load_file(next((copy / kind.component).glob("*.safetensors")))
        (name,) = set(kind.input_layers) & set(weights)
        weights[name] = weights[name][:, :1].expand(-1, other, *weights[name].shape[2:])
        for prefix in ("", "model.diffusion_model."):
            save_file({f"{prefix}{n}": w.contiguous() for n, w in weights.items()}, copy / "one.safetensors")
            wrong = fitting.model_copy(update={"network_file": str(copy / "one.safetensors")})
            refused(wrong, "one.safetensors", f"has {other} input channels, but family {family} uses {given}")
        return
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": other}))
    wrong = fitting.model_copy(update={"path": str(copy)})
    refused(wrong, str(copy / kind.component), f"has {other} input channels, but family {family} uses {given}")
    assert "inpainting" in str(pytest.raises(BadInput, model_class, wrong).value)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("sd", {"time_cond_proj_dim": 256}),
        ("sd", {"addition_embed_type": "text_time"}),
        ("sd", {"class_embed_type": "projection"}),
    ],
)
def test_unets_that_take_more_than_the_text_are_refused(
    folders: dict[str, Path], family: str, change: dict, tmp_path: Path
) -> None:
    copy = shutil.copytree(folders[family], tmp_path / "copy")
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    ((name, value),) = change.items()
    refused(
        config_of(family, copy), f"{name} {value!r}: its network needs an input that family {family} does not provide"
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd", "AutoencoderKLTemporalDecoder"), ("flux", "AutoencoderKLWan"), ("wan", "AutoencoderKL")],
)
def test_a_vae_of_another_kind_is_refused(folders: dict[str, Path], family: str, name: str, tmp_path: Path) -> None:
    copy = shutil.copytree(folders[family], tmp_path / "copy")
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": name}))
    refused(config_of(family, copy), f"names {name!r}, and family {family} takes Autoencoder")


def test_odd_token_numbers_of_qwen_are_warned_of(tmp_path: Path) -> None:
    folder = CASES["qwen-image"].build(tmp_path)
    warned = [QwenImageModel.notes(config_of("qwen-image", folder, height=h, width=720)) for h in (704, 720)]
    assert [len(notes) for notes in warned] == [1, 1]
    assert warned[0][0].startswith("720 pixels are an odd number of tokens")
    assert QwenImageModel.notes(config_of("qwen-image", folder, height=704, width=736)) == []


# ------------------------------------------------------------------------------------------------------ single files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {f"lora.{name}": value for name, value in w.items()}, "is no FluxTransformer2DModel as"),
        (lambda w: {name: value[:1] for name, value in w.items()}, "is no FluxTransformer2DModel as"),
        (lambda w: w | {"x_embedder.scale_weight": torch.ones(1)}, "holds scaled 8-bit weights: give 16 or 32 bits"),
    ],
)
def test_single_files_of_something_else_are_refused(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[dict], dict], words: str
) -> None:
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file, save_file

    weights = load_file(folders["flux"] / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(change(weights), tmp_path / "one.safetensors")
    with pytest.raises(BadInput, match=words):
        load_network(
            tmp_path / "one.safetensors", FluxTransformer2DModel, folders["flux"], "transformer", torch.float32, {}
        )


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"no weights")
    with pytest.raises(BadInput, match="is not a safetensors file"):
        network_weights(tmp_path / "one.safetensors")


def test_quantised_bases_need_bitsandbytes_and_a_gpu(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("flux", folders["flux"], quantization="nf4")
    for package, words in ((None, "it needs the package bitsandbytes"), (object(), "it needs a GPU")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, package=package: package)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        refused(config, "model.quantization is 'nf4'", words)


# ------------------------------------------------------------------------------------------------------- prompt files


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "p.csv").write_text('prompt,image,category\n"a, b",a.png,x\nc,,\n')
    lines = [{"prompt": "a, b", "image": "a.png", "category": "x"}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = (training_prompts(PromptsConfig(file=str(tmp_path / f"p.{kind}"))) for kind in ("csv", "jsonl"))
    assert first == second
    assert (first.texts, first.categories, first.images) == (["a, b", "c"], ["x", ""], [tmp_path / "a.png", None])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "text\na\n", "has the columns text: it needs prompt"),
        ("p.csv", "prompt,image\na\n", "line 2 does not have 2 columns"),
        ("p.csv", 'prompt\n""\n', "'prompt' must be a non-empty string"),
        ("p.csv", "prompt,image\na,b.png\n", "there is no image"),
        ("p.jsonl", '{"prompt": "a", "image": 3}', "'category' and 'image' must be strings"),
        ("p.csv", "prompt\na\na\n", "repeats the prompt 'a'"),
    ],
)
def test_faults_of_prompt_files_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as caught:
        training_prompts(PromptsConfig(file=str(tmp_path / name)))
    assert words in str(caught.value)
