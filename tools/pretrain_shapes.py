"""How the embedded model was made. These commands, in this order, write the folder `weights/`:

    python -m tools.pretrain_shapes vae  --minutes 16
    python -m tools.pretrain_shapes vae  --minutes 14 --resume --decoder-only
    python -m tools.pretrain_shapes text --minutes 1.5
    python -m tools.pretrain_shapes flow --minutes 15 --caption-noise 0
    python -m tools.pretrain_shapes flow --minutes 9 --resume --seed 14
    python -m tools.pretrain_shapes score

The text encoders learn first what prompts mean. The flow model then learns to draw what true captions say, and at last
it is taught with noisy captions (`CAPTION_NOISE`), as real models are by web data: every skill is there and only
adherence is missing, which is what reinforcement learning can sharpen. docs/design-notes.md tells how the committed
weights came about in detail.
"""

import argparse
import copy
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.diffusion.schedules import sigma_schedule
from trainer.shapes import WEIGHTS
from trainer.shapes.checker import check
from trainer.shapes.prompts import (
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    TASKS,
    TEMPLATES,
    Phrase,
    Prompt,
    content_text,
    prompts,
)
from trainer.shapes.world import Scene, make_scene, relation_holds, render

LATENT_STD, LATENT_MEAN = 1 / 1.5305, 0.0609  # SD3's latent format, which ComfyUI applies to this architecture
MAX_TOKENS = 16
SHIFT = 3.0  # SD3's; what an image shows is decided at high noise
UNCONDITIONAL = 0.1  # share of empty captions, which classifier-free guidance needs
TASK_WEIGHTS = dict(zip(TASKS, (1, 2, 3, 2, 4, 5), strict=True))
TRAINING_TEXTS = frozenset(p.text for task in TASKS for p in prompts(task, held_out=False))
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.37.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}
CAPTION_NOISE = dict(zip(TASKS, (0.40, 0.25, 0.25, 0.40, 0.25, 0.20), strict=True))


# ---------------------------------------------------------------------------------------------------------------- data


def random_prompt(rng: random.Random, pools: dict[str, list[Prompt]]) -> Prompt:
    """A training prompt; harder tasks come more often."""
    return rng.choice(pools[rng.choices(TASKS, TASK_WEIGHTS.values())[0]])


def _other(values: tuple, value: object, rng: random.Random) -> object:
    return rng.choice([v for v in values if v != value])


def corrupt(prompt: Prompt, rng: random.Random) -> Prompt:
    """The prompt with one thing wrong: a shape, a colour, a count or the relation."""
    index = rng.randrange(len(prompt.phrases))
    phrase = prompt.phrases[index]
    kinds = ["shape"]
    if phrase.color:
        kinds += ["color", "color"]
    if phrase.count > 1:
        kinds += ["count", "count"]
    if prompt.relation:
        kinds += ["relation"] * 3
    kind = rng.choice(kinds)
    relation = prompt.relation
    if kind == "relation":
        relation = _other(RELATIONS, relation, rng)
    else:
        options = {"shape": SHAPES, "color": COLORS, "count": tuple(range(1, len(NUMBERS) + 1))}[kind]
        phrase = replace(phrase, **{kind: _other(options, getattr(phrase, kind), rng)})
    phrases = (*prompt.phrases[:index], phrase, *prompt.phrases[index + 1 :])
    return Prompt(prompt.text, phrases, relation)


def training_pools() -> dict[str, list[Prompt]]:
    return {task: prompts(task, held_out=False) for task in TASKS}


def random_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Scenes of training prompts; harder tasks come more often."""
    pools = training_pools()
    return [make_scene(random_prompt(rng, pools), rng) for _ in range(count)]


def describe(scene: Scene, rng: random.Random) -> Prompt:
    """One of the prompts a scene fits; without a relation the shapes are named as one reads, from the top left."""
    shapes = [item.shape for item in scene.objects]
    if len(set(shapes)) < len(shapes):
        return Prompt("", (Phrase(shapes[0], count=len(shapes)),))
    objects = sorted(scene.objects, key=lambda item: item.x + item.y)
    plain, colored = (tuple(Phrase(i.shape, i.color if c else None) for i in objects) for c in (False, True))
    if len(objects) == 1:
        return Prompt("", rng.choice((plain, colored, colored)))
    kind = rng.choices(("plain", "colored", "related"), (1, 3, 3))[0]
    if kind != "related":
        return Prompt("", plain if kind == "plain" else colored)
    first, second = rng.sample(objects, 2)
    relation = next(r for r in RELATIONS if relation_holds(r, (first.x, first.y), (second.x, second.y)))
    return Prompt("", (Phrase(first.shape), Phrase(second.shape)), relation)


def caption(scene: Scene, rng: random.Random, noise: float = 1.0) -> str:
    """A training prompt for a scene, with one thing wrong at the rate of `noise` times `CAPTION_NOISE`."""
    while True:
        said = describe(scene, rng)
        if rng.random() < noise * CAPTION_NOISE[said.task]:
            said = corrupt(said, rng)
        text = rng.choice(TEMPLATES).format(content_text(said.phrases, said.relation))
        if text in TRAINING_TEXTS:
            return text


# ----------------------------------------------------------------------------------------------------------------- vae


def build_vae() -> torch.nn.Module:
    """TAESD's architecture with 16 latent channels, which both diffusers and ComfyUI know."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)


