"""GRPOTrainer: a run, from the first step to the final model; what a step does is in `step.py`.

A step uses batch_size * gradient_accumulation_steps prompts with K completions each, in micro-batches of at least
batch_size prompts: more where completions are short. Every mean is over the whole batch.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor, nn

from grpo_lab.hardware.devices import make_accelerator, resolve_device, resolve_precision
from grpo_lab.hardware.processes import Processes
from grpo_lab.hardware.signals import delayed_interrupts, interrupt_between_steps
from grpo_lab.models.adapters import is_adapted, merged
from grpo_lab.rewards.reward_models import RewardModel
from grpo_lab.rollout.prompts import Prompt, checked_dataset
from grpo_lab.rollout.sampling import Rollouts
from grpo_lab.training import checkpoints, output_dir, run_state, step
from grpo_lab.training.batches import Batch, StepRecord, UnfinishedStep
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.evaluation import evaluate, evaluation_lines, examples, uniforms_for
from grpo_lab.training.figures import training_figure
from grpo_lab.training.memory import memory_explained
from grpo_lab.training.order import PromptOrder
from grpo_lab.training.progress import Progress, first_step_text, step_text
from grpo_lab.training.run_log import RunLog
from grpo_lab.training.setup import check_enough_prompts, check_settings, make_components, warn_of_warmup


class GRPOTrainer:
    """Fine-tunes a causal language model with Group Relative Policy Optimization.

    Args:
        model: the policy, trained in place; with `lora_rank`, or given as a `peft.PeftModel`, its adapter alone.
            Trained weights in half precision are turned into float32: at usual learning rates an update
            would be lost in rounding.
        ref_model: the reference of the KL penalty, never changed. None: the model as it is now, as a frozen
            copy, or, where an adapter is trained, the same model with the adapter off. Needed only if kl_coef > 0.
        reward_model: `f(prompts, completions, **columns) -> list[float]`, a sequence-classification model, a
            causal LM (a demonstration), or a list of these, of which the first says what `evaluate` counts as right.
        tokenizer: the policy's.
        config: GRPOConfig; None takes the defaults.
        train_dataset: SimplePromptDataset, or a `datasets.Dataset` with a column "prompt".
        eval_dataset: the same, for `eval_steps`.
    Raises: ValueError or TypeError, with the cure, for what cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: RewardModel,
        tokenizer,
        config: GRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
    ):
        self.config = config = config or GRPOConfig()
        self.tokenizer = tokenizer
        self.train_dataset = checked_dataset(train_dataset, "train_dataset")
        self.eval_dataset = checked_dataset(eval_dataset, "eval_dataset") if eval_dataset is not None else None
        check_settings(config, model, ref_model, eval_dataset)
        self.output_dir = Path(config.output_dir).expanduser().absolute()  # a later chdir does not move it
        device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, device)
        self.accelerator = make_accelerator(device, self.precision, config.trackers, config.output_dir)
        self.device = self.accelerator.device
        self.processes = Processes(self.accelerator.num_processes, self.accelerator.process_index)
        check_enough_prompts(len(self.train_dataset), config.prompts_per_step, self.processes.world_size)

        self.order = PromptOrder(len(self.train_dataset), config.prompts_per_step, config.seed)
        rollouts = self.order.batches_per_epoch * config.num_epochs
        self.total_steps = config.max_steps or rollouts * config.num_iterations
        self.components = make_components(
            model, ref_model, reward_model, tokenizer, config, (self.train_dataset, self.eval_dataset),
            total_steps=self.total_steps,
            accelerator=self.accelerator, precision=self.precision, processes=self.processes,
        )  # fmt: skip

        self._fingerprints: dict[str, str] | None = None
        self.step = 0
        self.num_tokens = 0
        self.batch: Batch | None = None
        self.unfinished: UnfinishedStep | None = None
        self._replace_results = False
        self.first_check: dict[str, float] | None = None
        self.unlogged: list[dict[str, float]] = []
        self.log = RunLog(self.output_dir, self.accelerator, is_main=self.processes.is_main)

    @property
    def model(self) -> nn.Module:
        """The policy that is trained; a `peft.PeftModel` where an adapter is."""
        return self.components.models.trained

    @property
    def policy(self) -> nn.Module:
        """The policy that samples: `model` itself, or with FSDP an unsharded copy of it."""
        return self.components.models.whole

    @property
    def ref_model(self) -> nn.Module | None:
        """The frozen reference; None where none is needed or it is `model` with its adapter off."""
        return self.components.models.reference

    def steps(self, resume: bool | str | Path | None = None) -> Iterator[StepRecord]:
        """Run all optimizer steps, one at a time; log, save and evaluate on the way, as configured.

        Args:
            resume: True goes on from the newest checkpoint in output_dir, a path from that one.
        """
        with output_dir.locked(self.output_dir) if self.processes.is_main else nullcontext():
            yield from self._steps(resume)

    def _steps(self, resume: bool | str | Path | None) -> Iterator[StepRecord]:
        self._start(resume)
        while self.step < self.total_steps or self.unfinished:
            if self.unfinished is None:
                self._take_step()
            record = self.unfinished.record
            self._finish_step(self.unfinished)
            yield record
        if self.processes.is_main:
            final = merged(self.policy) if is_adapted(self.policy) else self.policy
            state = {"step": self.step, "num_tokens": self.num_tokens, "final": True, "run": self._identity()}
            checkpoints.save(self.output_dir / checkpoints.FINAL, final, self.tokenizer, state)
        self.processes.barrier()
        self.log.finish()

    def _take_step(self) -> None:
        """Sample a batch if none is in use, and update on it.

        After an exception weights, order and random state are as before the update, or before the sampling if that
        failed; the counters of skipped steps keep their count.
        """
        began = time.perf_counter()
        before = self._position()
        try:
            if self.batch is None:
                self.batch = self.collect(next(self.order))
                before = self._position()  # the completions are kept for another try
            gradients = step.accumulate_gradients(self.components, self.batch)
            if self.step == 0:
                self.first_check = step.check_first_step(self.components, gradients)
            with delayed_interrupts():  # weights, counters and the batch change together
                self._count_step(step.apply_gradients(self.components, self.batch, gradients, self.step + 1), began)
        except BaseException as error:
            if self.unfinished is None:
                error.add_note(f"It happened in step {self.step + 1}.")
                self.batch, self.num_tokens = before[:2]
                self.order.load_state_dict(before[2])
                run_state.restore_random_state(before[3])
            raise

    def _position(self) -> tuple[Batch | None, int, dict[str, int], dict[str, Any]]:
        return self.batch, self.num_tokens, self.order.state_dict(), run_state.random_state()

    def collect(self, indices: Sequence[int]) -> Batch:
        """Sample K completions for each of these prompts, score them, and compare each with its group."""
        K = self.config.num_generations_per_prompt
        mine = self.processes.shard_range(len(indices))
        uniforms = uniforms_for(self.components, len(indices) * K, "rollout", self.step)[mine.start * K : mine.stop * K]
        batch = step.make_batch(self.components, [self.train_dataset[indices[i]] for i in mine], uniforms)
        self.num_tokens += int(self.processes.sum(batch.num_tokens))
        return batch

    def update(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step on the batch: clipped loss with KL to the reference, over all its micro-batches."""
        return step.update(self.components, batch, self.step + 1)

    def sample(self, prompts: Sequence[Prompt], uniforms: Tensor, num_generations: int, **truncation) -> Rollouts:
        """Draw K completions for each prompt with these uniform numbers [P * K, T]; never with dropout."""
        return step.sample_completions(self.components, prompts, uniforms, num_generations, **truncation)

    def decode(self, rollouts: Rollouts) -> list[str]:
        """Return the completions as text, without the end token; special tokens only if the config keeps them."""
        return step.decode(self.components, rollouts)

    def evaluate(self, dataset=None, *, num_generations: int | None = None) -> dict[str, float]:
        """Measure how often the answer is right: greedily, and sampled as in training, with 95 % intervals.

        Args:
            dataset: with at least one prompt; None takes eval_dataset.
            num_generations: completions per prompt that are sampled; None takes the config's K.
        Returns: "eval/pass@1_greedy", "eval/pass@1" (sampled) and "eval/pass@K", each also with "_low" and
            "_high" (Wilson, over prompts), and "eval/reward", the mean sampled reward. Right means that the
            first reward function gives at least `success_reward`, whatever others and weights add. Draws no number
            that training would have drawn.
        """
        dataset = checked_dataset(dataset if dataset is not None else self.eval_dataset, "dataset")
        with memory_explained(self.device, self.precision, self.config):
            return evaluate(self.components, dataset, num_generations or self.config.num_generations_per_prompt)

    def examples(self, dataset, number: int = 3) -> list[dict[str, Any]]:
        """Sample one completion for each of the first prompts, always with the same random numbers.

        Returns: dicts of prompt, completion, reward.
        """
        return examples(self.components, dataset, number)

    def train(self, resume: bool | str | Path | None = None) -> list[dict[str, Any]]:
        """Run all steps with a progress bar, then write final_model/ and training.png.

        Args:
            resume: True goes on from the newest checkpoint in output_dir, a path from that one.
        Returns: the rows of metrics.jsonl.
        Raises: MemoryError, once, with what to lower; ArithmeticError if the gradient stays infinite;
            KeyboardInterrupt after Ctrl-C, when the step has been finished and a checkpoint saved.
        """
        with (
            interrupt_between_steps() as interrupted,
            self._save_on_exception(),
            memory_explained(self.device, self.precision, self.config),
            Progress(self.total_steps, silent=not self.processes.is_main) as bar,
        ):
            first = None
            for record in self.steps(resume):
                if first is None:
                    first = record.step
                    bar.start(first - 1)
                    if first > 1:
                        bar.write(f"Resumed after step {first - 1}.")
                bar.show(record.step, step_text(record.metrics))
                if record.step == 1 and self.first_check:
                    bar.write(first_step_text(self.first_check, self.config))
                if "eval/pass@1" in record.metrics:
                    lines = evaluation_lines(record.metrics, self.config.num_generations_per_prompt)
                    bar.write("\n  ".join([f"After step {record.step}, on prompts kept for evaluation", *lines]))
                if self.processes.sum(len(interrupted)) and record.step < self.total_steps:
                    self.save(self.output_dir / f"checkpoint-{record.step}")
                    raise KeyboardInterrupt(f"saved {self.output_dir / f'checkpoint-{record.step}'}")
        history = self.log.metrics.read()
        if self.processes.is_main:
            try:
                figure = training_figure(history, title=f"GRPO, {self.step} optimizer steps")
                figure.savefig(self.output_dir / "training.png", dpi=120)
            except ImportError:  # matplotlib is not needed to train
                warnings.warn("matplotlib is not installed, so training.png was not drawn.", stacklevel=2)
        return history

    @contextmanager
    def _save_on_exception(self) -> Iterator[None]:
        """Save a checkpoint of the last whole step, which is the state after an exception, unless there is one."""
        try:
            yield
        except Exception as error:
            folder = self.output_dir / f"checkpoint-{self.step}"
            sharded = self.policy is not self.model
            # of several processes others may be gone: only what this one has alone can be saved
            alone = self.processes.world_size == 1 or (self.processes.is_main and not (self.batch or sharded))
            if self.step and alone and not folder.exists():
                with suppress(Exception):  # the fault itself is what matters
                    checkpoints.save(folder, self.policy, self.tokenizer, self._state(alone=True))
            if self.step and output_dir.all_checkpoints(self.output_dir):
                error.add_note("What came before is saved: fix the cause and continue with --resume (resume=True).")
            raise

    def _start(self, resume: bool | str | Path | None) -> None:
        config = self.config
        if resume:
            self._resume(resume)
        elif self.step == 0:
            if self.processes.is_main:
                output_dir.prepare_output(self.output_dir, overwrite=config.overwrite_output_dir)
            self._replace_results = True
            set_seed((config.seed + self.processes.rank) % 2**32)  # for dropout, and reward functions that draw
        self.processes.check_same("training data", self._identity()["training data"])
        self.log.start_trackers(config)
        warn_of_warmup(config, self.total_steps)

    def _resume(self, resume: bool | str | Path) -> None:
        candidates = output_dir.to_resume(self.output_dir, resume)
        elsewhere = candidates[0].resolve().parent != self.output_dir.resolve()
        if elsewhere and self.processes.is_main:  # is it another run's folder?
            output_dir.prepare_output(self.output_dir, overwrite=self.config.overwrite_output_dir)
            output_dir.remove_results(self.output_dir)
        self._load_first(candidates)
        self.processes.barrier()
        if self.processes.is_main:
            output_dir.forget_after(self.output_dir, self.step)
        self.log.cut_after(self.step - (self.unfinished is not None))

    def _count_step(self, update: dict[str, float], began: float) -> None:
        batch = self.batch
        done = {
            "step": self.step + 1,
            "epoch": self.order.epoch + self.order.cursor / self.order.size,
            "num_tokens": self.num_tokens,
            "skipped_steps": self.components.engine.skipped_steps,
            "step_time": time.perf_counter() - began,
        }
        record = StepRecord(self.step + 1, done | batch.metrics | update, batch.completions)
        self.step, self.unfinished = self.step + 1, UnfinishedStep(record)
        if batch.updates >= self.config.num_iterations:
            self.batch = None

    def _finish_step(self, unfinished: UnfinishedStep) -> None:
        """Evaluate, log and save, each when its time has come; after an exception it goes on where it stopped."""
        config, record, last = self.config, unfinished.record, self.step == self.total_steps
        if self._replace_results and self.processes.is_main:
            output_dir.remove_results(self.output_dir)
        self._replace_results = False
        if config.eval_steps and (self.step % config.eval_steps == 0 or last) and "eval/pass@1" not in record.metrics:
            record.metrics.update(self.evaluate())
        if not unfinished.logged:
            rows = [*self.unlogged, record.metrics]
            if self.step % config.logging_steps == 0 or last:
                if unfinished.log_begun:
                    self.log.cut_after(self.step - 1)
                unfinished.log_begun = True
                self.log.write(rows, record)
                rows = []
            self.unlogged, unfinished.logged = rows, True
        if self.step % config.save_steps == 0:
            self.save(self.output_dir / f"checkpoint-{self.step}")
            if self.processes.is_main:
                output_dir.prune(self.output_dir, config.save_total_limit)
        self.unfinished = None

    # --- saving ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a checkpoint: a folder that `from_pretrained` loads and that a run can be resumed from.

        Where an adapter is trained it holds that alone, and `AutoPeftModelForCausalLM` loads it. Of several processes
        all must call it; one writes.
        """
        state = self._state()
        if self.processes.is_main:
            checkpoints.save(Path(path), self.policy, self.tokenizer, state)
        self.processes.barrier()

    def _load_first(self, candidates: list[Path]) -> None:
        """Load the first checkpoint that is not damaged; warn of those that are."""
        for folder, older in zip(candidates, [*candidates[1:], None], strict=True):
            try:
                return self.load(folder)
            except checkpoints.DamagedCheckpointError as error:
                if older is None:
                    raise
                warnings.warn(f"{error} Going on from {older.name} instead.", stacklevel=5)

    def load(self, path: str | Path) -> None:
        """Go back to a checkpoint. Raises ValueError if it is damaged or was made with other settings or data."""
        path = Path(path)
        state = checkpoints.load_state(path)
        try:
            self._restore(path, state)
        except (KeyError, IndexError, TypeError, AttributeError) as error:  # a state that was made by other hands
            raise checkpoints.DamagedCheckpointError(f"the checkpoint {path} lacks something: {error!r}.") from error

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        run_state.check_same_run(state["run"], self._identity())
        if state.get("final"):
            raise ValueError(
                f"{path} is the end of a run and holds no optimizer state. Resume from a checkpoint, or start a new "
                f"run from its weights: --model-name {path}."
            )
        counts = [state[name] for name in ("step", "num_tokens", "skipped_steps", "skipped_in_a_row")]
        if any(type(n) is not int or n < 0 for n in counts) or any(type(row) is not dict for row in state["unlogged"]):
            raise TypeError("counters must be non-negative integers and unlogged metrics a list of dicts")
        checkpoints.load_weights(self.policy, path)
        self.components.engine.load_state_dict(state)
        self.order.load_state_dict(state["order"])
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.unlogged = state["unlogged"]
        self.unfinished = UnfinishedStep.restored(state.get("unfinished"))
        self.batch = Batch.restored(state["batch"], self.processes, self.config.num_generations_per_prompt, self.device)
        states = state["random"]  # one per rank; the last serves where there are fewer than ranks
        run_state.restore_random_state(states[min(self.processes.rank, len(states) - 1)])

    def _state(self, *, alone: bool = False) -> dict[str, Any]:
        """Return what a checkpoint holds besides weights; `alone`: without asking other processes, who may be gone."""
        gather, unfinished = self.processes.gather, self.unfinished
        return {
            "step": self.step,
            "num_tokens": self.num_tokens,
            **self.components.engine.state_dict(),
            "order": self.order.state_dict(),
            # a rollout that is not used up, as each process has it
            "batch": gather([self.batch.saved()]) if self.batch is not None else [],
            "unlogged": self.unlogged,
            # a step that an exception has kept from being logged
            "unfinished": vars(unfinished.record) if unfinished and not unfinished.logged else None,
            "random": [run_state.random_state()] if alone else gather([run_state.random_state()]),
            "run": self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on as the same run."""
        if self._fingerprints is None:  # once: a large reference takes seconds
            self._fingerprints = run_state.fingerprints(self.train_dataset, self.model, self.ref_model)
        resolved = {"precision": self.precision, "reward functions": self.components.rewards.names}
        return self.config.to_dict() | resolved | self._fingerprints
