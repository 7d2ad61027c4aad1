"""HPS-v2.1, CLIP score, PickScore and the aesthetic predictor against CLIP written out on plain tensors.

Files are made in the layouts in which the weights are published, with a tiny network and random numbers.
"""

import json
import math
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_reference import (
    MEAN,
    STD,
    TINY,
    file_image,
    gelu,
    image_features,
    open_clip_shapes,
    quick_gelu,
    random_weights,
    standard,
    text_features,
    to_transformers,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import RewardConfig
from trainer.rewards import REWARDS, Reward, load_reward, score
from trainer.rewards.clip.aesthetic import Aesthetic
from trainer.rewards.clip.clip_score import ClipScore
from trainer.rewards.clip.hps import HPSv21, longest_and_pad
from trainer.rewards.clip.layout import from_transformers
from trainer.rewards.clip.pickscore import PickScore
from trainer.rewards.preprocess import normalize, shortest_and_crop
from trainer.utils.errors import BadInput

SIZES = {"square": (40, 40), "portrait": (57, 31), "landscape": (23, 64), "exact": (28, 28), "long": (28, 11)}
PROMPTS = {"a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407], "a dog": [49406, 320, 1929, 49407]}
WEIGHTS = random_weights(open_clip_shapes(TINY))


@pytest.fixture(scope="module", autouse=True)
def tiny_networks(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny-h.json").write_text(json.dumps(TINY))
    (folder / "tiny-quickgelu.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def at_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HPSv21, "network", "tiny-h")
    monkeypatch.setattr(PickScore, "network", "tiny-h")
    monkeypatch.setattr(Aesthetic, "network", "tiny-quickgelu")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def make_image(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Smooth and rough parts, `[3, H, W]`."""
    generator = torch.Generator().manual_seed(seed)
    rough, coarse = torch.rand(3, *size, generator=generator), torch.rand(1, 3, 3, 3, generator=generator)
    return 0.5 * rough + 0.5 * torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0]


def reward(name: str, **options: object) -> Reward:
    return load_reward(RewardConfig(name=name, options=options))


def hps(tmp_path: Path) -> Reward:
    torch.save({"state_dict": {key: value.half() for key, value in WEIGHTS.items()}}, tmp_path / "HPS.pt")
    return reward("hps-v2.1", path=str(tmp_path / "HPS.pt"))


def clip(tmp_path: Path, **preparation: object) -> Reward:
    folder = tmp_path / "clip"
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": {**TINY, "quick_gelu": True}, "preprocess_cfg": {"resize_mode": "squash", **preparation}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(WEIGHTS, folder / "open_clip_pytorch_model.bin")
    return reward("clip", path=str(folder))


def pickscore(tmp_path: Path, **options: object) -> Reward:
    positions = {f"{side}_model.embeddings.position_ids": torch.arange(5)[None] for side in ("text", "vision")}
    save_file({**to_transformers(WEIGHTS), **positions}, tmp_path / "model.safetensors")
    return reward("pickscore", path=str(tmp_path / "model.safetensors"), **options)


HEAD = random_weights(
    {
        f"layers.{place}.{kind}": shape
        for place, rows, columns in ((0, 1024, 20), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16))
        for kind, shape in (("weight", (rows, columns)), ("bias", (rows,)))
    },
    seed=1,
)


def aesthetic(tmp_path: Path) -> Reward:
    torch.save(HEAD, tmp_path / "sac+logos+ava1-l14-linearMSE.pth", _use_new_zipfile_serialization=False)
    vision = {key: value for key, value in to_transformers(WEIGHTS).items() if key.startswith("vis")}
    save_file(vision, tmp_path / "clip.safetensors")
    path, tower = tmp_path / "sac+logos+ava1-l14-linearMSE.pth", tmp_path / "clip.safetensors"
    return reward("aesthetic", path=str(path), tower=str(tower))


ALL = {"hps-v2.1": hps, "clip": clip, "pickscore": pickscore, "aesthetic": aesthetic}


# ------------------------------------------------------------------------------------------------- preparing an image


def torchvision_longest(image: Tensor, size: int) -> Tensor:
    """HPSv2: ToTensor, longest side, zero pad, normalise."""
    from torchvision.transforms import functional as tv

    x = tv.to_tensor(file_image(image))
    scale = size / max(x.shape[1:])
    x = tv.resize(
        x, [round(x.shape[1] * scale), round(x.shape[2] * scale)], tv.InterpolationMode.BICUBIC, antialias=True
    )
    high, wide = size - x.shape[1], size - x.shape[2]
    x = tv.pad(x, [wide // 2, high // 2, wide - wide // 2, high - high // 2], 0)
    return tv.normalize(x, MEAN.tolist(), STD.tolist())


def pillow_shortest(image: Tensor, size: int, margin: object) -> Tensor:
    file = file_image(image)
    width, height = file.size
    if width <= height:
        file = file.resize((size, int(size * height / width)), Image.BICUBIC)
    else:
        file = file.resize((int(size * width / height), size), Image.BICUBIC)
    left, top = margin(file.width - size), margin(file.height - size)
    return standard(file.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_hps_preparation_is_bit_exact(size: tuple[int, int]) -> None:
    image = make_image(size)
    found = normalize(longest_and_pad((image * 255).round()[None] / 255, 28))[0]
    assert torch.equal(found, torchvision_longest(image, 28))
    if size[0] != size[1]:
        assert found.abs().amax() > 1.7  # the bars: black before normalising


@pytest.mark.parametrize("crop", ["torchvision", "transformers"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_crop_is_that_of_the_library_the_model_came_with(size: tuple[int, int], crop: str) -> None:
    from torchvision.transforms import functional as tv

    image = make_image(size)
    margin = {"torchvision": lambda excess: int(round(excess / 2.0)), "transformers": lambda excess: excess // 2}[crop]
    found = normalize(shortest_and_crop(image[None], 28, crop))[0]
    torch.testing.assert_close(found, pillow_shortest(image, 28, margin), rtol=0, atol=1e-6)
    # With a gradient: Pillow rounds twice to 256 values, and cuts off what the filter overshoots.
    smooth = torch.nn.functional.avg_pool2d(image[None], 3, 1, 1).clamp(0.05, 0.95)
    wanted, found = (shortest_and_crop(x, 28, crop) for x in (smooth, smooth.clone().requires_grad_()))
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=2 / 255)
    if crop == "torchvision":
        file = tv.center_crop(tv.resize(file_image(image), 28, tv.InterpolationMode.BICUBIC), 28)
        assert torch.equal(shortest_and_crop(image[None], 28)[0], tv.to_tensor(file))


# ------------------------------------------------------------------------------------------------------- their scores


def expected(name: str, image: Tensor, prompt: str) -> float:
    """The score by the reference."""
    tokens = PROMPTS[prompt]
    if name == "hps-v2.1":
        weights = {key: value.half() for key, value in WEIGHTS.items()}
        return float(image_features(weights, torchvision_longest(image, 28)) @ text_features(weights, tokens))
    if name == "clip":
        pixels = standard(file_image(image).resize((28, 28), Image.BICUBIC))
        return float(image_features(WEIGHTS, pixels, act=quick_gelu) @ text_features(WEIGHTS, tokens, act=quick_gelu))
    if name == "pickscore":
        pixels = pillow_shortest(image, 28, lambda excess: excess // 2)
        return float(image_features(WEIGHTS, pixels, act=gelu) @ text_features(WEIGHTS, tokens, act=gelu))
    x = image_features(WEIGHTS, pillow_shortest(image, 28, lambda excess: round(excess / 2)), act=quick_gelu)
    for place in (0, 2, 4, 6, 7):
        x = HEAD[f"layers.{place}.weight"].double() @ x + HEAD[f"layers.{place}.bias"].double()
    return float(x)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ALL)
def test_score_is_the_references(name: str, size: tuple[int, int], tmp_path: Path, no_network: None) -> None:
    tested, image = ALL[name](tmp_path), make_image(size)
    for prompt in PROMPTS:
        wanted = expected(name, image, prompt)
        assert score(tested, image[None], [prompt]).item() == pytest.approx(wanted, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_equals_singles_and_an_idle_reward_can_go_on(name: str, tmp_path: Path) -> None:
    tested = ALL[name](tmp_path)
    images = torch.stack([make_image((40, 30), seed) for seed in range(37)])
    prompts = [list(PROMPTS)[i % 2] for i in range(37)]
    together = score(tested, images, prompts)
    tested.idle()
    alone = torch.cat([score(tested, images[i : i + 1], prompts[i : i + 1]) for i in range(37)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.unique().numel() > 30
    assert score(tested, images[:0], []).shape == (0,)


@pytest.mark.parametrize("name", ALL)
def test_grey_and_transparent_images(name: str, tmp_path: Path) -> None:
    tested, image = ALL[name](tmp_path), make_image((30, 40))[None]
    grey, opaque = image[:, :1], torch.cat([image, torch.ones_like(image[:, :1])], 1)
    assert score(tested, grey, ["a dog"]) == score(tested, grey.repeat(1, 3, 1, 1), ["a dog"])
    assert score(tested, opaque, ["a dog"]) == score(tested, image, ["a dog"])
    clear = torch.cat([image, torch.zeros_like(image[:, :1])], 1)
    assert score(tested, clear, ["a dog"]) == score(tested, torch.ones_like(image), ["a dog"])
    with pytest.raises(ValueError, match=r"images of shape \(1, 2, 30, 40\) are not"):
        score(tested, image[:, :2], ["a dog"])


@pytest.mark.parametrize("name", ["hps-v2.1", "clip", "pickscore"])
def test_a_long_prompt_is_cut_and_reported_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tested, image = ALL[name](tmp_path), make_image((28, 28))[None]
    long, longer = "dog " * 80, "dog " * 100
    assert score(tested, image, [long]) == score(tested, image, [longer])
    score(tested, image, [long])
    words = capsys.readouterr().err
    assert words.count("82 tokens, of which the reward model reads 77") == 1
    assert words.count("warning") == 2
    score(tested, image, ["dog " * 75])  # just fits
    assert capsys.readouterr().err == ""


def test_pickscore_official_scale(tmp_path: Path) -> None:
    image = make_image((28, 28))[None]
    cosine, official = (score(pickscore(tmp_path, scale=scale), image, ["a dog"]) for scale in ("cosine", "official"))
    torch.testing.assert_close(official, cosine * math.exp(WEIGHTS["logit_scale"].item()))


def test_half_precision_is_near(tmp_path: Path) -> None:
    image = make_image((28, 28))[None]
    full = score(pickscore(tmp_path), image, ["a dog"])
    for dtype in ("bfloat16", "float16"):
        tested = pickscore(tmp_path, dtype=dtype)
        half = score(tested, image, ["a dog"])
        assert next(tested.module.parameters()).dtype == getattr(torch, dtype)
        assert half.dtype == torch.float32
        assert 0 < abs(half - full) < 0.05


# --------------------------------------------------------------------------------------------------------- the tokens

SPECIAL = {
    "cat’s": [49406, 2368, 728, 503, 338, 49407],  # a curly quote stays one
    "cat's": [49406, 2368, 568, 49407],
    "A  Photo\tof\n\nCATS ": [49406, 320, 1125, 539, 3989, 49407],
}


def test_pickscore_cleans_prompts_as_transformers_does(tmp_path: Path) -> None:
    tested = pickscore(tmp_path)
    for prompt, wanted in SPECIAL.items():
        assert tested.tokens([prompt])[0].tolist() == wanted + [0] * (77 - len(wanted)), prompt
    (entity,) = tested.tokens(["salt &amp; pepper"]).tolist()
    begin = entity.index(261)
    assert (entity[0], entity[begin : begin + 4]) == (49406, [261, 6259, 282, 8253])
    assert entity[begin + 4 :] == [49407] + [0] * (77 - begin - 5)
    (composed,), (decomposed,) = tested.tokens(["caf\u00e9"]).tolist(), tested.tokens(["cafe\u0301"]).tolist()
    assert composed == decomposed


def test_pickscore_tokens_are_those_of_transformers_own_tokenizer(tmp_path: Path) -> None:
    """Built from the vocabulary that open_clip carries."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizerFast

    plain = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in plain.encoder.items()}
    merges = [f"{first} {second}" for first, second in plain.bpe_ranks]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    theirs = CLIPTokenizerFast(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    tested = pickscore(tmp_path)
    prompts = [*SPECIAL, "salt &amp; pepper", "“quoted”… text—with dashes", "naïve CAFÉ", "日本の猫 🦊🦊", "l'été d’or",
               "100,000 km/h", "it’s we're I'd", "&lt;b&gt;", "Ⅷ ½ ²", "dog " * 90]  # fmt: skip
    for prompt in prompts:
        wanted = theirs(prompt, truncation=True, max_length=77).input_ids
        assert tested.tokens([prompt])[0, : len(wanted)].tolist() == wanted, prompt


def test_other_rewards_clean_prompts_as_open_clip_does(tmp_path: Path) -> None:
    for tested in (hps(tmp_path), clip(tmp_path)):
        assert torch.equal(tested.tokens(["salt &amp; pepper"]), tested.tokens(["salt & pepper"]))
        assert torch.equal(tested.tokens(["cat’s"]), tested.tokens(["cat's"]))


def test_clip_cleans_prompts_as_its_folder_says(tmp_path: Path) -> None:
    plain = clip(tmp_path)
    folder = tmp_path / "clip"
    config = json.loads((folder / "open_clip_config.json").read_text())

    def cleaned(**settings: object) -> Reward:
        text = {**TINY["text_cfg"], "tokenizer_kwargs": settings}
        changed = {**config, "model_cfg": {**config["model_cfg"], "text_cfg": text}}
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        return reward("clip", path=str(folder))

    wanted = plain.tokens(["a cat"])
    assert torch.equal(cleaned(clean="canonicalize").tokens(["A_cat!?"]), wanted)
    assert not torch.equal(plain.tokens(["A_cat!?"]), wanted)
    with pytest.raises(BadInput, match="tokenizer settings .*clean.*magic.* are unknown"):
        cleaned(clean="magic")


# ---------------------------------------------------------------------------------------------------------- the files


def test_every_key_of_a_transformers_file_has_its_place() -> None:
    for config in (TINY, open_clip.get_model_config("ViT-H-14"), open_clip.get_model_config("ViT-L-14")):
        original = {key: torch.empty(shape, device="meta") for key, shape in open_clip_shapes(config).items()}
        found = from_transformers(to_transformers(original), Path("x"), "CLIP")
        assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in original.items()}
    assert len(open_clip_shapes(open_clip.get_model_config("ViT-H-14"))) == 686


def test_transformers_and_open_clip_agree_on_the_layout(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config={"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 128,
                       "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"},
        text_config={"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "hidden_act": "gelu", "eos_token_id": 2},
        projection_dim=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    tested, image = reward("pickscore", path=str(tmp_path / "model.safetensors")), make_image((28, 28))
    tokens = torch.tensor([PROMPTS["a dog"] + [49407] * 73])
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=standard(file_image(image))[None])
    wanted = (out.image_embeds * out.text_embeds).sum(-1)
    torch.testing.assert_close(score(tested, image[None], ["a dog"]), wanted, rtol=1e-5, atol=1e-6)


def test_other_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    wider = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "layers": 3}}
    for shapes, words in {
        "missing keys visual.proj": {k: v for k, v in open_clip_shapes(TINY).items() if k != "visual.proj"},
        "unexpected keys": open_clip_shapes(wider),
        "has the shape": open_clip_shapes({**TINY, "embed_dim": 21}),
    }.items():
        torch.save(random_weights(words), tmp_path / "HPS.pt")
        with pytest.raises(BadInput, match=f"HPS.pt is not HPS-v2.1, a CLIP tiny-h: .*{shapes}"):
            reward("hps-v2.1", path=str(tmp_path / "HPS.pt")).load()
    save_file(random_weights(open_clip_shapes(TINY)), tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="is not PickScore.*: unexpected keys"):
        reward("pickscore", path=str(tmp_path / "model.safetensors")).load()
    tested = aesthetic(tmp_path)
    save_file(to_transformers(WEIGHTS), tmp_path / "clip.safetensors")
    tested.load()  # a file with both towers
    with pytest.raises(BadInput, match="is not OpenAI's CLIP"):
        reward("aesthetic", path=str(tmp_path / "clip.safetensors"), tower=str(tmp_path / "HPS.pt")).load()


def test_clip_from_one_file_needs_its_architecture(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "weights.bin")
    image = make_image((40, 30))
    tested = reward("clip", path=str(tmp_path / "weights.bin"), architecture="tiny-h", resize="shortest")
    pixels = pillow_shortest(image, 28, lambda excess: round(excess / 2))
    wanted = float(image_features(WEIGHTS, pixels) @ text_features(WEIGHTS, PROMPTS["a dog"]))
    assert score(tested, image[None], ["a dog"]).item() == pytest.approx(wanted, abs=1e-5)
    for architecture in ("", "ViT-X-99"):
        with pytest.raises(BadInput, match=f"architecture is '{architecture}', but path .*weights.bin' is one file"):
            reward("clip", path=str(tmp_path / "weights.bin"), architecture=architecture)


def test_numbers_beside_the_weights_are_ignored(tmp_path: Path) -> None:
    """OpenAI's own state dicts hold them."""
    image, tested = make_image((40, 30))[None], clip(tmp_path)
    wanted = score(tested, image, ["a dog"])
    numbers = {key: torch.tensor(77) for key in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**WEIGHTS, **numbers}, tmp_path / "clip" / "open_clip_pytorch_model.bin")
    assert score(reward("clip", path=str(tmp_path / "clip")), image, ["a dog"]) == wanted


def test_a_tower_of_timm_does_not_fetch_weights(tmp_path: Path, no_network: None) -> None:
    clip(tmp_path)
    folder = tmp_path / "clip"
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {"timm_model_name": "resnet18", "timm_model_pretrained": True,
                                         "timm_pool": "", "timm_proj": "linear", "image_size": 28}  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"open_clip_pytorch_model.bin is not the CLIP model of its configuration"):
        reward("clip", path=str(folder)).load()


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("size", [*SIZES.values(), (3, 400), (1, 1)])
def test_clip_prepares_images_with_a_gradient_as_others(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    tested = clip(tmp_path, resize_mode=mode)
    tested.load()
    image = torch.nn.functional.avg_pool2d(make_image(size)[None], 3, 1, 1)
    wanted = tested.pixels(image)
    found = tested.pixels(image.clone().requires_grad_())
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=0.04)


def test_clip_prepares_images_as_its_folder_says(tmp_path: Path) -> None:
    image = make_image((40, 20))
    wide = clip(tmp_path, resize_mode="longest", mean=[0.5] * 3, std=[0.5] * 3)
    wide.load()
    file = file_image(image).resize((14, 28), Image.BICUBIC)
    array = np.zeros((28, 28, 3))
    array[:, 7:21] = np.asarray(file) / 255
    wanted = torch.from_numpy(array.transpose(2, 0, 1)).float() * 2 - 1
    torch.testing.assert_close(wide.pixels(image[None])[0], wanted, rtol=0, atol=1e-6)


def test_known_weights_in_one_file_are_prepared_as_published(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "dfn.bin")
    options = {"path": str(tmp_path / "dfn.bin"), "architecture": "ViT-H-14-378-quickgelu"}
    assert reward("clip", **options).preparation["resize_mode"] == "squash"
    assert reward("clip", **options, resize="shortest").preparation["resize_mode"] == "shortest"


def test_a_folder_that_is_no_open_clip_model_is_bad_input(tmp_path: Path) -> None:
    clip(tmp_path)
    folder = tmp_path / "clip"
    config = json.loads((folder / "open_clip_config.json").read_text())
    for text, words in {
        "{": "cannot be read as an open_clip configuration",
        "[]": "cannot be read as an open_clip configuration",
        "[" * 10**5: "cannot be read as an open_clip configuration",
        json.dumps({"model_cfg": {}}): "does not describe a CLIP model",
        json.dumps({"model_cfg": {**config["model_cfg"], "text_cfg": {"hf_model_name": "x"}}}): "is not CLIP's own",
    }.items():
        (folder / "open_clip_config.json").write_text(text)
        with pytest.raises(BadInput, match=words):
            reward("clip", path=str(folder))
    for change in ({"unknown": 1}, {"embed_dim": "x"}, {"vision_cfg": {"layers": -1, "width": "x"}}):
        changed = {**config, "model_cfg": {**config["model_cfg"], **change}}
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(BadInput, match="open_clip refuses the configuration of"):
            reward("clip", path=str(folder)).load()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(BadInput, match=r"has no open_clip_pytorch_model\.bin"):
        reward("clip", path=str(folder))


def test_every_reward_of_this_page_is_registered() -> None:
    assert [REWARDS[name] for name in ALL] == [HPSv21, ClipScore, PickScore, Aesthetic]
