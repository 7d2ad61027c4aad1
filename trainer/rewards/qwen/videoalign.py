"""VideoAlign (VideoReward): visual quality, motion quality and text alignment of videos (arXiv 2501.13918)."""

import hashlib
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from weakref import WeakValueDictionary

import torch
from pydantic import Field
from torch import Tensor, nn

from ...config import Section
from ...utils.media import to_bytes
from ..base import Dtype, MemoryHook, dtype_option
from ..files import check_files, check_sha256, file_option
from .network import SIZES_2B, QwenReward, plain, read_named, smart_size

SMALLEST, LARGEST = 128 * 28 * 28, 256 * 28 * 28
SAMPLED_FPS, FEWEST, MOST = 2.0, 4, 768
MEAN = {"VQ": 3.6757, "MQ": 1.1646, "TA": 2.8105}
STD = {"VQ": 2.2476, "MQ": 1.3811, "TA": 2.5121}


class _Options(Section):
    path: str = file_option(
        "videoreward/checkpoint-11352/model.pth",
        "model.pth of KwaiVGI/VideoReward on the Hugging Face hub, or the same with its LoRA merged (4.5 GB).",
    )
    tokenizer: str = file_option(
        "videoreward/tokenizer.json", "tokenizer.json of Qwen/Qwen2-VL-2B-Instruct (7 MB).", suffixes=(".json",)
    )
    template: str = file_option(
        "videoreward/template.txt",
        "The constant DETAILED_PROMPT_WITH_SPECIAL_TOKEN of VideoAlign's prompt_template.py, to the letter.",
        suffixes=(".txt",),
    )
    fps: Annotated[float, Field(gt=0, le=240)] = Field(
        8.0,
        description="Assumed frame rate of the video, independent of model.fps; 8 as in DanceGRPO's recipe for "
        "HunyuanVideo.",
    )
    scale: Literal["normalized", "raw"] = Field(
        "normalized",
        description="normalized to mean 0 and std 1 with the authors' constants, as in DanceGRPO's code; or raw, the "
        "output of the network.",
    )
    dtype: Dtype = dtype_option(gpu="bfloat16", cpu="bfloat16")


_Weight = Annotated[float, Field(ge=-1000, le=1000)]


class _SumOptions(_Options):
    visual: _Weight = Field(1.0, description="Weight of visual quality.")
    motion: _Weight = Field(1.0, description="Weight of motion quality.")
    text: _Weight = Field(1.0, description="Weight of text alignment.")


class VideoAlignNetwork(QwenReward):
    """The network with three scores per video, which all rewards with the same files share."""

    name = "videoalign"
    typical_range = (-2.0, 2.0)
    media = "video"
    sizes = SIZES_2B
    markers = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
    pad_word = "<|video_pad|>"
    sums = "fdb6309bac618dd0"
    remembered = 1024
    Options = _Options

    def __init__(self, options: Section) -> None:
        super().__init__(options)
        check_sha256(Path(self.options.template), self.sums, "the text of VideoAlign")
        self.template = Path(self.options.template).read_bytes().decode()
        self.known: dict[tuple[str, str], Tensor] = {}

    def make_head(self) -> nn.Module:
        return nn.Linear(self.sizes["hidden_size"], 1, bias=False)

    def build(self) -> nn.Module:
        path, what = Path(self.options.path), "VideoReward"
        return self.network(what, read_named(path, what, "rm_head"), path)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        raise NotImplementedError("videos are scored by `scores`")

    def scores(self, video: Tensor, prompt: str) -> Tensor:
        """Raw scores VQ, MQ and TA, `[3]`; cached for other rewards that share the network.

        Args:
            video: `[F, 3, H, W]` in [0, 1].
        """
        frames = sampled_frames(video, self.options.fps)
        key = (prompt, hashlib.sha256(frames.cpu().numpy().tobytes()).hexdigest())
        if key not in self.known:
            if len(self.known) >= self.remembered:
                self.known.clear()
            self.move_to(video.device)
            with torch.no_grad():
                text = self.template.format(text_prompt=plain(prompt))
                self.known[key] = self.read_out(frames.float() / 255, text)[:, 0].cpu()
        return self.known[key]


_NETWORKS: WeakValueDictionary[tuple, VideoAlignNetwork] = WeakValueDictionary()


