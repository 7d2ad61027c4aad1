"""The training loop: rollout -> reward -> advantage -> update."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from . import preflight
from .adapters.start import check_start
from .check import Checked, check_run
from .collect import Collector, gather_scores
from .config import RunConfig
from .evaluate import Evaluator
from .models import check_kernel
from .objectives.advantage import mean_group_std
from .objectives.base import Experience, Resources
from .objectives.engine import Engine, Update
from .policy import Policy
from .prompts.conditions import conditions_for
from .rollout import Execution, Prompting, unmatched
from .runs.directory import Checkpoint, RunDirectory
from .runs.metrics import Clock, peak_memory, reward_record, without_nan
from .runs.recorder import Recorder
from .runs.watchdog import Watchdog
from .score import fps_notes
from .utils.distributed import Processes
from .utils.errors import BadInput, RunFailed, StoppedByWatchdog, StopRequested


class Trainer:
    """One run of one description.

    Args:
        config: the description.
        run: where it is kept; None keeps nothing.
        processes: who shares it.
        listener: is handed every event, and the progress inside iterations, in the first process.

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
        self.config, self.run, self.processes, self.listener = config, run, processes, listener
        self.iteration, self.seconds = 0, 0.0
        self.evaluations: list[dict] = []
        self.interrupted, self.updates_before = False, 0
        self.sampled: dict[str, torch.Tensor] = {}
        checked = check_run(config, processes.count)
        if run is None or not run.checkpoints():
            check_start(config.lora)
        self.recorder = Recorder(run, config, None, processes.is_main, listener)
        self.objective, self.prompts, self.held_out = checked.objective, checked.prompts, checked.held_out
        notes = [*checked.family.notes(config.model), *fps_notes(checked.all_rewards, config.model.fps)]
        for note in notes if processes.is_main else []:
            print(f"warning: {note}", file=sys.stderr)
        for reward in checked.all_rewards.values():
            reward.load()
        self.prompting, self.held_out_prompting = self._encode(checked.family, run)
        self.model = checked.family.load(config.model, processes.device)
        check_kernel(self.model, config.model.family, config.rollout)
        for reward in checked.all_rewards.values():
            reward.register_memory_hook(self.model.make_room)
        self.policy = Policy(self.model, config, self.objective.keeps_old_weights)
        self.objective.setup(Resources(self.model, self.policy, checked.rewards, self.prompting, processes))
        weights = {reward.name: reward.weight for reward in config.rewards}
        self.watchdog = Watchdog(config.runtime.watchdog, weights)
        self.recorder.policy = self.policy
        self._assemble(checked)

    def _encode(self, family: type, run: RunDirectory | None) -> tuple[Prompting, Prompting]:
        """Conditions of the training prompts and of the held-out prompts."""
        self.recorder.progress("encoding", 0, len(self.prompts.texts) + len(self.held_out.texts))
        folder = None if run is None else run.path
        found = conditions_for(self.config, family, self.prompts, self.held_out, self.processes, folder)
        unconditional = None if found.unconditional is None else found.unconditional.to(self.processes.device)
        return Prompting(found.training, unconditional), Prompting(found.held_out, unconditional)

    def _assemble(self, checked: Checked) -> None:
        """The parts of an iteration."""
        config, processes = self.config, self.processes
        match = processes.most if config.model.sharded else unmatched
        execution = Execution(config.rollout.batch_size, match, self._report)
        self.collector = Collector(config, checked, self.model, self.prompting, processes, execution, self.recorder)
        self.engine = Engine(self.objective, self.model, self.policy, processes, execution)
        self.evaluator = Evaluator(config, checked, self.model, self.held_out_prompting, processes, execution)

    # ---------------------------------------------------------------------------------------------- the run

    def train(self) -> dict:
        """Run to the end, to a stop, or to a failure; returns the summary.

        Raises:
            RunFailed: the watchdog or a limit stopped it; what was learned is kept.
        """
        self._resume()
        self.recorder.status("running", self.iteration)
        try:
            if self.model.needs_opening_check:
                preflight.check(self.engine, self.prompting, self.prompts.texts)
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
            self.recorder.status("stopping", self.iteration)
            self._save()
            return self._finish("stopped")
        except RunFailed as error:
            self._finish("failed", str(error))
            raise
        return self._finish("finished")

    def iterate(self) -> dict:
        """One iteration; returns its event."""
        clock = Clock()
        self.updates_before = self.policy.updates
        if self.recorder.writes:
            self.sampled = self.policy.result()  # the LoRA that the coming rewards are about
        experience = self.collector.collect(self.iteration, clock)
        with clock("update"):
            update = self.engine.update(experience)
        self.objective.after_iteration(self.iteration)
        if not self.objective.needs_advantages:
            experience.scores = gather_scores(experience.scores, self.processes)
            spread = mean_group_std(experience.scores)
            experience.advantages = replace(experience.advantages, spread=spread)
        self.iteration += 1
        self.seconds += clock.total
        return without_nan(self._event(experience, update, clock))

    def _event(self, experience: Experience, update: Update, clock: Clock) -> dict:
        advantages, every = experience.advantages, update.every
        forwards = sum(self.processes.gather([experience.trajectories.forwards + every.forwards]))
        return {
            "iteration": self.iteration,
            "rewards": reward_record(experience.scores, advantages),
            "advantage_std": advantages.values.std().item(),
            "objective": self.objective.record(every, update.first),
            "loss": every.loss / max(every.items, 1),
            "grad_norm": update.grad_norm,
            "bad_updates": update.bad,
            "skipped_groups": int(advantages.skipped.sum()),
            "dropped_samples": int(advantages.dropped.sum()),
            "forwards_per_image": forwards / advantages.values.numel(),
            "seconds": {**clock.seconds, "total": clock.total},
            "memory_mb": peak_memory(self.processes.device),
        }

    def _after(self, event: dict) -> None:
        improved, verdict = self.watchdog.watch(event, self.objective.alarm(event["objective"]))
        self.recorder.event(event)
        if self.processes.is_main:
            if warning := self.objective.warning(event["objective"]):
                print(f"warning: iteration {event['iteration']}: {warning}", file=sys.stderr)
            self.listener(event)
        if improved:
            self.recorder.best(self.iteration - 1, self.sampled)
        if self.iteration % self.config.runtime.checkpoint_every == 0 or verdict:
            self._save()
        if verdict:
            kept = self.recorder.fall_back_to_best()
            raise StoppedByWatchdog(f"stopped at iteration {self.iteration}: {verdict}; {kept}")

    # ------------------------------------------------------------------------------------------- evaluation

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluation.every
        wanted = self.iteration == 0 or (every > 0 and self.iteration % every == 0)
        return wanted and self.iteration not in [record["iteration"] for record in self.evaluations]

    def evaluate(self) -> None:
        """Score images of the held-out prompts, where there are any, and record the result."""
        if not self.held_out.texts:
            return
        self.updates_before = self.policy.updates
        with self.policy.using("average"):
            result = self.evaluator.evaluate(self.evaluations[0] if self.evaluations else None)
        record = {"iteration": self.iteration, "seconds": self.seconds, **result.record()}
        self.evaluations.append(record)
        if (warning := self.watchdog.diversity_warning(self.evaluations[0], record)) and self.processes.is_main:
            print(f"warning: iteration {self.iteration}: {warning}", file=sys.stderr)
        self.recorder.evaluation(record, result.images, result.samples)
        if self.processes.is_main:
            self.listener({"evaluation": record})

    # ------------------------------------------------------------------------------ keeping, resuming, stopping

    def _save(self) -> None:
        state = {
            "iteration": self.iteration,
            "updates": self.policy.updates,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "watchdog": self.watchdog.state(),
            "objective": self.objective.state(),
            "engine": self.engine.state(),
            "prompts": self._prompts_digest(),
        }
        self.recorder.newest(self.iteration, state)
        self.recorder.status("running", self.iteration)

    def _resume(self) -> None:
        checkpoint = self.recorder.newest_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self.policy.start()
        if len(set(self.processes.gather([self.iteration]))) > 1:
            raise BadInput(
                "the processes found different checkpoints: the run directory must be one that all hosts share"
            )
        self.recorder.begin(self.iteration)
        self.processes.wait()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["prompts"] != self._prompts_digest():
            raise BadInput("the prompts of this run have changed since it was stopped; start another run for them")
        self.policy.restore(checkpoint.tensors, state["updates"])
        self.iteration, self.seconds, self.evaluations = state["iteration"], state["seconds"], state["evaluations"]
        self.watchdog.restore(state["watchdog"])
        self.objective.restore(state["objective"])
        self.engine.restore(state["engine"])

    def _prompts_digest(self) -> str:
        return hashlib.sha256(json.dumps([self.prompts.keys, self.held_out.keys]).encode()).hexdigest()

    def _finish(self, state: str, error: str | None = None) -> dict:
        return self.recorder.finish(state, self.iteration, self.seconds, self.evaluations, error)

    def _stop_is_asked(self) -> bool:
        return self.interrupted or (self.run is not None and self.run.stop_requested())

    def _stop_if_asked(self) -> None:
        if self.processes.any(self._stop_is_asked()):
            raise StopRequested

    def _report(self, phase: str, step: int, steps: int, *, aligned: bool = False) -> None:
        """Say how far the iteration is, and stop it where that was asked for and loses nothing.

        What is saved is whole iterations, so none is cut short after its first optimizer step. Several processes must
        agree, so they only look at steps that all of them come to.
        """
        self.recorder.progress(phase, step, steps)
        may_stop = aligned or self.processes.count == 1
        if may_stop and self.policy.updates == self.updates_before:
            self._stop_if_asked()