def load_vae() -> torch.nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny.from_pretrained(WEIGHTS / "vae").float()


def train_vae(
    minutes: float, resume: bool, decoder_only: bool, seed: int = 0, batch: int = 24, learning_rate: float = 6e-4
) -> None:
    """Train the autoencoder on images of the world for a time, then save it.

    Args:
        decoder_only: leave the latents as they are, so that a flow model trained on them stays valid.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed + decoder_only)
    vae = (load_vae() if resume else build_vae()).to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(not decoder_only)
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    start, step = time.time(), 0
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * max(0.02, 1 - share)
        images = render(random_scenes(batch, rng)).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images * 2 - 1).latents
            noisy = latents + 0.1 * torch.randn_like(latents)
            decoded = (vae.decode(noisy).sample + 1) / 2
        decoded, latents = decoded.float(), latents.float()
        spread = (latents.std((0, 2, 3)) - LATENT_STD).square().mean()
        center = (latents.mean((0, 2, 3)) - LATENT_MEAN).square().mean()
        loss = F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images) + 0.1 * (spread + center)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"vae step {step} loss {loss.item():.4f} spread {spread.item():.4f}", flush=True)
    save_vae(vae)
    score_vae(vae.float(), rng)


def save_vae(vae: torch.nn.Module) -> None:
    """Write the autoencoder in float16."""
    vae.half().save_pretrained(WEIGHTS / "vae")
    drop_written_keys(WEIGHTS / "vae")


def drop_written_keys(folder: Path) -> None:
    """diffusers writes `block_out_channels`, of which it warns when reading, and the folder of an earlier save."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("block_out_channels", "_name_or_path"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def score_vae(vae: torch.nn.Module, rng: random.Random) -> None:
    """Print how many reconstructions the checker still finds right."""
    pools = training_pools()
    wanted = [random_prompt(rng, pools) for _ in range(256)]
    images = render([make_scene(p, rng) for p in wanted])
    latents = vae.encode(images * 2 - 1).latents
    decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    right = check(decoded, [p.text for p in wanted])[1].mean().item()
    print(f"reconstructions right {right:.3f}, latent mean {latents.mean():.3f} std {latents.std():.3f}")


# ---------------------------------------------------------------------------------------------------------------- flow


def build_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer (byte-pair encoding) whose merges are learned from this world's prompts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,'!?-"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False, min_frequency=1
    )
    texts = [p.text for pool in training_pools().values() for p in pool]
    bpe.train_from_iterator([*texts, *([" ".join(letters)] * 2)], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [t + "</w>" for t in letters if t + "</w>" not in tokens]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def tokenize(tokenizer: object, texts: list[str]) -> torch.Tensor:
    """Token ids `[B, 16]`."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def build_text_encoder(tokenizer: object) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )
    return CLIPTextModelWithProjection(config)


def build_transformer() -> torch.nn.Module:
    """SD3's transformer; ComfyUI infers depth from the width, so heads = layers and the head size is 64."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=64,
        joint_attention_dim=128,
        caption_projection_dim=192,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
    )


class TextEncoders(torch.nn.Module):
    """Both text encoders, as SD3 uses them."""

    def __init__(self, tokenizer: object) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states `[B, 16, 128]` and pooled embedding `[B, 128]`."""
        outputs = [e(tokens, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        states = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        return states, torch.cat([o.text_embeds for o in outputs], dim=-1)


def predict(
    transformer: torch.nn.Module,
    sample: torch.Tensor,
    sigma: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Velocity `[B, 16, 8, 8]`."""
    return transformer(
        hidden_states=sample,
        timestep=sigma * 1000,
        encoder_hidden_states=text[0],
        pooled_projections=text[1],
        return_dict=False,
    )[0]


# ---------------------------------------------------------------------------------------------------------------- text

