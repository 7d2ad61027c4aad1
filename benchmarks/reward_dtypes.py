"""Whether the scores of a reward in half precision keep the order of a group's images: what `dtype: auto` is chosen by.

    python benchmarks/reward_dtypes.py                        # every reward with a network that can be made here
    python benchmarks/reward_dtypes.py hps-v2.1 --narrow 1    # at the published widths; float16 is slow on a CPU

Random weights in the layout of the published files, with the published number of layers, patches and pixels; `--narrow`
divides the widths. Weights have the variance 1 / inputs, norms are the identity. Images in groups of 8 with one prompt:
images of the embedded model, each group from one prompt of its own, and gradients of colours with noise of all scales
like that of photographs. Compared with float32, within groups: the correlation of the scores; the error (standard
deviation of the difference) in units of the spread (standard deviation of the float32 scores), for the mean and the
worst group; and the share of pairs of images whose order changes.
"""

import argparse
import copy
import math
import sys
import tempfile
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rewards_full_size as files
from trainer.config import RewardConfig, parse_config, preset
from trainer.rewards import load_reward, score
from trainer.rewards.clip import aesthetic, clip_score, contrastive, hps, pickscore
from trainer.rewards.image_reward import ImageReward

GROUP = 8
NAMES = ("hps-v2.1", "clip", "pickscore", "imagereward", "aesthetic")
PHOTOS = ("a red fox in the snow", "a portrait of an old man", "a city at night")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="*", choices=[*NAMES, []], metavar="REWARD")
    parser.add_argument("--narrow", type=int, default=4, choices=(1, 2, 4), help="divides the widths of the networks")
    parser.add_argument("--groups", type=int, default=6, help="even: half of them by the embedded model")
    args = parser.parse_args()
    make_narrow(args.narrow)
    images, prompts = embedded_and_photos(args.groups // 2)
    print(f"{len(prompts)} images in groups of {GROUP}, widths divided by {args.narrow}\n")
    print("| reward | dtype | correlation | error / spread, mean | worst group | changed pairs | largest score |")
    print("|---|---|---|---|---|---|---|")
    for name in args.rewards or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            options = files.FILES[name](Path(folder))
            exact = scores(name, options, "float32", images, prompts)
            for dtype in ("bfloat16", "float16"):
                print(row(name, dtype, exact, scores(name, options, dtype, images, prompts)), flush=True)


def make_narrow(factor: int) -> None:
    """Networks and files of a fraction of the published widths, with weights whose signals keep their size."""
    whole = contrastive.architecture

    def narrow(name: str) -> dict:
        config = copy.deepcopy(whole(name))
        config["vision_cfg"]["width"] //= factor
        config["text_cfg"]["width"] //= factor
        config["text_cfg"]["heads"] //= factor
        return config

    for module in (files, hps, pickscore, aesthetic, clip_score):
        module.architecture = narrow
    files.random_file = partial(files.random_file, draw=keeping_signals)
    published = files.imagereward_reference.PUBLISHED
    for key in ("width", "text_width", "inner"):
        published[key] //= factor
    vision, text = ImageReward.vision, ImageReward.text
    heads = {key: vision[key] // factor for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    ImageReward.vision = vision | heads
    sizes = {"hidden_size": published["text_width"], "intermediate_size": published["inner"]}
    ImageReward.text = text | sizes | {"num_attention_heads": text["num_attention_heads"] // factor}


def keeping_signals(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A weight of variance 1 / inputs."""
    return (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))).to(dtype)


@torch.no_grad()
def embedded_and_photos(groups: int) -> tuple[Tensor, list[str]]:
    """Images `[B, 3, H, W]` and prompts, so many groups of each kind."""
    from trainer.models import SD3Model
    from trainer.prompts.sets import evaluation_prompts
    from trainer.rollout import Plan, Prompting, sample
    from trainer.utils.seeds import noise

    config, cpu = parse_config(preset("demo")), torch.device("cpu")
    texts = evaluation_prompts(config.evaluation).texts[:: 82 // groups][:groups]
    model = SD3Model.load(config.model, cpu)
    prompting = Prompting(SD3Model.encode(config.model, texts, cpu), None)
    rows = torch.arange(groups).repeat_interleave(GROUP)
    initial = torch.stack([noise(model.latent_shape, 0, index) for index in range(len(rows))])
    plan = Plan("ode", 0.0, model.sigmas(10, config.rollout.shift), [False] * 10, False, 1.0, "euler")
    drawn = model.decode(sample(model, plan, prompting, rows, initial, lambda step: initial).final)
    like_photos = torch.stack([photo(index, drawn.shape[-1]) for index in range(groups * GROUP)])
    names = [text for text in (*texts, *PHOTOS[:groups]) for _ in range(GROUP)]
    return torch.cat([drawn.float().clamp(0, 1), like_photos]), names


def photo(seed: int, side: int) -> Tensor:
    """A gradient between two colours with noise whose amplitude falls as 1 / frequency, `[3, side, side]`."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, 3, 1, 1, generator=generator)
    angle = 2 * math.pi * torch.rand((), generator=generator)
    y, x = torch.meshgrid(torch.linspace(-0.5, 0.5, side), torch.linspace(-0.5, 0.5, side), indexing="ij")
    ramp = (0.5 + x * angle.cos() + y * angle.sin()).clamp(0, 1)
    frequency = (torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side) ** 2).sqrt().clamp(min=1 / side)
    spectrum = torch.fft.rfft2(torch.randn(3, side, side, generator=generator)) / frequency
    texture = torch.fft.irfft2(spectrum, s=(side, side))
    return (first * (1 - ramp) + second * ramp + 0.15 * texture / texture.std()).clamp(0, 1)


def scores(name: str, options: files.Options, dtype: str, images: Tensor, prompts: list[str]) -> Tensor:
    reward = load_reward(RewardConfig(name=name, options={**options, "dtype": dtype}))
    return score(reward, images, prompts).double().view(-1, GROUP)


def row(name: str, dtype: str, exact: Tensor, found: Tensor) -> str:
    """A row of the table.

    Args:
        exact, found: scores `[groups, GROUP]` in float32 and in the dtype.
    """
    cells = [f"`{name}`", dtype]
    if not found.isfinite().all():
        return f"| {' | '.join(cells)} | not finite | | | | |"
    spread, error = exact.std(1), (found - exact).std(1) / exact.std(1)
    centred = [(values - values.mean(1, keepdim=True)) / spread[:, None] for values in (exact, found)]
    correlation = torch.corrcoef(torch.stack([values.flatten() for values in centred]))[0, 1]
    pairs = [(values[:, a] - values[:, b]) for values in (exact, found) for a, b in combinations(range(GROUP), 2)]
    before, after = torch.stack(pairs).view(2, -1).sign()
    shares = (error.mean(), error.max(), (before != after).double().mean())
    cells += [f"{correlation:.5f}", *(f"{share:.2%}" for share in shares)]
    return f"| {' | '.join(cells)} | {found.abs().max():.3g} |"


if __name__ == "__main__":
    main()
