"""How the embedded model was made. These commands, in this order, write the folder `weights/`:

    python -m trainer.shapes.pretrain vae  --minutes 16
    python -m trainer.shapes.pretrain vae  --minutes 14 --resume --decoder-only
    python -m trainer.shapes.pretrain flow --minutes 38
    python -m trainer.shapes.pretrain flow --minutes 27 --resume --seed 1
    python -m trainer.shapes.pretrain score

The flow model is taught with noisy captions (`CAPTION_NOISE`), as real models are by web data: every skill is
there and only adherence is missing, which is what reinforcement learning can sharpen.
"""

import argparse
import copy
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import WEIGHTS
from .checker import check
from .prompts import COLORS, NUMBERS, RELATIONS, SHAPES, TASKS, TEMPLATES, Phrase, Prompt, content_text, prompts
from .world import Scene, make_scene, relation_holds, render

LATENT_STD, LATENT_MEAN = 1 / 1.5305, 0.0609  # SD3's latent format, which ComfyUI applies to this architecture
MAX_TOKENS = 16
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
CAPTION_NOISE = dict(zip(TASKS, (0.30, 0.25, 0.20, 0.25, 0.12, 0.10), strict=True))


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
    """One of the prompts a scene fits."""
    shapes = [item.shape for item in scene.items]
    if len(set(shapes)) < len(shapes):
        return Prompt("", (Phrase(shapes[0], count=len(shapes)),))
    items = list(scene.items)
    rng.shuffle(items)
    plain, colored = (tuple(Phrase(i.shape, i.color if c else None) for i in items) for c in (False, True))
    if len(items) == 1:
        return Prompt("", rng.choice((plain, colored, colored)))
    centers = [(item.x, item.y) for item in items]
    relations = [relation for relation in RELATIONS if relation_holds(relation, *centers)]
    choices = [(plain, None), (colored, None), (colored, None), *[(plain, relation) for relation in relations] * 3]
    phrases, relation = rng.choice(choices)
    return Prompt("", phrases, relation)


def caption(scene: Scene, rng: random.Random) -> str:
    """A training prompt for a scene, with one thing wrong at the rate of `CAPTION_NOISE`."""
    while True:
        said = describe(scene, rng)
        if rng.random() < CAPTION_NOISE[said.task]:
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


class Student(torch.nn.Module):
    """Both text encoders and the transformer, trained together."""

    def __init__(self, tokenizer: object) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)
        self.transformer = build_transformer()

    def forward(self, sample: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        outputs = [e(tokens, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        return self.transformer(
            hidden_states=sample,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.cat([o.hidden_states[-2] for o in outputs], dim=-1),
            pooled_projections=torch.cat([o.text_embeds for o in outputs], dim=-1),
            return_dict=False,
        )[0]


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


def train_flow(minutes: float, images: int, resume: bool, seed: int = 0, batch: int = 64, peak: float = 1e-3) -> None:
    """Train text encoders and transformer on velocity prediction for a time; the moving average is kept."""
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    build_tokenizer(WEIGHTS / "tokenizer")
    build_tokenizer(WEIGHTS / "tokenizer_2")
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    student = Student(tokenizer)
    if resume:
        load_student(student)
    average = copy.deepcopy(student).requires_grad_(False)
    scenes = random_scenes(images, rng)
    latents = encode_scenes(scenes)
    ids = dict(zip(["", *TRAINING_TEXTS], tokenize(tokenizer, ["", *TRAINING_TEXTS]), strict=True))
    print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f}M parameters, {len(latents)} images", flush=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, step, losses = time.time(), 0, []
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 200) * min(1.0, 2 * (1 - share) + 0.01)
        rows = rng.choices(range(len(latents)), k=batch)
        clean = latents[rows].float()
        texts = [caption(scenes[row], rng) if rng.random() > UNCONDITIONAL else "" for row in rows]
        tokens = torch.stack([ids[text] for text in texts])
        sigma = torch.randn(batch).sigmoid()
        noise = torch.randn_like(clean)
        noisy = clean + sigma[:, None, None, None] * (noise - clean)
        # With so few tokens the plain attention is faster than the fused one.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                velocity = student(noisy, sigma, tokens)
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
        if step % 5000 == 0:
            save_student(average)
            score()
    save_student(average)
    score()


def save_student(student: Student) -> None:
    """Write the pipeline folder in float16."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    half = copy.deepcopy(student).half()
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        getattr(half, name).save_pretrained(WEIGHTS / name)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0).save_pretrained(WEIGHTS / "scheduler")
    (WEIGHTS / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def load_student(student: Student) -> None:
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        module = getattr(student, name)
        module.load_state_dict(type(module).from_pretrained(WEIGHTS / name).float().state_dict())


@torch.no_grad()
def score(per_task: int = 96, steps: int = 10, seed: int = 7) -> dict[str, float]:
    """Print the share of right images on held-out prompts under deterministic Euler sampling."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    student = Student(tokenizer)
    load_student(student)
    vae = load_vae()
    generator = torch.Generator().manual_seed(seed)
    sigmas = torch.linspace(1, 0, steps + 1)
    result = {}
    for task in TASKS:
        pool = prompts(task, held_out=True)
        texts = [pool[i % len(pool)].text for i in range(per_task)]
        tokens = tokenize(tokenizer, texts)
        sample = torch.randn(per_task, 16, 8, 8, generator=generator)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            sample = sample + student(sample, sigma.expand(per_task), tokens) * (sigma_next - sigma)
        images = (vae.decode(sample * LATENT_STD + LATENT_MEAN).sample / 2 + 0.5).clamp(0, 1)
        graded, right = check(images, texts)
        result[task] = right.mean().item()
        print(f"  {task:14s} right {result[task]:.3f} graded {graded.mean():.3f}", flush=True)
    print(f"  mean           right {sum(result.values()) / len(result):.3f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "flow", "score"])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--images", type=int, default=40_000, help="size of the flow stage's data set")
    parser.add_argument("--resume", action="store_true", help="start from the saved weights")
    parser.add_argument("--seed", type=int, default=0, help="flow stage: another seed draws other images")
    parser.add_argument("--decoder-only", action="store_true", help="vae stage: leave the latents as they are")
    args = parser.parse_args()
    if args.stage == "vae":
        train_vae(args.minutes, args.resume, args.decoder_only)
    elif args.stage == "flow":
        train_flow(args.minutes, args.images, args.resume, args.seed)
    else:
        score()


if __name__ == "__main__":
    main()
