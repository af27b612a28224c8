"""What a run prints while it trains: a progress bar in a terminal or notebook, plain lines elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from grpo_lab.training.config import GRPOConfig

WHY_ZERO = (
    "The loss hovers around 0 and that is fine: advantages sum to 0 in every group, so its value says\n"
    "nothing, only its gradient does. Watch reward, grad_norm and frac_reward_zero_std."
)
LINES = 20  # of a run whose output goes to a file


class Progress(Protocol):
    """Shows how far a run is."""

    def start(self, step: int) -> None:
        """Begin after this many steps: a resumed run must not count old steps as fast ones."""

    def show(self, step: int, text: str) -> None:
        """Show that this many steps are done."""

    def write(self, text: str) -> None:
        """Print a message above the bar."""


class _Bar:
    def __init__(self, bar):
        self.bar = bar

    def start(self, step: int) -> None:
        self.bar.initial = step

    def show(self, step: int, text: str) -> None:
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)

    def write(self, text: str) -> None:
        self.bar.write(text)


class _Lines:
    def __init__(self, total: int):
        self.total, self.every = total, max(1, total // LINES)

    def start(self, step: int) -> None:
        pass

    def show(self, step: int, text: str) -> None:
        if step % self.every == 0 or step == self.total:
            print(f"Step {step} of {self.total}: {text}", file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        print(text, flush=True)


class _Silent:
    def start(self, step: int) -> None:
        pass

    def show(self, step: int, text: str) -> None:
        pass

    def write(self, text: str) -> None:
        pass


@contextmanager
def progress(total: int, *, silent: bool) -> Iterator[Progress]:
    """Show the progress of a run of `total` steps; `silent` for all processes but the first."""
    if silent:
        yield _Silent()
    elif "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty()):
        from tqdm.auto import tqdm  # the notebook's bar in a notebook

        with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
            yield _Bar(bar)
    else:
        yield _Lines(total)


def step_text(metrics: dict[str, float]) -> str:
    """Return the few numbers of a step that stand beside the bar."""
    kl = f"{metrics['kl']:.4f}" if "kl" in metrics else "off"
    skipped = f", skipped {metrics['skipped_steps']}" if metrics["skipped_steps"] else ""
    return f"reward {metrics['reward']:.3f}, KL {kl}, length {metrics['completions/mean_length']:.1f}{skipped}"


def first_step_text(check: dict[str, float], config: GRPOConfig) -> str:
    """Return what the first step showed: sampler and scorer agree, and the reference starts at the policy."""
    what = "importance ratio" if config.sampler == "model" else "our probability of a token over vLLM's"
    text = f"Checked at step 1: {what} 1 ± {check['ratio']:.1e}"
    if config.kl_coef > 0:
        kl = check["kl"]
        text += f", KL to the reference {f'0 ± {kl:.1e}' if kl < 1e-3 else f'already up to {kl:.2g}'}"
    sums_to_zero = config.baseline != "none" and config.surrogate == "clip"
    return f"{text}.\n{WHY_ZERO}" if sums_to_zero else f"{text}."
