"""ImageReward against BLIP and BERT written out on plain tensors, from a file in the original layout."""

from pathlib import Path

import pytest
import torch
from clip_reference import Weights, attention, file_image, gelu, layer_norm, patches, random_weights
from imagereward_reference import LAYERS, PUBLISHED, TEXT, WIDTH, shapes
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import RewardConfig
from trainer.rewards import Reward, load_reward, score
from trainer.rewards.image_reward import ImageReward, new_name
from trainer.utils.errors import BadInput

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "##s", ",", "dog"]
SIZE, HEADS = 224, 2
PROMPTS = {
    "A red cat": [2, 5, 7, 6, 3],
    "dogs, cats": [2, 10, 8, 9, 6, 8, 3],
    "zebra": [2, 1, 3],
    "cat " * 40: [2, *[6] * 33, 3],
}


WEIGHTS = random_weights(shapes())


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def original(image: Tensor, numbers: list[int]) -> float:
    """Score by the original computation, in float64; padding is left out, as the mask does."""
    from torchvision.transforms import functional as tv

    weights = {key: value.double() for key, value in WEIGHTS.items()}
    file = tv.center_crop(tv.resize(file_image(image), SIZE, tv.InterpolationMode.BICUBIC), SIZE)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = tv.normalize(tv.to_tensor(file), mean, std).double()
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    x = patches(pixels, 16) @ weights[f"{vision}patch_embed.proj.weight"].flatten(1).T
    x = x + weights[f"{vision}patch_embed.proj.bias"]
    x = torch.cat([weights[f"{vision}cls_token"][0], x]) + weights[f"{vision}pos_embed"][0]
    for i in range(LAYERS):
        block = f"{vision}blocks.{i}."
        y = linear(layer_norm(x, weights, f"{block}norm1", 1e-6), weights, f"{block}attn.qkv")
        x = x + linear(attention(*y.chunk(3, -1), HEADS), weights, f"{block}attn.proj")
        y = gelu(linear(layer_norm(x, weights, f"{block}norm2", 1e-6), weights, f"{block}mlp.fc1"))
        x = x + linear(y, weights, f"{block}mlp.fc2")
    seen = layer_norm(x, weights, f"{vision}norm", 1e-6)

    x = weights[f"{text}embeddings.word_embeddings.weight"][numbers]
    x = x + weights[f"{text}embeddings.position_embeddings.weight"][: len(numbers)]
    x = layer_norm(x, weights, f"{text}embeddings.LayerNorm", 1e-12)
    for i in range(LAYERS):
        layer = f"{text}encoder.layer.{i}."
        for kind, source in (("attention", None), ("crossattention", seen)):
            q = linear(x, weights, f"{layer}{kind}.self.query")
            k, v = (
                linear(x if source is None else source, weights, f"{layer}{kind}.self.{p}") for p in ("key", "value")
            )
            y = linear(attention(q, k, v, HEADS), weights, f"{layer}{kind}.output.dense")
            x = layer_norm(x + y, weights, f"{layer}{kind}.output.LayerNorm", 1e-12)
        y = linear(gelu(linear(x, weights, f"{layer}intermediate.dense")), weights, f"{layer}output.dense")
        x = layer_norm(x + y, weights, f"{layer}output.LayerNorm", 1e-12)
    x = x[0]
    for place in (0, 2, 4, 6, 7):
        x = linear(x, weights, f"mlp.layers.{place}")
    return (float(x) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(autouse=True)
def at_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    monkeypatch.setattr(ImageReward, "vision", {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, **sizes})
    text = {"vocab_size": len(WORDS) + 2, "hidden_size": TEXT, "intermediate_size": 40, **sizes}
    monkeypatch.setattr(ImageReward, "text", text)


def reward(folder: Path, weights: Weights = WEIGHTS, words: list[str] = WORDS) -> Reward:
    positions = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({**weights, **positions}, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    options = {"path": str(folder / "ImageReward.pt"), "vocabulary": str(folder / "vocab.txt")}
    return load_reward(RewardConfig(name="imagereward", options=options))


def make_images(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(256, 256), (300, 225), (64, 97)])
def test_score_is_the_originals(size: tuple[int, int], tmp_path: Path) -> None:
    tested, image = reward(tmp_path), make_images(1, *size)
    for prompt, numbers in PROMPTS.items():
        assert score(tested, image, [prompt]).item() == pytest.approx(original(image[0], numbers), abs=1e-5, rel=1e-5)


def test_a_batch_of_different_prompts_equals_singles(tmp_path: Path) -> None:
    tested, images = reward(tmp_path), make_images(4, 40, 60)
    together = score(tested, images, list(PROMPTS))
    alone = torch.cat([score(tested, images[i : i + 1], [prompt]) for i, prompt in enumerate(PROMPTS)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.unique().numel() == 4


def test_a_long_prompt_is_cut_and_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tested, images = reward(tmp_path), make_images(2, 30, 30)
    found = [score(tested, images, [text] * 2) for text in ("cat " * 33, "cat " * 34, "cat " * 90)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    words = capsys.readouterr().err.splitlines()
    assert [line.split(" has ")[1][:9] for line in words] == ["36 tokens", "92 tokens"]


def test_the_state_dict_that_the_original_class_writes_gives_the_same_scores(tmp_path: Path) -> None:
    """Its BLIP has two projections for contrastive training; scoring does not use them."""
    image, prompt = make_images(1, 40, 60), next(iter(PROMPTS))
    wanted = score(reward(tmp_path), image, [prompt])
    heads = {f"blip.{side}_proj.{kind}": torch.rand(size) for side, width in (("vision", 16), ("text", 24))
             for kind, size in (("weight", (256, width)), ("bias", (256,)))}  # fmt: skip
    assert torch.equal(score(reward(tmp_path, {**WEIGHTS, **heads}), image, [prompt]), wanted)
    for stranger in ("blip.itm_head.weight", "blip.vision_proj.scale", "vision_proj.weight"):
        with pytest.raises(BadInput, match=f"ImageReward v1.0: unexpected keys {stranger}"):
            reward(tmp_path, {**WEIGHTS, stranger: torch.ones(1)}).load()


def test_every_key_of_the_original_has_its_place() -> None:
    assert all(new_name(key) for key in shapes())
    assert len({new_name(key) for key in shapes()}) == len(shapes())
    for stranger in (
        "blip.visual_encoder.blocks.0.attn.bias",
        "visual.proj",
        "blip.tokenizer.weight",
        "blocks.0.norm1",
    ):
        assert new_name(stranger) is None


def test_full_size_network_has_a_place_for_every_tensor_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from trainer.rewards.files import build

    network = build(lambda: ImageReward._network(ImageReward))
    expected = {new_name(key): shape for key, shape in shapes(**PUBLISHED).items()}
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"vocab.txt is not the vocabulary of bert-base-uncased: 10 words, expected 11"):
        reward(tmp_path, words=WORDS[:-1]).load()
    with pytest.raises(BadInput, match=r"vocab.txt is not the vocabulary"):
        reward(tmp_path, words=["x" * i for i in range(1, 12)]).load()
    less = {key: value for key, value in WEIGHTS.items() if key != "mlp.layers.7.bias"}
    with pytest.raises(BadInput, match=r"ImageReward.pt is not ImageReward v1.0: missing keys mlp.layers.7.bias"):
        reward(tmp_path, less).load()
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    options = {"path": str(tmp_path / "ImageReward.pt"), "vocabulary": str(tmp_path / "vocab.txt")}
    with pytest.raises(BadInput, match="vocab.txt is not the vocabulary of bert-base-uncased: it is not UTF-8 text"):
        load_reward(RewardConfig(name="imagereward", options=options)).load()
    save_file(WEIGHTS, tmp_path / "ImageReward.safetensors")
    with pytest.raises(BadInput, match=r"vocabulary .*no.txt' does not exist; vocab.txt of"):
        options = {"path": str(tmp_path / "ImageReward.safetensors"), "vocabulary": str(tmp_path / "no.txt")}
        load_reward(RewardConfig(name="imagereward", options=options))
