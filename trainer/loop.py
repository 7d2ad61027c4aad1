"""The training loop: rollout -> reward -> advantage -> update."""

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import preflight
from . import rewards as judges
from .config import RunConfig
from .diffusion.schedules import Window, stochastic_steps, trained_steps
from .evaluate import Mixture, evaluate
from .models import check_kernel, model_class
from .objectives.advantage import Advantages, best_of_n, group_advantages
from .objectives.engine import Actions, Statistics, split, train
from .policy import Policy
from .prompts.conditions import conditions_for
from .prompts.sets import read_prompts
from .rollout import Plan, Prompting, Trajectories, decode, own, sample
from .runs.directory import Checkpoint, RunDirectory
from .runs.metrics import Clock, peak_memory, ratio_record, reward_record, warn_of_ratio, without_nan
from .runs.recorder import Keeper
from .runs.watchdog import Guard
from .score import fps_notes, score_by_group
from .utils.distributed import Processes
from .utils.errors import BadInput, RunFailed, StopRequested
from .utils.seeds import generator, noise, prompt_indices

Member = tuple[int, int]
"""An image of an iteration: (prompt slot, place in the group)."""


class Trainer:
    """One run of one description.

    Args:
        config: the description.
        run: where it is kept; None keeps nothing.
        processes: who shares it.
        listener: is handed every event, in the first process.

    Raises:
        BadInput: files, prompts or rewards that do not fit; nothing large is loaded before these checks.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory | None,
        processes: Processes,
        listener: Callable[[dict], None] = lambda event: None,
    ) -> None:
        self.config, self.processes, self.listener = config, processes, listener
        self.iteration, self.seconds = 0, 0.0
        self.evaluations: list[dict] = []
        self.interrupted, self.sampled, self.begun = False, {}, 0
        if processes.count > config.rollout.prompts_per_iteration * config.rollout.group_size:
            raise BadInput(f"{processes.count} processes are more than the images of an iteration")
        self.prompts, self.held_out = read_prompts(config)
        self.rewards = {r.name: judges.load_reward(r) for r in config.rewards}
        self.judges = {r.name: judges.load_reward(r) for r in config.evaluation.rewards} | self.rewards
        check_groups(self.rewards, processes.count)
        check_media(self.judges, config.model.frames)
        check_prompts(self.judges, [*self.prompts.scored, *self.held_out.scored])
        if config.model.sharded and processes.count == 1:
            raise BadInput("model.sharded is true: it takes several processes, and this run has one (--processes)")
        self.calls = processes.most if config.model.sharded else own
        family = model_class(config.model)
        check_kernel(family, config.model.family, config.rollout)
        family.check_targets(config.model, config.lora.targets or [])
        notes = [*family.notes(config.model), *fps_notes(self.judges, config.model.fps)]
        for note in notes if processes.is_main else []:
            print(f"warning: {note}", file=sys.stderr)
        for judge in self.judges.values():
            judge.load()
        self.prompting, self.held_out_prompting = self._encode(family, run)
        self.model = family.load(config.model, processes.device)
        check_kernel(self.model, config.model.family, config.rollout)
        self.policy = Policy(self.model, config)
        self.guard = Guard(config.runtime.guard, {r.name: r.weight for r in config.rewards})
        self.keeper = Keeper(run, config, self.policy, writes=processes.is_main)

    def _encode(self, family: type, run: RunDirectory | None) -> tuple[Prompting, Prompting]:
        """Conditions of the training prompts and of the held-out prompts."""
        folder = None if run is None else run.path
        found = conditions_for(self.config, family, self.prompts, self.held_out, self.processes, folder)
        unconditional = None if found.unconditional is None else found.unconditional.to(self.processes.device)
        return Prompting(found.training, unconditional), Prompting(found.held_out, unconditional)

    # ---------------------------------------------------------------------------------------------- the run

    def train(self) -> dict:
        """Run to the end, to a stop, or to a failure; returns the summary.

        Raises:
            RunFailed: the guard or a limit stopped it; what was learned is kept.
        """
        self._resume()
        self.keeper.status("running", self.iteration)
        try:
            if self.model.needs_opening_check:
                preflight.check(self.model, self._plan(), self.prompting, self.config.objective.clip_range)
            while self.iteration < self.config.runtime.iterations:
                self._stop_if_asked()
                if self._evaluation_is_due():
                    self.evaluate()
                    self._save()
                self._after(self.iterate())
            if self.evaluations and self.evaluations[-1]["iteration"] != self.iteration:
                self.evaluate()
            self._save()
        except StopRequested:
            self.keeper.status("stopping", self.iteration)
            self._save()
            return self._finish("stopped")
        except RunFailed as error:
            self._finish("failed", str(error))
            raise
        return self._finish("finished")

    def iterate(self) -> dict:
        """One iteration; returns its event."""
        clock = Clock()
        chosen = prompt_indices(
            len(self.prompts.texts), self.config.rollout.prompts_per_iteration, self.iteration, self.config.runtime.seed
        )
        self.begun = self.policy.updates
        if self.keeper.writes:
            self.sampled = self.policy.result()  # what the coming rewards speak of
        actions = self._rollout(chosen, clock)
        table = self._score(actions.trajectories, chosen, clock)
        advantages = self._advantages(table)
        every, first, grad_norm, bad = self._update(actions, advantages, clock)
        self.iteration += 1
        self.seconds += clock.total
        evaluations = sum(self.processes.gather([actions.trajectories.evaluations + every["evaluations"]]))
        count = max(every["actions"], 1)
        event = {
            "iteration": self.iteration,
            "rewards": reward_record(table, advantages),
            "advantage_std": advantages.values.std().item(),
            "ratio": ratio_record(every, first),
            "clip_fraction": every["clipped"] / count,
            "loss": every["loss"] / count,
            "kl": every["kl"] / count if self.config.objective.kl_weight else None,
            "grad_norm": grad_norm,
            "bad_updates": bad,
            "skipped_groups": int(advantages.skipped.sum()),
            "dropped_samples": int(advantages.dropped.sum()),
            "actions": every["actions"],
            "evaluations_per_image": evaluations / advantages.values.numel(),
            "seconds": {**clock.seconds, "total": clock.total},
            "memory_mb": peak_memory(self.processes.device),
        }
        return without_nan(event)

    # -------------------------------------------------------------------------------------------- rollout

    def _members(self) -> list[Member]:
        """This process's images."""
        config = self.config.rollout
        everything = list(itertools.product(range(config.prompts_per_iteration), range(config.group_size)))
        return [everything[i] for i in self.processes.share(len(everything))]

    def _plan(self) -> Plan:
        config, seed = self.config.rollout, self.config.runtime.seed
        window = Window(**config.window.model_dump()) if config.window else None
        flags = stochastic_steps(config.steps, window, self.iteration, generator(seed, "window", self.iteration))
        sigmas = self.model.sigmas(config.steps, config.shift)
        return Plan(config.kernel, config.eta, sigmas, flags, config.shared_noise, config.guidance_scale)

    def _rollout(self, chosen: list[int], clock: Clock) -> Actions:
        """Sample this process's trajectories; advantages are still to come."""
        plan, mine, device = self._plan(), self._members(), self.processes.device
        slots = sorted({slot for slot, _ in mine})
        prompt_of = torch.tensor([slots.index(slot) for slot, _ in mine], device=device)
        rows = torch.tensor([chosen[slot] for slot in slots])
        prompting = Prompting(self.prompting.conditions.rows(rows).to(device), self.prompting.unconditional)
        starts = [(slot,) for slot in slots] if plan.shared_noise else mine
        with clock("rollout"):
            trajectories = sample(
                self.model,
                plan,
                prompting,
                prompt_of,
                self._noise("start", starts),
                lambda step: self._noise(f"step {step}", mine),
                batch=self.config.rollout.batch_size,
                keep_means=self.config.objective.ratio == "guard",
                between_calls=self._between_calls,
                calls=self.calls,
            )
        return Actions(plan, prompting, trajectories, prompt_of)

    def _noise(self, use: str, places: list[tuple[int, ...]]) -> Tensor:
        shape, seed = self.model.latent_shape, self.config.runtime.seed
        drawn = [noise(shape, seed, use, self.iteration, *place) for place in places]
        return torch.stack(drawn).to(self.processes.device)

    # --------------------------------------------------------------------------------- reward and advantage

    def _score(self, trajectories: Trajectories, chosen: list[int], clock: Clock) -> dict[str, Tensor]:
        """Rewards of all processes' images, `[P, G]` per judge."""
        config = self.config.rollout
        with clock("decode"):
            images = decode(self.model, trajectories.final, config.batch_size)
        slots = [slot for slot, _ in self._members()]
        texts = [self.prompts.scored[chosen[slot]] for slot in slots]
        with clock("reward"):
            columns = {
                name: score_by_group(reward, images, texts, slots).tolist() for name, reward in self.rewards.items()
            }
            for reward in self.rewards.values():
                reward.idle()
        self.keeper.rollout_picture(images, self.iteration)
        rows = self.processes.gather(list(zip(*columns.values(), strict=True)))
        values = torch.tensor(rows, dtype=torch.float64)
        shape = (config.prompts_per_iteration, config.group_size)
        return {name: values[:, i].reshape(shape) for i, name in enumerate(columns)}

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
        self, actions: Actions, advantages: Advantages, clock: Clock
    ) -> tuple[dict[str, float], dict[str, float], float | None, int]:
        """All optimizer steps of an iteration.

        Returns:
            statistics of all updates, those of the first alone (whose ratios are 1 but for rounding), the largest
            gradient norm, and how many updates were left out because they were not finite.
        """
        device, mine = self.processes.device, self._members()
        values = torch.tensor([advantages.values[member] for member in mine], device=device)
        place = {member: i for i, member in enumerate(mine)}
        each, norms = [], []
        with clock("update"):
            for part in self._parts(actions.plan, advantages):
                here = [(place[member], step) for member, step in part if member in place]
                each.append(Statistics.zeros(device))
                config = self.config.objective
                train(self.model, actions, values, here, len(part), config, each[-1], self._between_calls, self.calls)
                norms.append(self.policy.step(self.processes))
        each = each or [Statistics.zeros(device)]
        total = each[0]
        for statistics in each[1:]:
            total = total.plus(statistics)
        finite = [norm for norm in norms if norm is not None]
        bad = len(norms) - len(finite)
        return total.totals(self.processes), each[0].totals(self.processes), max(finite, default=None), bad

    def _parts(self, plan: Plan, advantages: Advantages) -> Iterator[list[tuple[Member, int]]]:
        """Per update, its (member, step) actions over all processes."""
        objective, seed = self.config.objective, self.config.runtime.seed
        active = ~advantages.dropped & ~advantages.skipped[:, None]
        if objective.best_of_n:
            active = best_of_n(advantages.values, objective.best_of_n, active)
        groups = [[(slot, g) for g in row.nonzero().flatten().tolist()] for slot, row in enumerate(active)]
        for members in split(groups, objective.updates):
            if not members:
                continue
            yield [
                (member, step)
                for member in members
                for step in trained_steps(
                    plan.stochastic,
                    "all" if self.config.rollout.window else objective.train_steps,
                    objective.step_fraction,
                    generator(seed, "steps", self.iteration, *member),
                )
            ]

    # ------------------------------------------------------------------------------------ after an iteration

    def _after(self, event: dict) -> None:
        improved, verdict = self.guard.watch(event)
        self.keeper.event(event)
        if self.processes.is_main:
            warn_of_ratio(event, self.config.objective.clip_range)
            self.listener(event)
        if improved:
            self.keeper.best(self.iteration - 1, self.sampled)
        if self.iteration % self.config.runtime.checkpoint_every == 0 or verdict:
            self._save()
        if verdict:
            kept = self.keeper.fall_back_to_best()
            raise RunFailed(f"stopped at iteration {self.iteration}: {verdict}; {kept}")

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluation.every
        wanted = self.iteration == 0 or (every > 0 and self.iteration % every == 0)
        return wanted and self.iteration not in [record["iteration"] for record in self.evaluations]

    def evaluate(self) -> None:
        """Judge the held-out prompts, where there are any, and record it."""
        if not self.held_out.texts:
            return
        config, rollout = self.config.evaluation, self.config.rollout
        self.begun = self.policy.updates
        with self.policy.averaged():
            result = evaluate(
                self.model,
                self.held_out,
                self.held_out_prompting,
                self.judges,
                self.processes,
                steps=config.steps or rollout.steps,
                shift=rollout.shift,
                guidance_scale=rollout.guidance_scale if config.guidance_scale is None else config.guidance_scale,
                images_per_prompt=config.images_per_prompt,
                seed=config.seed,
                batch=rollout.batch_size,
                mixture=self._mixture(),
                between_calls=self._between_calls,
                calls=self.calls,
            )
        record = {"iteration": self.iteration, "seconds": self.seconds, **result.record()}
        self.evaluations.append(record)
        self.keeper.evaluation_picture(result.images, self.iteration)
        if self.processes.is_main:
            self.listener({"evaluation": record})

    def _mixture(self) -> Mixture | None:
        if len(self.config.rewards) < 2:
            return None
        weights = {reward.name: reward.weight for reward in self.config.rewards}
        if self.config.objective.combine == "sum":
            return Mixture(weights, dict.fromkeys(weights, 1.0))
        return Mixture(weights, self.evaluations[0]["spread"] if self.evaluations else None)

    # ------------------------------------------------------------------------------ keeping, resuming, stopping

    def _save(self) -> None:
        state = {
            "iteration": self.iteration,
            "updates": self.policy.updates,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "guard": self.guard.state(),
            "prompts": self._prompts_digest(),
        }
        self.keeper.newest(self.iteration, state)
        self.keeper.status("running", self.iteration)

    def _resume(self) -> None:
        checkpoint = self.keeper.newest_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)
        if len(set(self.processes.gather([self.iteration]))) > 1:
            raise BadInput(
                "the processes found different checkpoints: the run directory must be one that all hosts share"
            )
        self.keeper.begin(self.iteration)
        self.processes.wait()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["prompts"] != self._prompts_digest():
            raise BadInput("the prompts of this run have changed since it was stopped; start another run for them")
        self.policy.restore(checkpoint.tensors, state["updates"])
        self.iteration, self.seconds, self.evaluations = state["iteration"], state["seconds"], state["evaluations"]
        self.guard.restore(state["guard"])

    def _prompts_digest(self) -> str:
        return hashlib.sha256(json.dumps([self.prompts.keys, self.held_out.keys]).encode()).hexdigest()

    def _finish(self, state: str, error: str | None = None) -> dict:
        return self.keeper.finish(state, self.iteration, self.seconds, self.evaluations, error)

    def _asked(self) -> bool:
        run = self.keeper.run
        return self.interrupted or (run is not None and run.stop_requested())

    def _stop_if_asked(self) -> None:
        if self.processes.any(self._asked()):
            raise StopRequested

    def _between_calls(self) -> None:
        # Several processes must agree, so they only look between iterations; and what is saved is whole iterations.
        if self.processes.count == 1 and self.policy.updates == self.begun and self._asked():
            raise StopRequested


def check_groups(rewards: dict[str, judges.Reward], processes: int) -> None:
    """Raise BadInput where a reward compares the images of a group that several processes share."""
    for name, reward in rewards.items():
        if reward.groupwise and processes > 1:
            raise BadInput(f"reward {name!r} compares all images of a group: it works in one process, not {processes}")


def check_media(rewards: dict[str, judges.Reward], frames: int) -> None:
    """Raise BadInput where a reward judges videos, and the model makes images."""
    for name, reward in rewards.items():
        if reward.media == "video" and frames < 2:
            raise BadInput(f"reward {name!r} judges videos, and model.frames is {frames}: give it a model of videos")


def check_prompts(rewards: dict[str, judges.Reward], texts: list[str]) -> None:
    """Raise BadInput where a reward cannot judge a prompt."""
    for name, reward in rewards.items():
        try:
            reward.check_prompts(texts)
        except ValueError as error:
            raise BadInput(f"reward {name!r}: {error}") from error
