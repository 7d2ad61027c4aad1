"""The training loop: rollout -> reward -> advantage -> update."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from . import preflight
from .adapters.merge import check_merged, sampling
from .adapters.start import check_start
from .check import CheckedRun, check_run
from .collect import Collector, gather_scores
from .config import RunConfig
from .estimate.memory import with_reserve
from .estimate.pace import Pace
from .evaluate import Evaluator
from .models import check_kernel
from .models.distilled import distilled_notes
from .objectives.advantage import mean_group_std
from .objectives.base import Resources, RolloutBatch
from .objectives.updater import Update, Updater
from .policy import Policy
from .prompts.conditions import conditions_for
from .rewards import dtypes, use_dtypes
from .rollout import Execution, Prompting, unmatched
from .runs.directory import Checkpoint, RunDirectory
from .runs.metrics import Clock, peak_memory, reward_record, without_nan
from .runs.recorder import Recorder
from .runs.watchdog import Watchdog
from .score import fps_notes
from .utils.distributed import Processes
from .utils.errors import BadInput, RunFailed, StoppedByWatchdog, StopRequested
from .utils.precision import tf32


class Trainer:
    """Loads the models of a run and trains it.

    Args:
        config: the run description.
        run: the run directory; None writes nothing to disk.
        processes: the processes that train together.
        listener: called in the main process with every event and with the progress inside iterations.

    Raises:
        BadInput: files, prompts or rewards cannot be used; this is checked before any large model is loaded.
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
        notes = [
            *checked.family.notes(config.model),
            *distilled_notes(config),
            *fps_notes(checked.all_rewards, config.model.fps),
        ]
        for note in notes if processes.is_main else []:
            print(f"warning: {note}", file=sys.stderr)
        for reward in checked.all_rewards.values():
            reward.load()
        self.prompting, self.held_out_prompting = self._encode(checked.family, run)
        self.model = checked.family.load(with_reserve(config), processes.device)
        check_kernel(self.model, config.model.family, config.rollout)
        for reward in checked.all_rewards.values():
            reward.register_memory_hook(self.model.make_room)
        self.policy = Policy(self.model, config, self.objective.keeps_old_weights)
        if config.runtime.compile:
            self.model.compile_blocks()
        if config.rollout.merge_lora:
            check_merged(self.model.module)
        self.objective.setup(Resources(self.model, self.policy, checked.rewards, self.prompting, processes))
        weights = {reward.name: reward.weight for reward in config.rewards}
        self.watchdog = Watchdog(config.runtime.watchdog, weights)
        self.recorder.policy = self.policy
        self._assemble(checked)

    def _encode(self, family: type, run: RunDirectory | None) -> tuple[Prompting, Prompting]:
        """Text embeddings of the training prompts and of the held-out prompts."""
        self.recorder.progress("encoding", 0, len(self.prompts.texts) + len(self.held_out.texts))
        folder = None if run is None else run.path
        found = conditions_for(self.config, family, self.prompts, self.held_out, self.processes, folder)
        unconditional = None if found.unconditional is None else found.unconditional.to(self.processes.device)
        return Prompting(found.training, unconditional), Prompting(found.held_out, unconditional)

    def _assemble(self, checked: CheckedRun) -> None:
        """Create the collector, the updater and the evaluator."""
        config, processes = self.config, self.processes
        match = processes.most if config.model.sharded else unmatched
        execution = Execution(config.rollout.batch_size, match, self._report)
        self.collector = Collector(config, checked, self.model, self.prompting, processes, execution, self.recorder)
        self.updater = Updater(self.objective, self.model, self.policy, processes, execution)
        self.evaluator = Evaluator(config, checked, self.model, self.held_out_prompting, processes, execution)
        self.pace = Pace(self, checked)

    # ---------------------------------------------------------------------------------------------- the run

    def train(self) -> dict:
        """Train until the run is finished or stopped; returns the summary.

        Raises:
            RunFailed: training failed or the watchdog stopped it; the newest checkpoint and LoRA are kept.
        """
        with tf32(self.config.runtime.tf32):
            return self._train()

    def _train(self) -> dict:
        self._resume()
        self.recorder.status("running", self.iteration)
        try:
            if self.model.needs_opening_check:
                preflight.check(self.updater, self.prompting, self.prompts.texts)
            if self.config.runtime.compile:
                preflight.check_compiled(self.updater, self.prompting)
            self.pace.begin()
            while self.iteration < self.config.runtime.iterations:
                self._stop_if_asked()
                if self._evaluation_is_due():
                    self.evaluate()
                    self._save()
                self._after(self.iterate())
            if self.evaluations and self.evaluations[-1]["iteration"] != self.iteration:
                self.evaluate()
            self._save()
            if verdict := self.watchdog.final_verdict():
                raise RunFailed(verdict)
        except StopRequested:
            self.recorder.status("stopping", self.iteration)
            self._save()
            return self._finish("stopped")
        except RunFailed as error:
            self._finish("failed", str(error))
            raise
        return self._finish("finished")

    def iterate(self) -> dict:
        """One iteration of rollout, scoring and update; returns its event."""
        clock = Clock()
        self.updates_before = self.policy.updates
        if self.recorder.writes:
            self.sampled = self.policy.result()  # the LoRA that this rollout samples with
        rollout = self.collector.collect(self.iteration, clock)
        with clock("update"):
            update = self.updater.update(rollout)
        self.objective.after_iteration(self.iteration)
        if not self.objective.needs_advantages:
            rollout.scores = gather_scores(rollout.scores, self.processes)
            spread = mean_group_std(rollout.scores)
            rollout.advantages = replace(rollout.advantages, spread=spread)
        self.iteration += 1
        self.seconds += clock.total
        return without_nan(self._event(rollout, update, clock))

    def _event(self, rollout: RolloutBatch, update: Update, clock: Clock) -> dict:
        advantages, every = rollout.advantages, update.every
        forwards = sum(self.processes.gather([rollout.trajectories.forwards + every.forwards]))
        return {
            "iteration": self.iteration,
            "rewards": reward_record(rollout.scores, advantages),
            "advantage_std": advantages.values.std().item(),
            "objective": self.objective.record(every, update.first),
            "loss": every.loss / max(every.items, 1),
            "grad_norm": update.grad_norm,
            "bad_updates": update.bad,
            "skipped_groups": int(advantages.skipped.sum()),
            "dropped_samples": int(advantages.dropped.sum()) + every.dropped,
            "forwards_per_image": forwards / advantages.values.numel(),
            "seconds": {**clock.seconds, "total": clock.total},
            "memory_mb": peak_memory(self.processes.device),
        }

    def _after(self, event: dict) -> None:
        improved, verdict = self.watchdog.watch(event, self.objective.alarm(event["objective"]))
        self.recorder.event(event)
        self.pace.take(event)
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
        """Score images of the held-out prompts, if there are any, and record the result."""
        if not self.held_out.texts:
            return
        self.updates_before = self.policy.updates
        with self.policy.using("average"), sampling(self.config, self.model.module):
            result = self.evaluator.evaluate(self.evaluations[0] if self.evaluations else None)
        record = {"iteration": self.iteration, "seconds": self.seconds, **result.record()}
        self.evaluations.append(record)
        if (warning := self.watchdog.diversity_warning(self.evaluations[0], record)) and self.processes.is_main:
            print(f"warning: iteration {self.iteration}: {warning}", file=sys.stderr)
        self.recorder.evaluation(record, result.images, result.samples)
        if self.processes.is_main:
            self.listener({"evaluation": record})

    # ----------------------------------------------------------------------------- saving, resuming, stopping

    def _save(self) -> None:
        state = {
            "iteration": self.iteration,
            "updates": self.policy.updates,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "watchdog": self.watchdog.state(),
            "objective": self.objective.state(),
            "updater": self.updater.state(),
            "prompts": self._prompts_digest(),
            "reward_dtypes": dtypes(self.evaluator.rewards),
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
                "the processes found different checkpoints: put the run directory on a file system that all hosts share"
            )
        self.recorder.begin(self.iteration)
        self.processes.wait()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["prompts"] != self._prompts_digest():
            raise BadInput("the prompts of this run have changed since it was stopped: restore them or start a new run")
        use_dtypes(self.evaluator.rewards, state["reward_dtypes"])
        self.policy.restore(checkpoint.tensors, state["updates"])
        self.iteration, self.seconds, self.evaluations = state["iteration"], state["seconds"], state["evaluations"]
        self.watchdog.restore(state["watchdog"])
        self.objective.restore(state["objective"])
        self.updater.restore(state["updater"])

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
        """Report the progress of an iteration, and stop the run if requested.

        Checkpoints contain whole iterations, so an iteration is not interrupted after its first optimizer step. With
        several processes, all must stop at the same step, so they check only at steps that all of them reach.
        """
        self.recorder.progress(phase, step, steps)
        may_stop = aligned or self.processes.count == 1
        if may_stop and self.policy.updates == self.updates_before:
            self._stop_if_asked()
