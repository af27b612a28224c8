"""A step happens or does not: whichever line an exception comes from, the run goes on as if there had been none."""

import shutil
import sys
from types import CodeType

import pytest
import torch
from conftest import tiny_model
from trainers import PROMPTS, make_trainer, weights

from grpo_lab import SimplePromptDataset
from grpo_lab.training import checkpoints, step
from grpo_lab.training.batches import UnfinishedStep
from grpo_lab.training.trainer import GRPOTrainer

SETTINGS = {
    "max_steps": 4, "num_iterations": 2, "logging_steps": 2, "save_steps": 2, "eval_steps": 2, "batch_size": 4,
    "disable_dropout": False, "kl_coef": 0.0, "top_k": 0, "top_p": 1.0, "overwrite_output_dir": False,
}  # fmt: skip
WATCHED = (GRPOTrainer.steps, GRPOTrainer._steps, GRPOTrainer._take_step, GRPOTrainer._finish_step, GRPOTrainer.collect,
           GRPOTrainer.save, step.accumulate_gradients)  # fmt: skip


def codes(function) -> set[CodeType]:
    return {function.__code__, *(c for c in function.__code__.co_consts if isinstance(c, CodeType))}


class StopError(Exception):
    pass


class Interruption:
    """Raises at the n-th line of the watched functions that is run, counted from 0; only counts if n is None."""

    def __init__(self, n: int | None):
        self.n, self.count, self.where = n, 0, []
        self.codes = set().union(*map(codes, WATCHED))

    def __call__(self, frame, event, _):
        if frame.f_code not in self.codes:
            return None
        if event == "line":
            self.where.append(f"{frame.f_code.co_name}:{frame.f_lineno - frame.f_code.co_firstlineno}")
            self.count += 1
            if self.count - 1 == self.n:
                self.n = None
                raise StopError
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def run_of(folder):
    torch.manual_seed(0)
    held_out = SimplePromptDataset(PROMPTS[:2])
    return make_trainer(folder, model=tiny_model(attention_dropout=0.1), eval_dataset=held_out, **SETTINGS)


def outcome(run):
    rows = [{k: v for k, v in row.items() if k != "step_time"} for row in run.log.metrics.read()]
    texts = [(row["step"], row["completion"]) for row in run.log.completions.read()]
    saved = sorted(path.name for path in run.output_dir.glob("checkpoint-*"))
    return rows, texts, saved, weights(run).tolist(), run.step, run.num_tokens


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("unbroken"))
    with Interruption(None) as lines, pytest.warns(UserWarning, match="ratio should be 1"):
        for _ in run.steps():
            pass
    return outcome(run), lines.where


def test_the_lines_of_a_step_are_watched(unbroken):
    assert {name.split(":")[0] for name in unbroken[1]} >= {"steps", "_take_step", "_finish_step", "collect", "save"}
    assert len(set(unbroken[1])) > 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:right after sampling")
def test_an_exception_at_any_line_changes_nothing(unbroken, tmp_path):
    expected, where = unbroken
    last = {name: i for i, name in enumerate(where)}  # each line once, where it was run last
    second = {name: i for i, name in reversed(list(enumerate(where))) if i > 40}  # and once early
    for n in sorted({*last.values(), *second.values()}):
        run = run_of(tmp_path / str(n))
        with Interruption(n), pytest.raises(StopError):
            for _ in run.steps():
                pass
        for _ in run.steps():
            pass
        assert outcome(run) == expected, where[n]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:right after sampling")
@pytest.mark.parametrize(("name", "every"), [("evaluate", 2), ("write", 2), ("save", 2), ("evaluate", 1), ("write", 1)])
def test_a_run_resumed_after_a_fault_at_the_end_of_a_step_has_every_row(tmp_path, monkeypatch, name, every):
    def run():
        torch.manual_seed(0)
        settings = SETTINGS | {"save_steps": every, "eval_steps": every, "logging_steps": every}
        held_out = SimplePromptDataset(PROMPTS[:2])
        model = tiny_model(attention_dropout=0.1)
        return make_trainer(tmp_path / "run", model=model, eval_dataset=held_out, **settings)

    whole = run()
    whole.train()
    expected = outcome(whole)
    shutil.rmtree(tmp_path / "run")
    broken, failed = run(), []
    owner = {"evaluate": broken, "write": broken.log, "save": checkpoints}[name]
    real = getattr(owner, name)

    def fails_once(*arguments, **settings):
        if broken.step == every and not failed:
            failed.append(True)
            raise OSError("once")
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails_once)
        with pytest.raises(OSError, match="once"):
            broken.train()
    again = run()
    again.train(resume=True)
    assert outcome(again) == expected


@pytest.mark.parametrize("saved", [-1, "x", [[]], {"a": 1}, torch.ones(2)], ids=str)
def test_a_checkpoint_with_an_invalid_unfinished_step_is_refused(saved):
    with pytest.raises(TypeError):
        UnfinishedStep.restored(saved)
    assert UnfinishedStep.restored(None) is None  # as in checkpoints of version 0.1
