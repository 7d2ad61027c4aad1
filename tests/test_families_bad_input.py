"""Folders, files and settings that do not fit a family: one sentence, before any network is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_families import build_flux, build_sd, build_skyreels, build_wan, write_picture

from trainer.conditions import save_conditions
from trainer.config import ModelConfig, PromptsConfig, parse_config
from trainer.distributed import Processes
from trainer.errors import BadInput
from trainer.loop import Trainer
from trainer.models import Conditions, model_class
from trainer.models.diffusers_family import DiffusersModel
from trainer.prompting import training_prompts

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
        ("wan", "flux", {}, "holds a FluxPipeline, and family wan takes WanPipeline or WanImageToVideoPipeline"),
        ("sdxl", "sd", {}, "holds a StableDiffusionPipeline, and family sdxl takes StableDiffusionXLPipeline"),
        ("flux", "flux", {"width": 24}, None),
        ("flux", "flux", {"frames": 5}, "model.frames is 5: this model takes 1, an image"),
        ("wan", "wan", {"frames": 6}, "model.frames is 6: this model takes 1 more than a multiple of 4"),
        ("wan", "wan", {"height": 24}, "model.height is 24: this model takes multiples of 16"),
        ("wan", "wan", {"embedded_guidance": 3.0}, "model.embedded_guidance is 3.0: this model takes none"),
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
        (rename_class, "holds a ChromaTransformer2DModel, and family flux takes FluxTransformer2DModel"),
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


def test_zero_snr_and_unknown_predictions_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    file = folder / "scheduler" / "scheduler_config.json"
    plain = json.loads(file.read_text())
    for change, words in (({"prediction_type": "sample"}, "'sample'"), ({"rescale_betas_zero_snr": True}, "zero_snr")):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(BadInput, match=words):
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


def test_pictures_are_asked_for_and_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'a circle' has no image"):
        trainer({"family": "skyreels", "path": str(folders["skyreels"])}, {}, {"texts": ["a circle"]})
    write_picture(tmp_path / "a.png", 0)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a circle", "image": "a.png"}')
    with pytest.raises(BadInput, match="'a circle' has an image"):
        trainer({"family": "wan", "path": str(folders["wan"])}, {}, {"file": str(tmp_path / "p.jsonl")})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"embeds": torch.zeros(2, 3, 8), "pooled": torch.zeros(2, 16)}, "'embeds' are 8 wide, and .* takes 16"),
        ({"embeds": torch.zeros(2, 3, 16)}, "hold no 'pooled'"),
    ],
)
def test_conditions_of_another_model_are_refused(
    folders: dict[str, Path], tmp_path: Path, tensors: dict, words: str
) -> None:
    file = tmp_path / "conditions.safetensors"
    save_conditions(file, ["a circle", ""], Conditions(tensors))
    with pytest.raises(BadInput, match=words):
        trainer({"family": "flux", "path": str(folders["flux"])}, {}, {"texts": ["a circle"], "conditions": str(file)})


# ------------------------------------------------------------------------------------------------------- prompt files


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", 0)
    (tmp_path / "p.csv").write_text('prompt,image,category\n"a, b",a.png,x\nc,,\n')
    lines = [{"prompt": "a, b", "image": "a.png", "category": "x"}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = (training_prompts(PromptsConfig(file=str(tmp_path / f"p.{kind}"))) for kind in ("csv", "jsonl"))
    assert first == second
    assert (first.texts, first.categories, first.pictures) == (["a, b", "c"], ["x", ""], [tmp_path / "a.png", None])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "text\na\n", "has the columns text: it takes prompt"),
        ("p.csv", "prompt,image\na\n", "line 2 does not have 2 columns"),
        ("p.csv", 'prompt\n""\n', "'prompt' must be a text that is not empty"),
        ("p.csv", "prompt,image\na,b.png\n", "there is no image"),
        ("p.jsonl", '{"prompt": "a", "image": 3}', "'category' and 'image' texts"),
        ("p.csv", "prompt\na\na\n", "repeats the prompt 'a'"),
    ],
)
def test_faults_of_prompt_files_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as caught:
        training_prompts(PromptsConfig(file=str(tmp_path / name)))
    assert words in str(caught.value)
