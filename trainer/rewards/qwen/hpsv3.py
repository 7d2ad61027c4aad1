"""HPSv3: human preference by Qwen2-VL-7B (arXiv 2508.03789)."""

from pathlib import Path

from torch import Tensor, nn

from ...config import Section
from ...utils.media import to_tensor
from ..base import Dtype, dtype_option
from ..files import check_sha256, file_option
from ..preprocess import to_pil
from .network import SIZES_7B, QwenReward, plain, read_named, smart_size

PIXELS = 256 * 28 * 28


class HPSv3(QwenReward):
    """Human preference, HPSv3. The score is the predicted mean (its second output, the uncertainty, is not used).

    The largest of the preference models, and the one that agrees best with people in its authors' measurements. Every
    image is resized to about 448 x 448 pixels. It takes 17 GB in bfloat16; `reward-server` can run it on another GPU.
    Text of the form `<|...|>` is removed from prompts, because it would become special tokens.

    The text around a prompt is read from two files: the constants INSTRUCTION and prompt_with_special_token of
    `hpsv3/dataset/data_collator_qwen.py`, with the spaces and empty lines at their ends. If that is installed:

    ```python
    from pathlib import Path
    from hpsv3.dataset.data_collator_qwen import INSTRUCTION, prompt_with_special_token

    Path("instruction.txt").write_bytes(INSTRUCTION.encode())
    Path("suffix.txt").write_bytes(prompt_with_special_token.encode())
    ```
    """

    name = "hpsv3"
    typical_range = (-2.0, 13.0)
    licence = "Apache-2.0"
    sizes = SIZES_7B
    widths = (1024, 16)
    markers = ("<|Reward|>",)
    pad_word = "<|image_pad|>"
    sums = ("0393599dad45a971", "2471faca094ae5bd")

    class Options(Section):
        path: str = file_option("hpsv3/HPSv3.safetensors", "HPSv3.safetensors of MizzenAI/HPSv3 (16.5 GB).")
        tokenizer: str = file_option(
            "hpsv3/tokenizer.json", "tokenizer.json of Qwen/Qwen2-VL-7B-Instruct (7 MB).", suffixes=(".json",)
        )
        instruction: str = file_option(
            "hpsv3/instruction.txt", "The constant INSTRUCTION of hpsv3, to the letter.", suffixes=(".txt",)
        )
        suffix: str = file_option(
            "hpsv3/suffix.txt", "The constant prompt_with_special_token of hpsv3, to the letter.", suffixes=(".txt",)
        )
        dtype: Dtype = dtype_option(gpu="bfloat16", cpu="bfloat16")

    def __init__(self, options: Section | None = None) -> None:
        super().__init__(options)
        files = (Path(self.options.instruction), Path(self.options.suffix))
        for file, expected in zip(files, self.sums, strict=True):
            check_sha256(file, expected, "the text of HPSv3")
        self.instruction, self.suffix = (file.read_bytes().decode() for file in files)

    def make_head(self) -> nn.Module:
        wide, narrow = self.widths
        first = nn.Linear(self.sizes["hidden_size"], wide)
        return nn.Sequential(
            first, nn.ReLU(), nn.Dropout(0.05), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 2)
        )

    def build(self) -> nn.Module:
        path, what = Path(self.options.path), "HPSv3"
        return self.network(what, read_named(path, what, "rm_head"), path)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        text = self.instruction.format(text_prompt=plain(prompts[0])) + self.suffix
        return self.read_out(self._frames(images), text)[0, :1]

    def _frames(self, images: Tensor) -> Tensor:
        """The resized image twice, because a patch spans two frames."""
        from PIL import Image

        height, width = smart_size(images.shape[-2], images.shape[-1], PIXELS, PIXELS)
        resized = to_pil(images)[0].resize((width, height), Image.Resampling.BICUBIC)
        return to_tensor(resized).expand(2, -1, -1, -1).to(images.device)
