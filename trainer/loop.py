"""The training loop: rollout -> reward -> advantage -> update, and what is kept of it."""

import itertools
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import lora, report
from . import rewards as judges
from .advantage import Advantages, best_of_n, group_advantages
from .conditions import all_texts, conditions_for
from .config import RunConfig
from .distributed import Processes
from .ema import MovingAverage
from .errors import BadInput, RunFailed, StopRequested
from .evaluate import Evaluation, evaluate
from .files import write_json
from .guard import Guard
from .models import model_class
from .prompting import evaluation_prompts, training_prompts
from .rollout import Plan, Prompting, Trajectories, decode, sample
from .run import Checkpoint, RunDirectory
from .schedule import Window, sigma_schedule, stochastic_steps, trained_steps
from .seeds import derive, generator, noise, prompt_indices
from .update import Actions, Statistics, split, train

Listener = Callable[[dict], None]


class Trainer:
    """One run of one description.

    Args:
        config: the description.
        run: where it is kept; None keeps nothing.
        processes: who shares it.
        listener: is handed every event, in the first process.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory | None,
        processes: Processes,
        listener: Listener = lambda event: None,
    ) -> None:
        self.config, self.run, self.processes, self.listener = config, run, processes, listener
        self.iteration, self.updates = 0, 0
        self.evaluations: list[dict] = []
        self.seconds, self.interrupted = 0.0, False
        self._prepare()

    # ------------------------------------------------------------------------------------------- preparation

    def _prepare(self) -> None:
        config = self.config
        self.prompts, self.held_out = training_prompts(config.prompts), evaluation_prompts(config.evaluation)
        self.rewards = {r.name: judges.load_reward(r) for r in config.rewards}
        watched = {r.name: judges.load_reward(r) for r in config.evaluation.rewards}
        self.judges = {**watched, **self.rewards}
        check_prompts(self.judges, [*self.prompts.texts, *self.held_out.texts])
        family = model_class(config.model)
        device = self.processes.device
        texts = all_texts(config, self.prompts, self.held_out)
        conditions = conditions_for(config, family, texts, device).to(device)
        place = torch.arange(len(texts), device=device).split([len(self.prompts.texts), len(self.held_out.texts), 1])
        negative = conditions.rows(place[2])
        self.prompting, self.held_out_prompting = (Prompting(conditions.rows(rows), negative) for rows in place[:2])
        self.model = family.load(config.model, device)
        self.targets = lora.inject(
            self.model.module, config.lora, self.model.default_targets, derive(config.runtime.seed, "lora")
        )
        self.parameters = lora.parameters(self.model.module)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self.average = MovingAverage(self.parameters, config.lora.ema_decay) if config.lora.ema_decay else None
        self.guard = Guard(config.runtime.guard, {r.name: r.weight for r in config.rewards})

    # ---------------------------------------------------------------------------------------------- the run

    def train(self) -> dict:
        """Run to the end, to a stop, or to a failure; returns the summary.

        Raises:
            RunFailed: the guard or a limit stopped it; what was learned is kept.
        """
        self._resume()
        self._status("running")
        try:
            if self.iteration == 0 and not self.evaluations:
                self._evaluate()
                self._save()
            while self.iteration < self.config.runtime.iterations:
                self._stop_if_asked()
                event = self.iterate()
                self._after(event)
            if self.evaluations and self.evaluations[-1]["iteration"] != self.iteration:
                self._evaluate()
            self._save()
        except StopRequested:
            return self._finish("stopped")
        except RunFailed as error:
            self._finish("failed", error=str(error))
            raise
        return self._finish("finished")

    def iterate(self) -> dict:
        """One iteration; returns its event."""
        started, clock = time.perf_counter(), Clock()
        trajectories, prompt_of, plan, chosen = self._rollout(clock)
        table = self._score(trajectories, chosen, clock)
        advantages = self._advantages(table)
        statistics, first, grad_norm, bad = self._update(plan, trajectories, prompt_of, chosen, advantages, clock)
        self.iteration += 1
        self.seconds += time.perf_counter() - started
        return self._event(table, advantages, trajectories, statistics, first, grad_norm, bad, clock, started)

    def _rollout(self, clock: "Clock") -> tuple[Trajectories, Tensor, Plan, list[int]]:
        config, seed, it = self.config.rollout, self.config.runtime.seed, self.iteration
        window = Window(**config.window.model_dump()) if config.window else None
        flags = stochastic_steps(config.steps, window, it, generator(seed, "window", it))
        sigmas = sigma_schedule(config.steps, config.shift)
        plan = Plan(config.kernel, config.eta, sigmas, flags, config.shared_noise, config.guidance_scale)
        chosen = prompt_indices(len(self.prompts.texts), config.prompts_per_iteration, it, seed)
        mine = self._members()
        # Only the prompts of this process's own images; their slots are numbered from 0 here.
        slots = sorted({p for p, _ in mine})
        prompt_of = torch.tensor([slots.index(p) for p, _ in mine], device=self.processes.device)
        shape = self.model.latent_shape
        if config.shared_noise:
            initial = [noise(shape, seed, "start", it, p) for p in slots]
        else:
            initial = [noise(shape, seed, "start", it, p, g) for p, g in mine]

        def step_noise(step: int) -> Tensor:
            return torch.stack([noise(shape, seed, "step", it, p, g, step) for p, g in mine]).to(self.processes.device)

        prompting = self._slots(chosen, slots)
        with clock("rollout"):
            trajectories = sample(
                self.model,
                plan,
                prompting,
                prompt_of,
                torch.stack(initial).to(self.processes.device),
                step_noise,
                batch=config.batch_size,
                keep_means=self.config.objective.ratio == "guard",
                between_calls=self._between_calls,
            )
        return trajectories, prompt_of, plan, chosen

    def _members(self) -> list[tuple[int, int]]:
        """This process's images as (prompt slot, member of the group)."""
        config = self.config.rollout
        everything = list(itertools.product(range(config.prompts_per_iteration), range(config.group_size)))
        return [everything[i] for i in self.processes.share(len(everything))]

    def _slots(self, chosen: list[int], slots: list[int]) -> Prompting:
        rows = torch.tensor([chosen[slot] for slot in slots], device=self.processes.device)
        return Prompting(self.prompting.conditions.rows(rows), self.prompting.unconditional)

    def _score(self, trajectories: Trajectories, chosen: list[int], clock: "Clock") -> dict[str, Tensor]:
        """Rewards of all processes' images, `[P, G]` per judge."""
        config = self.config.rollout
        with clock("decode"):
            images = decode(self.model, trajectories.final, config.batch_size)
        texts = [self.prompts.texts[chosen[p]] for p, _ in self._members()]
        with clock("reward"):
            columns = {name: judges.score(reward, images, texts) for name, reward in self.rewards.items()}
        self._save_samples(images)
        rows = self.processes.gather([tuple(c[i].item() for c in columns.values()) for i in range(len(texts))])
        values = torch.tensor(rows, dtype=torch.float64).reshape(config.prompts_per_iteration, config.group_size, -1)
        return {name: values[..., i] for i, name in enumerate(columns)}

    def _advantages(self, table: dict[str, Tensor]) -> Advantages:
        config = self.config.objective
        return group_advantages(
            table,
            weights={r.name: r.weight for r in self.config.rewards},
            combine=config.combine,
            normalize=config.normalize,
            floor=config.spread_floor,
            clip=config.advantage_clip,
        )

    # --------------------------------------------------------------------------------------------- update

    def _update(
        self,
        plan: Plan,
        trajectories: Trajectories,
        prompt_of: Tensor,
        chosen: list[int],
        advantages: Advantages,
        clock: "Clock",
    ) -> tuple[Statistics, Statistics, float | None, int]:
        """All optimizer steps of an iteration.

        Returns:
            statistics of all updates, those of the first alone (whose ratios are 1 but for rounding), the largest
            gradient norm, and how many updates were left out because they were not finite.
        """
        device = self.processes.device
        mine = self._members()
        slots = sorted({p for p, _ in mine})
        actions = Actions(
            plan=plan,
            prompting=self._slots(chosen, slots),
            trajectories=trajectories,
            prompt_of=prompt_of,
            advantages=torch.tensor([advantages.values[p, g] for p, g in mine], device=device),
        )
        local = {member: i for i, member in enumerate(mine)}
        every, first = Statistics.zeros(device), None
        norms, bad = [], 0
        for part in self._parts(plan, advantages):
            here = [(local[member], step) for member, step in part if member in local]
            current = Statistics.zeros(device)
            with clock("update"):
                train(self.model, actions, here, len(part), self.config.objective, current, self._between_calls)
                norm = self._step()
            norms, bad = (norms, bad + 1) if norm is None else ([*norms, norm], bad)
            first = first or current
            every = every.plus(current)
        return every, first or every, max(norms) if norms else None, bad

    def _parts(self, plan: Plan, advantages: Advantages) -> Iterator[list[tuple[tuple[int, int], int]]]:
        """Per update, its ((prompt slot, member), step) actions over all processes."""
        objective, seed = self.config.objective, self.config.runtime.seed
        active = ~advantages.dropped & ~advantages.skipped[:, None]
        if objective.best_of_n:
            active &= best_of_n(advantages.values, objective.best_of_n)
        groups = [[(p, g) for g in row.nonzero().flatten().tolist()] for p, row in enumerate(active)]
        for members in split(groups, objective.updates):
            if not members:
                continue
            yield [
                (member, step)
                for member in members
                for step in trained_steps(
                    plan.stochastic,
                    objective.train_steps,
                    objective.step_fraction,
                    generator(seed, "steps", self.iteration, *member),
                )
            ]

    def _step(self) -> float | None:
        """One optimizer step with the gradients of all processes; the gradient norm, or None if it was left out."""
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.processes.sum_(gradients)
        config = self.config.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm).item()
        finite = math.isfinite(norm)
        if finite:
            warm = min(1.0, (self.updates + 1) / config.warmup) if config.warmup else 1.0
            self.optimizer.param_groups[0]["lr"] = config.learning_rate * warm
            self.optimizer.step()
            if self.average:
                self.average.update(self.parameters, self.updates)
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm if finite else None

    # --------------------------------------------------------------------------------------------- keeping

    def _event(
        self,
        table: dict[str, Tensor],
        advantages: Advantages,
        trajectories: Trajectories,
        statistics: Statistics,
        first: Statistics,
        grad_norm: float | None,
        bad: int,
        clock: "Clock",
        started: float,
    ) -> dict:
        total, start = (s.totals(self.processes) for s in (statistics, first))
        count = max(total["actions"], 1)
        images = self.config.rollout.prompts_per_iteration * self.config.rollout.group_size
        evaluations = trajectories.evaluations + statistics.evaluations
        clip_range = self.config.objective.clip_range
        if start["largest"] > clip_range / 10 and self.processes.is_main:
            print(
                f"warning: iteration {self.iteration}: before the first update a ratio is {start['largest']:.2g} from 1, "
                f"above a tenth of the clip range {clip_range:g}",
                file=sys.stderr,
            )
        return {
            "iteration": self.iteration,
            "rewards": {name: _moments(value, advantages.spread[name]) for name, value in table.items()},
            "advantage_std": advantages.values.std().item(),
            "ratio": {
                "mean": total["ratio_sum"] / count if total["actions"] else 1.0,
                "mean_deviation": total["deviation_sum"] / count,
                "max_deviation": total["largest"],
                "max_deviation_before_update": start["largest"],
            },
            "clip_fraction": total["clipped"] / count,
            "loss": total["loss"] / count,
            "kl": total["kl"] / count if self.config.objective.kl_weight else None,
            "grad_norm": grad_norm,
            "bad_updates": bad,
            "skipped_groups": int(advantages.skipped.sum()),
            "dropped_samples": int(advantages.dropped.sum()),
            "actions": total["actions"],
            "evaluations_per_image": sum(self.processes.gather([evaluations])) / images,
            "seconds": {**clock.seconds, "total": time.perf_counter() - started},
            "memory_mb": peak_memory(self.processes.device),
        }

    def _after(self, event: dict) -> None:
        improved, verdict = self.guard.watch(event)
        if self.processes.is_main:
            if self.run:
                self.run.append_event(event)
            self.listener(event)
        every = self.config.evaluation.every
        if every and self.iteration % every == 0 and self.iteration < self.config.runtime.iterations:
            self._evaluate()
        if improved and self.run and self.processes.is_main:
            self._save_lora(self.run.path / "best.safetensors")
        if self.iteration % self.config.runtime.checkpoint_every == 0 or verdict:
            self._save()
        if verdict:
            self._fall_back_to_best()
            raise RunFailed(f"stopped at iteration {self.iteration}: {verdict}; lora.safetensors holds the best LoRA")

    def _evaluate(self) -> Evaluation | None:
        if not self.held_out.texts:
            return None
        config = self.config.evaluation
        with self._averaged():
            result = evaluate(
                self.model,
                self.held_out,
                self.held_out_prompting,
                self.judges,
                self.processes,
                steps=config.steps or self.config.rollout.steps,
                shift=self.config.rollout.shift,
                guidance_scale=self.config.rollout.guidance_scale
                if config.guidance_scale is None
                else config.guidance_scale,
                images_per_prompt=config.images_per_prompt,
                seed=config.seed,
                batch=self.config.rollout.batch_size,
            )
        self.evaluations.append({"iteration": self.iteration, "seconds": self.seconds, **result.record()})
        if self.processes.is_main:
            if self.run:
                picture = report.grid(result.images, columns=6)
                report.save_picture(self._picture(self.iteration), picture)
            self.listener({"evaluation": self.evaluations[-1]})
        return result

    def _picture(self, iteration: int) -> Path:
        return self.run.path / "samples" / f"evaluation_{iteration:06d}.png"

    def _save_samples(self, images: Tensor) -> None:
        every = self.config.runtime.samples_every
        if self.run and self.processes.is_main and every and self.iteration % every == 0:
            group = min(self.config.rollout.group_size, 12)
            picture = report.grid(images[: 4 * group].cpu(), columns=group, largest=96)
            report.save_picture(self.run.path / "samples" / f"rollout_{self.iteration:06d}.png", picture)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self.average is None:
            yield
            return
        with lora.swapped(self.model.module, self.average.weights):
            yield

    def _save_lora(self, path: Path) -> None:
        weights = self.average.weights if self.average else self.parameters
        config = self.config
        metadata = {
            "base_model": f"{config.model.family} {config.model.path}",
            "rewards": json.dumps({r.name: r.weight for r in config.rewards}),
            "iteration": str(self.iteration),
            "description": json.dumps(config.model_dump(mode="json")),
        }
        lora.save(path, lora.comfy_weights(weights, config.lora.alpha, self.model.lora_key), metadata)

    def _save(self) -> None:
        """Checkpoint, LoRA and status, in this order."""
        if not self.run or not self.processes.is_main:
            return
        self.run.save_checkpoint(
            self.iteration, Checkpoint(self._tensors(), self._state()), self.config.runtime.keep_checkpoints
        )
        self._save_lora(self.run.path / "lora.safetensors")
        self._status("running")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"lora/{name}": p for name, p in self.parameters.items()}
        if self.average:
            tensors |= {f"average/{name}": value for name, value in self.average.weights.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"optimizer/{name}/{k}": v for k, v in self.optimizer.state.get(parameter, {}).items()}
        return tensors

    def _state(self) -> dict:
        return {
            "iteration": self.iteration,
            "updates": self.updates,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "guard": self.guard.state(),
        }

    def _resume(self) -> None:
        if not self.run:
            return
        checkpoint, complaints = self.run.load_checkpoint()
        for complaint in complaints:
            if self.processes.is_main:
                print(f"warning: {complaint}", file=sys.stderr)
        self.processes.wait()
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.processes.is_main:
            self.run.keep_events(self.iteration)
            self.run.stop_file.unlink(missing_ok=True)
        self.processes.wait()

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        lora.load(self.model.module, {name: tensors[f"lora/{name}"] for name in self.parameters})
        if self.average:
            self.average.weights = {n: tensors[f"average/{n}"].to(p.device) for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            prefix = f"optimizer/{name}/"
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else v.to(parameter.device).clone() for k, v in moments.items()
                }
        self.iteration, self.updates = state["iteration"], state["updates"]
        self.seconds, self.evaluations = state["seconds"], state["evaluations"]
        self.guard.restore(state["guard"])

    def _fall_back_to_best(self) -> None:
        if self.run and self.processes.is_main and (self.run.path / "best.safetensors").exists():
            from .files import write_atomically

            write_atomically(self.run.path / "lora.safetensors", (self.run.path / "best.safetensors").read_bytes())

    def _finish(self, state: str, error: str | None = None) -> dict:
        summary = self.summary(state, error)
        if self.run and self.processes.is_main:
            folder = self.run.path / "report"
            report.reward_curve(folder / "reward_curve.png", self.run.events(), self.evaluations)
            if len(self.evaluations) > 1:
                first, last = (self._picture(e["iteration"]) for e in (self.evaluations[0], self.evaluations[-1]))
                report.before_after(first, last, folder / "before_after.png")
            write_json(folder / "summary.json", summary)
            self._status(state, error=error)
        return summary

    def summary(self, state: str, error: str | None = None) -> dict:
        """What report/summary.json holds."""
        before = self.evaluations[0] if self.evaluations else None
        after = self.evaluations[-1] if len(self.evaluations) > 1 else None
        return {
            "state": state,
            "error": error,
            "iterations": self.iteration,
            "seconds": round(self.seconds, 3),
            "eval": {"before": before, "after": after},
            "evaluations": self.evaluations,
            "lora": str((self.run.path / "lora.safetensors").resolve()) if self.run else None,
            "lora_modules": len(self.targets),
        }

    def _status(self, state: str, error: str | None = None) -> None:
        if self.run and self.processes.is_main:
            total = self.config.runtime.iterations
            self.run.write_status(state, iteration=self.iteration, iterations=total, error=error)

    # -------------------------------------------------------------------------------------------- stopping

    def _asked(self) -> bool:
        return self.interrupted or (self.run is not None and self.run.stop_requested())

    def _stop_if_asked(self) -> None:
        if self.processes.any(self._asked()):
            raise StopRequested

    def _between_calls(self) -> None:
        # Several processes must agree, so they only look between iterations.
        if self.processes.count == 1 and self._asked():
            raise StopRequested


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def check_prompts(rewards: dict[str, judges.Reward], texts: list[str]) -> None:
    """Raise BadInput where a reward cannot judge a prompt."""
    for name, reward in rewards.items():
        try:
            reward.check_prompts(texts)
        except ValueError as error:
            raise BadInput(f"reward {name!r}: {error}") from error


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in MB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 2**20


def _moments(values: Tensor, spread: float) -> dict[str, float | None]:
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return {"mean": None, "std": None, "spread": 0.0}
    return {"mean": finite.mean().item(), "std": finite.std().item(), "spread": spread}