MIRRORED = dict(zip(RELATIONS, (RELATIONS[1], RELATIONS[0], RELATIONS[3], RELATIONS[2]), strict=True))
MEANING_SIZES = (len(NUMBERS) + 1, len(COLORS) + 1) * len(SHAPES) + (len(RELATIONS) + 1,)


def meaning(prompt: Prompt) -> list[int]:
    """What a prompt says, whatever its words: number and colour of each shape, and how the two shapes stand.

    "a circle above a square" and "a square below a circle" have one meaning. 0 stands for none or not said.
    """
    said = {phrase.shape: phrase for phrase in prompt.phrases}
    values = []
    for shape in SHAPES:
        phrase = said.get(shape)
        values.append(phrase.count if phrase else 0)
        values.append(COLORS.index(phrase.color) + 1 if phrase and phrase.color else 0)
    if prompt.relation is None:
        return [*values, 0]
    first, second = (SHAPES.index(phrase.shape) for phrase in prompt.phrases)
    relation = prompt.relation if first < second else MIRRORED[prompt.relation]
    return [*values, RELATIONS.index(relation) + 1]


def train_text(minutes: float, seed: int = 0, batch: int = 256, learning_rate: float = 2e-3) -> None:
    """Teach the text encoders what prompts mean, as CLIP's are taught before any image model uses them.

    Linear heads read the meaning off the pooled embedding and off the last token's state; the heads are thrown away.
    """
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    rng = random.Random(seed)
    build_tokenizer(WEIGHTS / "tokenizer")
    # A copy, for another training of the same tokenizer gives other numbers to the same words.
    shutil.copytree(WEIGHTS / "tokenizer", WEIGHTS / "tokenizer_2", dirs_exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    encoders = TextEncoders(tokenizer)
    heads = torch.nn.ModuleList(torch.nn.Linear(128, sum(MEANING_SIZES)) for _ in range(2))
    pools = training_pools()
    known = {p.text: (tokenize(tokenizer, [p.text])[0], meaning(p)) for pool in pools.values() for p in pool}
    parameters = [*encoders.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, step = time.time(), 0
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * (1 - share)
        rows = [known[random_prompt(rng, pools).text] for _ in range(batch)]
        tokens, wanted = torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
        states, pooled = encoders(tokens)
        last = (tokens == tokenizer.eos_token_id).int().argmax(1)
        summaries = (pooled, states[torch.arange(batch), last])
        logits = [head(summary).split(MEANING_SIZES, dim=1) for head, summary in zip(heads, summaries, strict=True)]
        loss = sum(F.cross_entropy(part, wanted[:, i]) for parts in logits for i, part in enumerate(parts))
        # Keeps the scale of a normalised embedding, which is what the image model is built for.
        loss = loss + 0.01 * sum((summary.square().mean() - 1).square() for summary in summaries)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            right = torch.stack([part.argmax(1) == wanted[:, i] for i, part in enumerate(logits[0])]).all(0)
            print(f"text step {step} loss {loss.item():.4f} right {right.float().mean():.3f}", flush=True)
    save_modules({name: getattr(encoders, name) for name in ("text_encoder", "text_encoder_2")})
    score_text(encoders, heads[0], tokenizer)


@torch.no_grad()
def score_text(encoders: TextEncoders, head: torch.nn.Module, tokenizer: object) -> None:
    """Print how many held-out prompts are understood."""
    held_out = [p for task in TASKS for p in prompts(task, held_out=True)]
    _, pooled = encoders(tokenize(tokenizer, [p.text for p in held_out]))
    wanted = torch.tensor([meaning(p) for p in held_out])
    parts = head(pooled).split(MEANING_SIZES, dim=1)
    right = torch.stack([part.argmax(1) == wanted[:, i] for i, part in enumerate(parts)]).all(0)
    print(f"held-out prompts understood {right.float().mean():.3f}, pooled std {pooled.std():.2f}")


@torch.no_grad()
def encode_scenes(scenes: list[Scene]) -> torch.Tensor:
    """Latents in the model's scale, bfloat16."""
    vae = load_vae().to(memory_format=torch.channels_last)
    latents = []
    for start in range(0, len(scenes), 100):
        images = render(scenes[start : start + 100]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            encoded = vae.encode(images * 2 - 1).latents
        latents.append(((encoded.float() - LATENT_MEAN) / LATENT_STD).bfloat16().contiguous())
    return torch.cat(latents)


def train_flow(
    minutes: float,
    images: int,
    resume: bool,
    caption_noise: float,
    seed: int = 0,
    batch: int = 64,
    peak: float = 1e-3,
) -> None:
    """Train the transformer on velocity prediction for a time; the moving average is kept.

    The text encoders stay as they are, so every caption is encoded once.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    student = build_transformer()
    if resume:
        student.load_state_dict(load_transformer().state_dict())
    average = copy.deepcopy(student).requires_grad_(False)
    scenes = random_scenes(images, rng)
    latents = encode_scenes(scenes)
    states, pooled = encode_texts(["", *TRAINING_TEXTS])
    row_of = {text: row for row, text in enumerate(["", *TRAINING_TEXTS])}
    print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f}M parameters, {len(latents)} images", flush=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, step, losses = time.time(), 0, []
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 200) * min(1.0, 2 * (1 - share) + 0.01)
        rows = rng.choices(range(len(latents)), k=batch)
        clean = latents[rows].float()
        texts = [caption(scenes[row], rng, caption_noise) if rng.random() > UNCONDITIONAL else "" for row in rows]
        said = [row_of[text] for text in texts]
        sigma = torch.randn(batch).sigmoid()
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        noise = torch.randn_like(clean)
        noisy = clean + sigma[:, None, None, None] * (noise - clean)
        # With so few tokens the plain attention is faster than the fused one.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                velocity = predict(student, noisy, sigma, (states[said], pooled[said]))
            loss = F.mse_loss(velocity.float(), noise - clean)
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
        step += 1
        losses.append(loss.item())
        if step % 200 == 0:
            rate = step / (time.time() - start)
            print(f"flow step {step} loss {sum(losses) / len(losses):.4f} {rate:.1f}/s {share:.0%}", flush=True)
            losses = []
        if step % 3000 == 0:
            save_modules({"transformer": average})
            score()
    save_modules({"transformer": average})
    score()


def save_modules(modules: dict[str, torch.nn.Module]) -> None:
    """Write parts of the pipeline folder in float16, and what belongs to no part."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    for name, module in modules.items():
        copy.deepcopy(module).half().save_pretrained(WEIGHTS / name)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT).save_pretrained(WEIGHTS / "scheduler")
    (WEIGHTS / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def load_transformer() -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(WEIGHTS / "transformer").float()


@torch.no_grad()
def encode_texts(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states `[N, 16, 128]` and pooled embeddings `[N, 128]` of the saved encoders."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    encoders = TextEncoders(tokenizer)
    for name in ("text_encoder", "text_encoder_2"):
        setattr(encoders, name, CLIPTextModelWithProjection.from_pretrained(WEIGHTS / name).float())
    parts = [encoders(tokenize(tokenizer, texts[start : start + 256])) for start in range(0, len(texts), 256)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@torch.no_grad()
def score(per_task: int = 96, steps: int = 10, seed: int = 7) -> dict[str, float]:
    """Print the share of right images on held-out prompts under deterministic Euler sampling."""
    student, vae = load_transformer(), load_vae()
    generator = torch.Generator().manual_seed(seed)
    sigmas = torch.tensor(sigma_schedule(steps, SHIFT))
    result = {}
    for task in TASKS:
        pool = prompts(task, held_out=True)
        texts = [pool[i % len(pool)].text for i in range(per_task)]
        text = encode_texts(texts)
        sample = torch.randn(per_task, 16, 8, 8, generator=generator)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            sample = sample + predict(student, sample, sigma.expand(per_task), text) * (sigma_next - sigma)
        images = (vae.decode(sample * LATENT_STD + LATENT_MEAN).sample / 2 + 0.5).clamp(0, 1)
        graded, right = check(images, texts)
        result[task] = right.mean().item()
        print(f"  {task:14s} right {result[task]:.3f} graded {graded.mean():.3f}", flush=True)
    print(f"  mean           right {sum(result.values()) / len(result):.3f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "text", "flow", "score"])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--images", type=int, default=40_000, help="size of the flow stage's data set")
    parser.add_argument("--resume", action="store_true", help="start from the saved weights")
    parser.add_argument("--seed", type=int, default=0, help="flow stage: another seed draws other images")
    parser.add_argument("--caption-noise", type=float, default=1.0, help="flow stage: part of CAPTION_NOISE, 0 to 1")
    parser.add_argument("--decoder-only", action="store_true", help="vae stage: leave the latents as they are")
    args = parser.parse_args()
    if args.stage == "vae":
        train_vae(args.minutes, args.resume, args.decoder_only)
    elif args.stage == "text":
        train_text(args.minutes, args.seed)
    elif args.stage == "flow":
        train_flow(args.minutes, args.images, args.resume, args.caption_noise, args.seed)
    else:
        score()


if __name__ == "__main__":
    main()
