"""The reference implementation's order of work beside the trainer's, on the same model with the same settings.

A transcription of what its scripts do: one image at a time, one timestep at a time, in rollout, decoding, scoring and
update; all steps but the last are stochastic and stored; a random share of them is trained; one sample's gradients are
accumulated after another's, and one optimizer step follows. What the trainer does otherwise is left out: batches, and
the steps that images of a group have in common.
"""

import statistics
import time
from types import SimpleNamespace

import torch
from torch import Tensor

from trainer.diffusion import kernels
from trainer.diffusion.solvers import SOLVERS
from trainer.loop import Trainer
from trainer.objectives.advantage import advantages_of
from trainer.objectives.base import TrainingItem
from trainer.runs.metrics import Clock
from trainer.score import score_by_group
from trainer.utils.seeds import prompt_indices

from .running import Prepare, new_trainer
from .setting import Setting

TIMES = 2


class OneByOne:
    """One iteration in the reference's order.

    Args:
        trainer: whose model, prompts, rewards, random numbers and optimizer are used.
    """

    def __init__(self, trainer: Trainer, setting: Setting) -> None:
        self.trainer, self.setting, self.model = trainer, setting, trainer.model
        self.solver = SOLVERS["euler"](trainer.model.process)
        self.forwards = 0

    def iterate(self, iteration: int, step: bool = True) -> dict[str, float]:
        """Seconds by phase. Without `step` the gradients stay where they are."""
        clock, config = Clock(), self.trainer.config
        plan = self.trainer.objective.plan(self.model, iteration)
        chosen = prompt_indices(
            len(self.trainer.prompts.texts), config.rollout.prompts_per_iteration, iteration, config.runtime.seed
        )
        scores = {name: torch.zeros(len(chosen), config.rollout.group_size) for name in self.trainer.collector.rewards}
        samples = {}
        for slot, prompt in enumerate(chosen):
            prompting = self.trainer.prompting.rows(torch.tensor([prompt])).to(self.trainer.processes.device)
            for member in range(config.rollout.group_size):
                with clock("rollout"):
                    final, kept = self._sample(plan, prompting, iteration, (slot, member))
                    self.setting.wait()
                with clock("decode"), torch.no_grad():
                    image = self.model.decode(final)
                    self.setting.wait()
                with clock("reward"):
                    for name, reward in self.trainer.collector.rewards.items():
                        text = self.trainer.prompts.scored[prompt]
                        scores[name][slot, member] = score_by_group(reward, image, [text], [slot])[0]
                samples[slot, member] = prompting, kept
        weights = {reward.name: reward.weight for reward in config.rewards}
        advantages = advantages_of({n: v.double() for n, v in scores.items()}, weights, config.advantage).values
        with clock("update"):
            self._update(plan, samples, advantages, iteration)
            if step:
                self.trainer.policy.step(self.trainer.processes)
            self.setting.wait()
        return {**clock.seconds, "total": clock.total}

    def _predict(self, latents: Tensor, sigma: float, prompting: object, guidance: float) -> Tensor:
        self.forwards += 1
        level = torch.full((1,), sigma, device=latents.device)
        row = prompting.conditions.rows(torch.tensor([0], device=latents.device))
        return self.model.predict_guided(latents, level, row, guidance, prompting.unconditional)

    @torch.no_grad()
    def _sample(self, plan: object, prompting: object, iteration: int, key: tuple[int, int]) -> tuple[Tensor, dict]:
        noise = self.trainer.collector._noise
        latents = noise(iteration, "start", [key[:1] if plan.shared_noise else key])
        kept = {}
        for i, stochastic in enumerate(plan.stochastic):
            sigma, after = plan.sigmas[i], plan.sigmas[i + 1]
            prediction = self._predict(latents, sigma, prompting, plan.guidance_scale)
            if not stochastic:
                latents = self.solver.step(latents, prediction, sigma, after)
                continue
            drawn = noise(iteration, f"step {i}", [key])
            taken = kernels.step(
                plan.kernel, latents, prediction, sigma, after, plan.eta, noise=drawn, process=self.model.process
            )
            kept[i] = latents, taken.next_sample, taken.log_prob
            latents = taken.next_sample
        return latents, kept

    def _update(self, plan: object, samples: dict, advantages: Tensor, iteration: int) -> None:
        clip = self.trainer.config.objective.clip_range
        seen = SimpleNamespace(iteration=iteration, plan=plan)
        steps = {key: self.trainer.objective._steps(seen, key) for key in samples}
        total = sum(len(chosen) for chosen in steps.values())
        for key, (prompting, kept) in samples.items():
            advantage = advantages[key].item()
            for i in steps[key]:
                latents, after, old = kept[i]
                sigma, sigma_next = plan.sigmas[i], plan.sigmas[i + 1]
                prediction = self._predict(latents, sigma, prompting, plan.guidance_scale)
                new = kernels.step(
                    plan.kernel,
                    latents,
                    prediction,
                    sigma,
                    sigma_next,
                    plan.eta,
                    next_sample=after,
                    process=self.model.process,
                )
                ratio = torch.exp(new.log_prob - old)
                worst = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
                (worst.sum() / total).backward()


def compare(setting: Setting, data: dict, prepare: Prepare) -> dict:
    """Seconds of both orders in turn, and how alike the gradients of the first iteration are."""
    trainer, _ = new_trainer(setting, data, prepare)
    other = OneByOne(trainer, setting)
    found = same_gradient(trainer, other)
    mine, theirs, other.forwards = [], [], 0
    for _ in range(TIMES):
        started = time.perf_counter()
        event = trainer.iterate()
        setting.wait()
        mine.append({**event["seconds"], "total": time.perf_counter() - started})
        theirs.append(other.iterate(trainer.iteration))
    seconds = {
        who: {phase: statistics.median(times[phase] for times in all_times) for phase in all_times[0]}
        for who, all_times in (("trainer", mine), ("one_by_one", theirs))
    }
    images = trainer.config.rollout.group_size * trainer.config.rollout.prompts_per_iteration
    return found | {
        "seconds": seconds["trainer"],
        "one_by_one": seconds["one_by_one"],
        "ratio": seconds["one_by_one"]["total"] / seconds["trainer"]["total"],
        "forwards_per_image": event["forwards_per_image"],
        "one_by_one_forwards_per_image": other.forwards / TIMES / images,
    }


def same_gradient(trainer: Trainer, other: OneByOne) -> dict:
    rollout = trainer.collector.collect(0, Clock())
    (items,) = trainer.objective.items(rollout)
    mine = torch.cat([g.flatten() for g in trainer.updater.gradient(items, rollout, 1.0, len(items))])
    every = [TrainingItem(key, step) for key in rollout.members for step in trainer.objective._steps(rollout, key)]
    if len(every) != len(items):
        raise ValueError("a group was left out of the update, so the gradients are not of the same images")
    other.iterate(0, step=False)
    theirs = torch.cat([p.grad.flatten() for p in trainer.policy.parameters.values()])
    trainer.policy.optimizer.zero_grad(set_to_none=True)
    return {
        "gradient_cosine": torch.nn.functional.cosine_similarity(mine.double(), theirs.double(), dim=0, eps=0).item(),
        "gradient_norm_ratio": (theirs.norm() / mine.norm()).item(),
    }
