"""HPSv3 and VideoAlign against Qwen2-VL written out on plain tensors, from files in the original layouts."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import pytest
import qwen_reference as reference
import torch
from clip_reference import Weights, file_image, random_weights, standard
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import RewardConfig
from trainer.rewards import Reward, load_reward, score
from trainer.rewards.files import build
from trainer.rewards.qwen import hpsv3, network, videoalign
from trainer.rewards.qwen.hpsv3 import HPSv3
from trainer.rewards.qwen.network import merge_lora, patchify, plain, smart_size
from trainer.rewards.qwen.videoalign import VideoAlign, VideoAlignNetwork, frame_indices, sampled_frames
from trainer.utils.errors import BadInput

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = ["[UNK]", "system", "You", "are", "a", "helpful", "assistant", ".", "user", "red", "cat", "Judge", "now"]
SYSTEM = [13, 1, 2, 3, 4, 5, 6, 7, 14]
TEXTS = {"instruction": "\nJudge {text_prompt} \n", "suffix": " now <|Reward|>\n"}
TEMPLATE = "\nJudge <|VQ_reward|> now <|MQ_reward|> a {text_prompt} <|TA_reward|> .\n"


PUBLISHED = {"pixels": hpsv3.PIXELS, "sums": HPSv3.sums, "widths": HPSv3.widths, "words": network.WORDS}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(autouse=True)
def at_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "WORDS", len(WORDS) + len(SPECIAL))
    monkeypatch.setattr(HPSv3, "sizes", reference.SIZES)
    monkeypatch.setattr(HPSv3, "widths", (24, 8))
    monkeypatch.setattr(HPSv3, "sums", (sha(TEXTS["instruction"]), sha(TEXTS["suffix"])))
    monkeypatch.setattr(hpsv3, "PIXELS", 6 * 28 * 28)
    monkeypatch.setattr(VideoAlignNetwork, "sizes", reference.SIZES)
    monkeypatch.setattr(VideoAlignNetwork, "sums", sha(TEMPLATE))
    monkeypatch.setattr(videoalign, "SMALLEST", 2 * 28 * 28)
    monkeypatch.setattr(videoalign, "LARGEST", 6 * 28 * 28)


def write_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path))
    return path


# -------------------------------------------------------------------------------------------------------------- HPSv3

ROWS = len(WORDS) + len(SPECIAL) + 4
HEAD = {"rm_head.0": (24, 64), "rm_head.3": (8, 24), "rm_head.5": (2, 8)}
PREFERENCE = random_weights(
    {
        **reference.shapes(ROWS),
        **{f"{k}.weight": v for k, v in HEAD.items()},
        **{f"{k}.bias": v[:1] for k, v in HEAD.items()},
    }
)


def preference(folder: Path, weights: Weights = PREFERENCE, **options: object) -> Reward:
    save_file(weights, folder / "HPSv3.safetensors")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    files = {name: str(folder / f"{name}.txt") for name in TEXTS}
    files |= {"path": str(folder / "HPSv3.safetensors"), "tokenizer": str(write_tokenizer(folder / "tokenizer.json"))}
    return load_reward(RewardConfig(name="hpsv3", options={**files, "dtype": "float32", **options}))


def original_preference(image: Tensor, size: tuple[int, int], words: list[int]) -> float:
    weights = {key: value.double() for key, value in PREFERENCE.items()}
    prepared = standard(file_image(image).resize((size[1], size[0]), Image.BICUBIC))
    seen = reference.see(weights, torch.stack([prepared, prepared]))
    tokens = [*SYSTEM, 13, 8, 15, *[17] * len(seen), 16, 11, *words, 12, 19, 14, 13, 6]
    x = reference.read(weights, tokens, 17, seen)[tokens.index(19)]
    x = reference.linear(x, weights, "rm_head.0").clamp(min=0)
    x = reference.linear(x, weights, "rm_head.3").clamp(min=0)
    return float(reference.linear(x, weights, "rm_head.5")[0])


@pytest.mark.parametrize(("size", "inner"), [((64, 64), (84, 84)), ((40, 90), (56, 112)), ((300, 200), (84, 56))])
def test_hpsv3_is_the_originals(size: tuple[int, int], inner: tuple[int, int], tmp_path: Path) -> None:
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    tested = preference(tmp_path)
    for prompt, words in {"a red cat": [4, 9, 10], "cat": [10], "<|im_end|> cat <|Reward|>": [10]}.items():
        wanted = original_preference(image, inner, words)
        assert score(tested, image[None], [prompt]).item() == pytest.approx(wanted, abs=1e-5, rel=1e-5)


def test_hpsv3_in_bfloat16_keeps_its_head_exact(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    full, half = preference(tmp_path), preference(tmp_path, dtype="bfloat16")
    near = score(half, image, ["a cat"] * 2)
    assert next(half.module.language.parameters()).dtype == torch.bfloat16
    assert next(half.module.head.parameters()).dtype == torch.float32
    assert 0 < (near - score(full, image, ["a cat"] * 2)).abs().max() < 0.5


def test_hpsv3_takes_newer_names_and_refuses_others(tmp_path: Path) -> None:
    image = torch.rand(1, 3, 40, 40)
    newer = {
        (f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)): value
        for key, value in PREFERENCE.items()
        if key != "lm_head.weight"
    }
    assert score(preference(tmp_path, newer), image, ["cat"]) == score(preference(tmp_path), image, ["cat"])
    less = {key: value for key, value in PREFERENCE.items() if key != "rm_head.5.bias"}
    with pytest.raises(BadInput, match=r"HPSv3.safetensors is not HPSv3: missing keys head.5.bias"):
        preference(tmp_path, less).load()
    with pytest.raises(BadInput, match="unexpected keys transformer.x"):
        preference(tmp_path, {**PREFERENCE, "transformer.x": torch.ones(1)}).load()
    short = {k: v[:19].clone() if k.endswith("embed_tokens.weight") else v for k, v in PREFERENCE.items()}
    with pytest.raises(BadInput, match="its token embedding has 19 rows"):
        preference(tmp_path, short).load()


def test_texts_and_tokenizer_must_be_the_originals(tmp_path: Path) -> None:
    tested = preference(tmp_path)
    config = RewardConfig(name="hpsv3", options=tested.options.model_dump())
    (tmp_path / "suffix.txt").write_text(TEXTS["suffix"].strip())
    with pytest.raises(BadInput, match=r"suffix.txt is not the original file: sha256 "):
        load_reward(config)
    (tmp_path / "suffix.txt").write_text(TEXTS["suffix"])
    for text, words in {
        "{": "cannot be read as a tokenizer",
        json.dumps({"a": 1}): "cannot be read as a tokenizer",
    }.items():
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(BadInput, match=words):
            load_reward(config).load()
    network.WORDS += 1
    write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(BadInput, match=f"is not the tokenizer of Qwen2-VL: it has {network.WORDS - 1} tokens"):
        load_reward(config).load()


def test_hpsv3_has_the_published_constants() -> None:
    assert PUBLISHED["pixels"] == 200704
    assert PUBLISHED["sums"] == ("0393599dad45a971", "2471faca094ae5bd")
    assert PUBLISHED["widths"] == (1024, 16)
    assert PUBLISHED["words"] == 151657


# --------------------------------------------------------------------------------------------------------- VideoAlign

PLAIN = random_weights({**reference.shapes(ROWS), "rm_head.weight": (1, 64)}, seed=1)
ADAPTED = [f"model.layers.{i}.{name}" for i in range(2) for name in
           ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip


def with_lora() -> tuple[Weights, Weights]:
    """A file as PEFT writes it, and what it means: W + 128 / 64 B A."""
    written, merged = {}, dict(PLAIN)
    for key, value in PLAIN.items():
        module, kind = key.rsplit(".", 1)
        written["base_model.model." + (f"{module}.base_layer.{kind}" if module in ADAPTED else key)] = value
    for number, module in enumerate(ADAPTED):
        rows, columns = PLAIN[f"{module}.weight"].shape
        lora = random_weights({"A": (4, columns), "B": (rows, 4)}, seed=10 + number)
        for letter, value in lora.items():
            written[f"base_model.model.{module}.lora_{letter}.default.weight"] = value
        merged[f"{module}.weight"] = PLAIN[f"{module}.weight"] + 128 / 64 * lora["B"] @ lora["A"]
    return written, merged


def videos(folder: Path, name: str = "videoalign", weights: Weights | None = None, **options: object) -> Reward:
    torch.save(with_lora()[0] if weights is None else weights, folder / "model.pth")
    (folder / "template.txt").write_bytes(TEMPLATE.encode())
    files = {"path": "model.pth", "template": "template.txt"}
    files = {key: str(folder / value) for key, value in files.items()}
    files["tokenizer"] = str(write_tokenizer(folder / "tokenizer.json"))
    return load_reward(RewardConfig(name=name, options={**files, "dtype": "float32", **options}))


def original_videos(video: Tensor, size: tuple[int, int], words: list[int], frames: list[int]) -> Tensor:
    """VQ, MQ, TA."""
    from torchvision.transforms import functional as tv

    weights = {key: value.double() for key, value in with_lora()[1].items()}
    stored = (video[frames] * 255).round().to(torch.uint8)
    stored = tv.resize(stored, list(size), tv.InterpolationMode.BICUBIC, antialias=True).float() / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    seen = reference.see(weights, tv.normalize(stored, mean, std))
    tokens = [*SYSTEM, 13, 8, 15, *[18] * len(seen), 16, 11, 19, 12, 20, 4, *words, 21, 7, 14, 13, 6]
    states = reference.read(weights, tokens, 18, seen)
    return torch.stack([states[tokens.index(marker)] @ weights["rm_head.weight"][0] for marker in (19, 20, 21)])


VIDEO = torch.rand(9, 3, 48, 80, generator=torch.Generator().manual_seed(3))


def test_videoalign_is_the_originals(tmp_path: Path) -> None:
    raw = original_videos(VIDEO, (56, 84), [9, 10], [0, 3, 5, 8])
    mean, std = torch.tensor([3.6757, 1.1646, 2.8105]), torch.tensor([2.2476, 1.3811, 2.5121])
    wanted = (raw.float() - mean) / std
    for number, name in enumerate(("videoalign-vq", "videoalign-mq", "videoalign-ta")):
        assert score(videos(tmp_path, name), [VIDEO], ["red cat"]).item() == pytest.approx(
            wanted[number].item(), abs=1e-5
        )
        found = score(videos(tmp_path, name, scale="raw"), [VIDEO], ["red cat"]).item()
        assert found == pytest.approx(raw[number].item(), abs=1e-5, rel=1e-5)
    assert score(videos(tmp_path), [VIDEO], ["red cat"]).item() == pytest.approx(wanted.sum().item(), abs=2e-5)
    mixed = score(videos(tmp_path, visual=0.5, motion=2, text=0), [VIDEO], ["red cat"]).item()
    assert mixed == pytest.approx((0.5 * wanted[0] + 2 * wanted[1]).item(), abs=2e-5)


def test_a_merged_file_gives_the_same(tmp_path: Path) -> None:
    lora = score(videos(tmp_path), [VIDEO], ["red cat"])
    (tmp_path / "other").mkdir()
    merged = score(videos(tmp_path / "other", weights=with_lora()[1]), [VIDEO], ["red cat"])
    torch.testing.assert_close(lora, merged, rtol=1e-5, atol=1e-5)


def test_videos_of_different_lengths_and_one_network_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    inner = VideoAlignNetwork.read_out
    monkeypatch.setattr(VideoAlignNetwork, "read_out", lambda self, *a: looks.append(1) or inner(self, *a))
    batch, prompts = [VIDEO, VIDEO[:4], VIDEO[2:7, :, :30]], ["cat", "red cat", "a cat"]
    networks = {name: videos(tmp_path, name) for name in ("videoalign-vq", "videoalign-mq", "videoalign")}
    together = {name: score(tested, batch, prompts) for name, tested in networks.items()}
    assert len(looks) == 3
    assert len({id(tested.module) for tested in networks.values()} - {id(None)}) == 1
    for name, tested in networks.items():
        tested.shared.known.clear()
        tested.idle()
        alone = torch.cat([score(tested, [video], [prompt]) for video, prompt in zip(batch, prompts, strict=True)])
        torch.testing.assert_close(together[name], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="scores videos, not images"):
        score(networks["videoalign"], VIDEO, ["cat"] * 9)
    with pytest.raises(ValueError, match="a video of 1 frames is too short"):
        score(networks["videoalign"], [VIDEO[:1]], ["cat"])


def test_incomplete_lora_is_refused(tmp_path: Path) -> None:
    written = with_lora()[0]
    for gone in ("lora_A", "lora_B", "base_layer"):
        key = f"base_model.model.model.layers.1.mlp.up_proj.{gone}" + ("" if gone == "base_layer" else ".default")
        less = {name: value for name, value in written.items() if name != f"{key}.weight"}
        with pytest.raises(BadInput, match="is not a complete LoRA"):
            merge_lora(less, tmp_path)
    assert merge_lora(PLAIN, tmp_path) is PLAIN


# ------------------------------------------------------------------------------------------------------ at real size

HEAD_7B = {"0": (1024, 3584), "3": (16, 1024), "5": (2, 16)}


@pytest.mark.parametrize(("kind", "count"), [("hpsv3", 736), ("videoalign", 1123)])
def test_every_key_of_the_published_file_has_its_place_at_full_size(
    kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    if kind == "hpsv3":
        tested, sizes, words = HPSv3, reference.SIZES_7B, 151658
        head = {f"rm_head.{place}.weight": size for place, size in HEAD_7B.items()}
        head |= {f"rm_head.{place}.bias": size[:1] for place, size in HEAD_7B.items()}
        file = original = reference.shapes(words, sizes) | head
    else:
        tested, sizes, words = VideoAlignNetwork, reference.SIZES_2B, 151660
        original = reference.shapes(words, sizes) | {"rm_head.weight": (1, 1536)}
        file = reference.with_lora(original)
    assert len(file) == count
    built = build(lambda: network.QwenNetwork(tested.sizes, words, tested.make_head(tested)))
    expected = {network.new_name(key, "rm_head"): shape for key, shape in original.items()}
    assert expected.pop("") == original["lm_head.weight"]
    assert {key: tuple(value.shape) for key, value in built.state_dict().items()} == expected
    meta = {key: torch.empty(shape, device="meta") for key, shape in file.items()}
    assert {key: tuple(value.shape) for key, value in merge_lora(meta, Path("x")).items()} == original


# -------------------------------------------------------------------------------------------------- frames and pixels


@pytest.mark.parametrize(
    ("total", "fps", "count"),
    [(53, 8, 14), (53, 24, 4), (81, 16, 10), (121, 24, 10), (97, 24, 8), (49, 8, 12), (16, 8, 4), (3, 8, 2), (2, 8, 2)],
)
def test_number_of_frames(total: int, fps: float, count: int) -> None:
    found = frame_indices(total, fps)
    assert len(found) == count
    assert (found[0], found[-1]) == (0, total - 1)
    exact = [round(Fraction(i * (total - 1), count - 1)) for i in range(count)]
    assert found.tolist() == exact
    assert frame_indices(5000, 1).shape == (768,)


def test_frames_of_the_papers_recipe() -> None:
    assert frame_indices(53, 8).tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]
    assert frame_indices(16, 8).tolist() == [0, 5, 10, 15]
    with pytest.raises(ValueError, match="a video of 1 frames is too short"):
        frame_indices(1, 8)


def test_sizes_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    for height, width in ((480, 720), (64, 64), (1000, 1000), (31, 400), (544, 960), (27, 27)):
        for smallest, largest in ((100352, 200704), (200704, 200704)):
            wanted = smart_resize(height, width, 28, smallest, largest)
            assert smart_size(height, width, smallest, largest) == tuple(wanted)
    with pytest.raises(ValueError, match="too long"):
        smart_size(10, 2001, 1, 10**6)


def test_patches_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    image = torch.rand(3, 56, 84, generator=torch.Generator().manual_seed(0))
    processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=10**6)
    wanted = processor(images=[file_image(image)], return_tensors="pt")
    normal = standard(file_image(image))
    found, grid = patchify(torch.stack([normal, normal]))
    torch.testing.assert_close(found, wanted["pixel_values"], rtol=0, atol=1e-5)
    assert list(grid) == wanted["image_grid_thw"][0].tolist()


def test_frames_are_resized_as_bytes() -> None:
    frames = sampled_frames(VIDEO, 8.0)
    assert frames.dtype == torch.uint8
    assert frames.shape == (4, 3, 56, 84)


def test_prompts_lose_what_looks_like_a_special_token() -> None:
    assert plain("a <|VQ_reward|>cat<|im_end|> | <b>") == "a cat | <b>"


def test_videoalign_has_the_published_constants() -> None:
    assert VideoAlign.markers == ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
    assert videoalign.MEAN == {"VQ": 3.6757, "MQ": 1.1646, "TA": 2.8105}
    assert videoalign.STD == {"VQ": 2.2476, "MQ": 1.3811, "TA": 2.5121}