def shared_network(options: Section) -> VideoAlignNetwork:
    """The network of these files, shared with other rewards that use them."""
    own = VideoAlignNetwork.Options(**{name: getattr(options, name) for name in VideoAlignNetwork.Options.model_fields})
    key = tuple(own.model_dump(exclude={"scale"}).values())
    network = _NETWORKS.get(key)
    if network is None:
        network = _NETWORKS[key] = VideoAlignNetwork(own)
    return network


class VideoAlign(VideoAlignNetwork):
    """Videos: the weighted sum of visual quality, motion quality and text alignment.

    With all weights 1 it is the authors' overall score. `videoalign-vq`, `videoalign-mq` and `videoalign-ta` give one
    of the three; several of them in one run share the network and evaluate each video once. DanceGRPO trains on visual
    and motion quality and leaves out text alignment as unstable. Visual quality alone leads to an animated look.

    The network sees two frames per second (according to `fps`), at least 4 frames, of 100,000 to 200,000 pixels each.
    Text of the form `<|...|>` is removed from prompts, because it would become special tokens.

    The text around a prompt is read from a file: the constant DETAILED_PROMPT_WITH_SPECIAL_TOKEN of VideoAlign's
    `prompt_template.py`, with the empty lines at both ends. In the folder of that file:

    ```python
    from pathlib import Path
    from prompt_template import DETAILED_PROMPT_WITH_SPECIAL_TOKEN

    Path("template.txt").write_bytes(DETAILED_PROMPT_WITH_SPECIAL_TOKEN.encode())
    ```
    """

    licence = "Apache-2.0"
    Options = _SumOptions

    def __init__(self, options: Section | None = None) -> None:
        self.options = self.Options() if options is None else options
        check_files(self.options, self.name)
        self.shared = shared_network(self.options)

    @property
    def holder(self) -> VideoAlignNetwork:
        return self.shared

    @property
    def module(self) -> nn.Module | None:
        """The shared network."""
        return self.shared.module

    def load(self) -> None:
        self.shared.load()

    def idle(self) -> None:
        self.shared.idle()

    def register_memory_hook(self, hook: MemoryHook) -> None:
        self.shared.register_memory_hook(hook)

    def score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        pairs = zip(images, prompts, strict=True)
        return torch.stack([self.combined(self.shared.scores(video, prompt)) for video, prompt in pairs])

    def combined(self, scores: Tensor) -> Tensor:
        """The score from VQ, MQ and TA `[3]`."""
        weights = torch.tensor([self.options.visual, self.options.motion, self.options.text])
        return (scaled(scores, self.options.scale) * weights).sum()


class _OneDimension(VideoAlign):
    dimension: ClassVar[int]
    Options = _Options

    def combined(self, scores: Tensor) -> Tensor:
        return scaled(scores, self.options.scale)[self.dimension]


class VideoAlignVQ(_OneDimension):
    """Videos: visual quality, by VideoAlign (see `videoalign`)."""

    name = "videoalign-vq"
    dimension = 0


class VideoAlignMQ(_OneDimension):
    """Videos: motion quality, by VideoAlign (see `videoalign`)."""

    name = "videoalign-mq"
    dimension = 1


class VideoAlignTA(_OneDimension):
    """Videos: how well they follow the prompt, by VideoAlign (see `videoalign`)."""

    name = "videoalign-ta"
    dimension = 2


def scaled(scores: Tensor, scale: str) -> Tensor:
    """Convert VQ, MQ, TA `[3]` to a scale."""
    if scale == "raw":
        return scores
    mean, std = (torch.tensor([table[name] for name in ("VQ", "MQ", "TA")]) for table in (MEAN, STD))
    return (scores - mean) / std


def frame_indices(total: int, fps: float) -> Tensor:
    """Indices of the frames that the network sees, `[n]` long, n even.

    Raises:
        ValueError: there are fewer than two frames.
    """
    most = min(MOST, total) // 2 * 2
    count = min(max(total / fps * SAMPLED_FPS, FEWEST), most)
    count = round(count / 2) * 2
    if not 2 <= count <= total:
        raise ValueError(f"a video of {total} frames is too short for this reward: it needs at least 2")
    return torch.linspace(0, total - 1, count).round().long()


def sampled_frames(video: Tensor, fps: float) -> Tensor:
    """The frames that the network sees, resized: `[n, 3, H, W]` uint8."""
    from torchvision.transforms.functional import InterpolationMode, resize

    frames = to_bytes(video[frame_indices(len(video), fps).to(video.device)])
    height, width = smart_size(*frames.shape[-2:], SMALLEST, LARGEST)
    return resize(frames, [height, width], InterpolationMode.BICUBIC, antialias=True)
