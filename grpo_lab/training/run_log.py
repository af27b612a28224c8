"""Where a run logs to: metrics.jsonl, completions.jsonl, and trackers such as Weights & Biases."""

from pathlib import Path

from accelerate import Accelerator

from grpo_lab.training.batches import StepRecord
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.metrics import JsonLines, mean_metrics


class RunLog:
    """Writes the files in the output folder, and to the trackers of the run.

    Args:
        folder: the output folder.
        is_main: whether this process writes the files; accelerate sees to the trackers.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, is_main: bool):
        self.folder, self.accelerator, self.is_main = folder, accelerator, is_main
        self.metrics, self.completions = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "completions.jsonl")

    def start_trackers(self, config: GRPOConfig) -> None:
        """Tell the trackers the settings of the run."""
        if config.trackers:
            wandb = {"name": config.wandb_run_name, "dir": str(self.folder)}
            settings = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in config.to_dict().items()}
            settings = {k: v for k, v in settings.items() if v is not None}
            self.accelerator.init_trackers(config.wandb_project, settings, init_kwargs={"wandb": wandb})

    def write(self, rows: list[dict[str, float]], record: StepRecord) -> None:
        """Log the mean of some steps' metrics, the last of which is `record`, and its completions."""
        row = mean_metrics(rows)
        if self.is_main:
            self.metrics.append([row])
            self.completions.append([{"step": record.step, **c} for c in record.completions])
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=record.step)

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps from the files: they will be written again."""
        if self.is_main:
            self.metrics.cut_after(step)
            self.completions.cut_after(step)

    def finish(self) -> None:
        """Close the trackers; accelerate's end_training() would end the process group too."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
