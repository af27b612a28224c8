"""What a run prints while it trains: a progress bar in a terminal or notebook, plain lines elsewhere."""

import sys

from grpo_lab.training.config import GRPOConfig

WHY_ZERO = (
    "The loss hovers around 0 and that is fine: advantages sum to 0 in every group, so its value says\n"
    "nothing, only its gradient does. Watch reward, grad_norm and frac_reward_zero_std."
)
LINES = 20  # of a run whose output goes to a file


class Progress:
    """Shows how far a run is: a bar in a terminal or notebook, elsewhere a line for every twentieth of the run.

    Args:
        total: steps of the run.
        silent: shows nothing, as all processes but the first.
    """

    def __init__(self, total: int, *, silent: bool):
        from tqdm.auto import tqdm  # the notebook's bar in a notebook

        ipython = sys.modules.get("IPython")
        in_notebook = ipython is not None and ipython.get_ipython() is not None
        interactive = in_notebook or (sys.stderr is not None and sys.stderr.isatty())
        self.total, self.silent = total, silent
        self.every = None if silent or interactive else -(-total // LINES)
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True, disable=silent or not interactive)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def start(self, step: int) -> None:
        """Begin after this many steps: a resumed run must not count old steps as fast ones."""
        self.bar.initial = step

    def show(self, step: int, text: str) -> None:
        """Show that this many steps are done."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)
        if self.every and (step % self.every == 0 or step == self.total):
            print(f"Step {step} of {self.total}: {text}", file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Print a message above the bar."""
        if not self.silent:
            self.bar.write(text)
            sys.stdout.flush()  # a log file shows it at once


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
