"""Checkpoints: there completely or not at all, and a run goes on from one as if nothing had happened."""

import json
import math
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction

import numpy
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from trainers import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.training import checkpoints, output_dir, run_state
from grpo_lab.training.checkpoints import STATE_FILE, load_state, load_weights
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.output_dir import all_checkpoints, to_resume
from grpo_lab.training.run_state import check_same_run

STATE = {"step": 3, "loss": 0.5, "name": "x", "nothing": None, "rows": [{"a": 1}], "moments": torch.arange(3.0)}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fake(output_dir, *steps):
    """Folders that count as checkpoints, without a model in them."""
    for step in steps:
        (output_dir / f"checkpoint-{step}").mkdir(parents=True)
        (output_dir / f"checkpoint-{step}" / STATE_FILE).touch()
    return output_dir


def names(output_dir):
    return [path.name for path in all_checkpoints(output_dir)]


# --- writing --------------------------------------------------------------------------------------------


def test_a_checkpoint_is_an_ordinary_folder_of_transformers(tmp_path, model, tokenizer):
    folder = tmp_path / "new" / "folders" / "checkpoint-3"
    checkpoints.save(folder, model, tokenizer, STATE)
    assert contents(folder).keys() >= {"config.json", "model.safetensors", "tokenizer_config.json", STATE_FILE}
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-3"]  # nothing is left lying about
    again, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(again) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert words("3*5+7")["input_ids"] == tokenizer("3*5+7")["input_ids"]
    state = load_state(folder)
    assert torch.equal(state.pop("moments"), STATE["moments"])
    assert state == {name: value for name, value in STATE.items() if name != "moments"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_in_the_precision_of_the_model(tmp_path, tokenizer, dtype):
    old, new = tiny_model(seed=1).to(dtype), tiny_model(seed=2).to(dtype)
    checkpoints.save(tmp_path / "checkpoint-1", old, tokenizer, {})
    load_weights(new, tmp_path / "checkpoint-1")
    assert all(torch.equal(a, b) and b.dtype == dtype for a, b in zip(old.parameters(), new.parameters(), strict=True))


@pytest.mark.parametrize(
    ("where", "what"),
    [("model", "save_pretrained"), ("tokenizer", "save_pretrained"), (torch, "save"), (checkpoints.os, "fsync")],
    ids=["weights", "tokenizer", "state", "disk"],
)
def test_a_failure_while_writing_leaves_the_old_checkpoint_untouched(
    tmp_path, monkeypatch, model, tokenizer, where, what
):
    folder = tmp_path / "checkpoint-3"
    checkpoints.save(folder, model, tokenizer, {"step": 3})
    before = contents(folder)

    def fails(*args, **settings):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr({"model": model, "tokenizer": tokenizer}.get(where, where), what, fails)
        for target in (folder, tmp_path / "checkpoint-4"):
            with pytest.raises(OSError, match="no space left"):
                checkpoints.save(target, model, tokenizer, {"step": 4})
    assert contents(folder) == before
    assert names(tmp_path) == ["checkpoint-3"]  # neither a half folder nor a new one
    checkpoints.save(folder, tiny_model(seed=9), tokenizer, {"step": 4})  # and the next attempt succeeds
    assert load_state(folder) == {"step": 4}
    assert contents(folder)["model.safetensors"] != before["model.safetensors"]


def test_a_checkpoint_that_is_half_written_when_the_program_ends_does_not_count(
    tmp_path, monkeypatch, model, tokenizer
):
    def killed(handle):  # the state is written by then, and nobody is left to clean up
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path / "checkpoint-3", model, tokenizer, {"step": 3})
    assert any(tmp_path.iterdir())
    assert names(tmp_path) == []


def test_a_checkpoint_that_is_half_removed_does_not_count(tmp_path, monkeypatch, model, tokenizer):
    fake(tmp_path, 1, 2, 3)

    def killed(folder, **settings):
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        output_dir.prune(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path / "checkpoint-3", model, tokenizer, {"step": 3})
    assert load_state(tmp_path / "checkpoint-3") == {"step": 3}  # the new one, whole


# --- finding --------------------------------------------------------------------------------------------


def test_the_newest_is_the_one_with_the_largest_number(tmp_path):
    fake(tmp_path, 9, 10, 100, 20)
    (tmp_path / "checkpoint-200").mkdir()  # no state in it: half a copy
    fake(tmp_path / "elsewhere", 300)
    for other in ("checkpoint-x", "checkpoint-7-old", "final_model", ".unfinished-checkpoint-400"):
        (tmp_path / other).mkdir()
        (tmp_path / other / STATE_FILE).touch()
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-20", "checkpoint-100"]
    assert to_resume(tmp_path, True)[0] == tmp_path / "checkpoint-100"
    assert to_resume(tmp_path, str(tmp_path / "checkpoint-9")) == [tmp_path / "checkpoint-9"]


@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_nothing_to_resume_from_says_so(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    assert all_checkpoints(tmp_path / folder) == []
    with pytest.raises(ValueError, match=rf"no checkpoint to resume from in .*{folder}\. Start anew without --resume"):
        to_resume(tmp_path / folder, True)


@pytest.mark.parametrize(
    ("limit", "left"), [(None, [8, 9, 10]), (5, [8, 9, 10]), (3, [8, 9, 10]), (2, [9, 10]), (1, [10])]
)
def test_the_oldest_are_pruned(tmp_path, limit, left):
    output_dir.prune(fake(tmp_path, 10, 9, 8), limit)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


# --- reading what is damaged ----------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("loading a checkpoint ran code",))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"\x80", pickle.dumps(Evil())], ids=repr)
def test_a_damaged_state_is_named_and_runs_no_code(tmp_path, content):
    fake(tmp_path, 7)
    (tmp_path / "checkpoint-7" / STATE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint-7 cannot be used .*Name an older one, or start anew"):
        load_state(tmp_path / "checkpoint-7")


def test_a_state_that_holds_an_object_is_refused(tmp_path):
    fake(tmp_path, 7)
    torch.save({"step": Evil()}, tmp_path / "checkpoint-7" / STATE_FILE)
    with pytest.raises(ValueError, match="checkpoint-7 cannot be used"):
        load_state(tmp_path / "checkpoint-7")


def test_a_folder_without_a_state_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=f"is not a checkpoint: it has no {STATE_FILE}"):
        load_state(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone", "other shape"])
def test_damaged_weights_are_named_and_leave_the_model_alone(tmp_path, tokenizer, model, damage):
    folder = tmp_path / "checkpoint-7"
    checkpoints.save(folder, tiny_model(seed=1, hidden_size=16 if damage == "other shape" else 32), tokenizer, {})
    file = folder / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "gone":
        file.unlink()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"checkpoint-7 cannot be used"):
        load_weights(model, folder)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- the output folder ----------------------------------------------------------------------------------

RESULTS = ["final_model", "checkpoint-3", "metrics.jsonl", "completions.jsonl", "training.png"]


@pytest.mark.parametrize("result", RESULTS)
def test_the_results_of_another_run_are_only_replaced_on_demand(tmp_path, result):
    if "." in result:
        (tmp_path / result).touch()
    else:
        (tmp_path / result).mkdir()
        (tmp_path / result / STATE_FILE).touch()
    (tmp_path / "notes.txt").touch()
    go_on = r"Go on with it: --resume \(resume=True\)\. " if result == "checkpoint-3" else ""
    cure = rf"another run \({result}\)\. {go_on}Replace it: --overwrite-output-dir .*\. Keep it: "
    with pytest.raises(ValueError, match=cure):
        output_dir.prepare_output(tmp_path, overwrite=False)
    assert (tmp_path / result).exists()
    output_dir.prepare_output(tmp_path, overwrite=True)
    assert (tmp_path / result).exists()  # until the new run has made a step
    output_dir.remove_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]  # what is not a result is not touched
    output_dir.prepare_output(tmp_path, overwrite=False)


def test_an_output_folder_is_made_and_one_that_cannot_be_written_is_refused(tmp_path):
    output_dir.prepare_output(tmp_path / "a" / "b", overwrite=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot write to .*file.* \(.*\)\. Name another folder: --output-dir"):
            output_dir.prepare_output(folder, overwrite=True)


# --- the same run ---------------------------------------------------------------------------------------


def test_a_fingerprint_notices_every_change_of_the_prompts():
    chat = [{"role": "user", "content": "a"}]
    versions = [["a", "b"], ["b", "a"], ["ab"], ["a"], ["a", "b", "b"], ["a", "B"], [chat], [[*chat, *chat]], []]
    prints = [run_state.fingerprint(prompts) for prompts in versions]
    assert len(set(prints)) == len(versions)
    assert run_state.fingerprint(iter(["a", "b"])) == prints[0] == "ecade699"  # pinned: old runs depend on it


@dataclass
class Board:
    size: int
    marks: set


class Plain:
    def __init__(self, value):
        self.value = value


VALUES = {
    "tuple keys": lambda x: {(0, x): 1, (1, 0): 2},
    "mixed keys": lambda x: {1: x, "b": 2},
    "keys that are numbers": lambda x: {1: x},
    "set": lambda x: {"four", "4", f"a{x}"},
    "nested sets": lambda x: {frozenset({"a", "b", f"c{x}"}), frozenset({"d", "e"})},
    "dataclass": lambda x: Board(x, {"a", "b", "c"}),
    "object": lambda x: Plain({"a", "b", f"c{x}"}),
    "no content": lambda x: [object()] * x,
    "bytes": lambda x: bytes(x),
    "tensor": lambda x: torch.arange(5000) * (torch.arange(5000) == 2500) * x,  # its repr leaves out the middle
    "bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "array": lambda x: numpy.arange(5000) * (numpy.arange(5000) == 2500) * x,
    "array of objects": lambda x: numpy.array([{"a", "b", f"c{x}"}, None], dtype=object),
    "numpy number": lambda x: numpy.float32(x),
    "fraction": lambda x: Fraction(x, 7),
    "decimal": lambda x: Decimal(x),
    "date": lambda x: datetime(2024, 1, x),
    "pattern": lambda x: re.compile("a" * x),
    "function": lambda x: [numpy.sin, Board, len][x % 2 :],
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_a_fingerprint_notices_changes_in_python_objects(make):
    rows = [{"prompt": "a", "column": make(x)} for x in (1, 2)]
    again = {"prompt": "a", "column": make(1)}
    one, two, same = (run_state.fingerprint([row]) for row in (*rows, again))
    assert one == same != two


def test_a_fingerprint_of_python_objects_is_the_same_in_another_process():
    code = f"import {__name__} as t\nprint(t.fingerprints_of_values())"
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), *sys.path]))
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONHASHSEED": other, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout == f"{fingerprints_of_values()}\n", done.stderr


def fingerprints_of_values():
    return [run_state.fingerprint([make(3)]) for make in VALUES.values()]


def test_a_fingerprint_does_not_depend_on_the_order_of_a_set():
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    assert run_state.fingerprint([one]) == run_state.fingerprint([other])


def test_a_text_and_a_number_as_keys_are_not_the_same_data():
    assert run_state.fingerprint([{1: "a"}]) != run_state.fingerprint([{"1": "a"}])


itself: list = []
itself.append(itself)


UNSTABLE = {"function": lambda x: x, "generator": (i for i in ()), "cycle": itself, "lock": threading.Lock()}


@pytest.mark.parametrize("value", UNSTABLE.values(), ids=UNSTABLE)
def test_a_value_without_a_stable_form_is_refused_in_a_sentence(value):
    with pytest.raises(
        ValueError, match=r"^row 1 of the training data holds a value .* could not be resumed: "
    ) as caught:
        run_state.fingerprint([{"prompt": "a"}, {"prompt": "a", "column": value}])
    assert "\n" not in str(caught.value)


def test_a_run_only_goes_on_with_the_settings_and_data_it_had():
    config, free = GRPOConfig(), GRPOConfig(
        output_dir="elsewhere", logging_steps=1, save_steps=2, save_total_limit=3, eval_steps=4, use_wandb=True,
        report_to=("tensorboard",), device="cpu", gradient_checkpointing=True, max_skipped_steps=9,
        overwrite_output_dir=True, success_reward=0.5, wandb_project="p", wandb_run_name="r",
    )  # fmt: skip
    saved = config.to_dict() | {"training data": "abc"}
    check_same_run(saved, config.to_dict() | {"training data": "abc"})
    check_same_run(saved, free.to_dict() | {"training data": "abc"})  # what changes nothing that is computed
    with pytest.raises(ValueError, match=r"as it was: kl_coef: 0\.1 -> 0\.2; seed: 0 -> 1\. Resume with the old ones"):
        check_same_run(saved, config.replace(seed=1, kl_coef=0.2, logging_steps=1).to_dict() | {"training data": "abc"})
    with pytest.raises(ValueError, match=r"as it was: training data: abc -> abd\. .*--model-name CHECKPOINT"):
        check_same_run(saved, config.to_dict() | {"training data": "abd"})
    earlier = {name: value for name, value in saved.items() if name != "keep_special_tokens"}  # had no such setting
    check_same_run(earlier, saved)
    with pytest.raises(ValueError, match=r"as it was: keep_special_tokens: False -> True; seed: 5 -> 0\."):
        check_same_run(earlier | {"seed": 5}, saved | {"keep_special_tokens": True})
    with pytest.raises(ValueError, match=r"as it was: seed: 5 -> 0\."):
        check_same_run(earlier | {"seed": 5}, saved)
    with pytest.raises(ValueError, match=r"learning_rate: 1e-06 -> None; .*new_setting: None -> 1"):
        check_same_run(saved, {"new_setting": 1})


def test_every_setting_is_either_free_or_checked():
    fixed = set(GRPOConfig().to_dict()) - run_state.FREE_TO_CHANGE
    assert set(GRPOConfig().to_dict()) >= run_state.FREE_TO_CHANGE
    assert fixed >= {"seed", "learning_rate", "batch_size", "gradient_accumulation_steps", "temperature", "max_steps"}


def draws():
    legacy = [numpy.random.normal(), numpy.random.rand()]
    return [random.random(), random.gauss(0, 1), *legacy, *torch.rand(2).tolist(), torch.randn(1).item()]


def test_every_random_number_generator_goes_on_where_it_stood(tmp_path):
    draws()  # half a pair of normal numbers is now waiting in python's and in numpy's generator
    torch.save(run_state.random_state(), tmp_path / "state.pt")
    expected = draws() + draws()
    assert draws() != expected[:7]
    run_state.restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() + draws() == expected


def test_a_missing_tensor_is_not_filled_with_random_numbers(tmp_path, model, tokenizer):
    checkpoints.save(tmp_path / "checkpoint-1", model, tokenizer, {})
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be used .*no weights for model\.norm\.weight"):
        checkpoints.load_weights(model, tmp_path / "checkpoint-1")


def test_the_final_model_holds_no_optimizer_state_and_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        make_trainer(tmp_path, save_steps=3).train()
    finally:
        os.umask(before)
    final, checkpoint = tmp_path / "final_model", tmp_path / "checkpoint-3"
    weights = (final / "model.safetensors").stat()
    assert (final / "training_state.pt").stat().st_size < 0.2 * weights.st_size
    assert (checkpoint / "training_state.pt").stat().st_size > 1.5 * weights.st_size
    expected = 0o666 & ~before  # as of when the program started
    assert {path.stat().st_mode & 0o777 for path in [*final.iterdir(), *checkpoint.iterdir()]} == {expected}
    with pytest.raises(ValueError, match=r"end of a run .* Resume from a checkpoint, or .*--model-name"):
        make_trainer(tmp_path).train(resume=final)


def test_a_run_that_fails_in_its_first_step_leaves_the_earlier_results(tmp_path):
    make_trainer(tmp_path, save_steps=3).train()
    before = contents(tmp_path / "final_model"), (tmp_path / "metrics.jsonl").read_bytes()
    broken = make_trainer(tmp_path, reward=lambda prompts, completions: [math.inf] * len(completions), seed=1)
    with pytest.raises(ValueError, match="inf"):
        broken.train()
    assert (contents(tmp_path / "final_model"), (tmp_path / "metrics.jsonl").read_bytes()) == before
    assert (tmp_path / "checkpoint-3").is_dir()
    make_trainer(tmp_path, save_steps=5, seed=1).train()
    assert not (tmp_path / "checkpoint-3").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    run = make_trainer(tmp_path)
    steps = run.steps()
    next(steps)
    code = "import sys\nfrom pathlib import Path\nfrom grpo_lab.training.output_dir import locked\n"
    code += f"with locked(Path({str(tmp_path)!r})): pass"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"is in use by process {os.getpid()} on " in other.stderr
    assert "remove" in other.stderr
    steps.close()
    assert not (tmp_path / output_dir.LOCK).exists()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("content", ["", "[]", '{"pid": "x", "host": 3}', '{"pid": 999999999, "host": "%s"}'])
def test_the_lock_of_a_process_that_has_ended_is_replaced(tmp_path, content):
    (tmp_path / output_dir.LOCK).write_text(content.replace("%s", socket.gethostname()))
    with output_dir.locked(tmp_path):
        assert json.loads((tmp_path / output_dir.LOCK).read_text())["pid"] == os.getpid()
    (tmp_path / output_dir.LOCK).write_text('{"pid": 1, "host": "elsewhere"}')
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere"), output_dir.locked(tmp_path):
        pass


def test_links_are_removed_and_not_what_they_lead_to(tmp_path):
    (tmp_path / "disk" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "disk" / "checkpoint-1" / STATE_FILE).touch()
    run = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-3"):
        (run / name).mkdir(parents=True)
        (run / name / STATE_FILE).touch()
    (run / "checkpoint-1").symlink_to(tmp_path / "disk" / "checkpoint-1")
    output_dir.prune(run, 2)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "disk" / "checkpoint-1" / STATE_FILE).exists()
    (run / ".unfinished-checkpoint-4").symlink_to(tmp_path / "disk")
    checkpoints.save(run / "checkpoint-4", tiny_model(), make_tokenizer(), STATE)
    assert load_state(run / "checkpoint-4")["step"] == 3


def test_only_a_full_disk_is_called_full(tmp_path, monkeypatch):
    model = tiny_model()
    for error, full in (
        (OSError(28, "No space left on device"), True),
        (MemoryError("x"), False),
        (UnicodeError("x"), False),
    ):
        monkeypatch.setattr(model, "save_pretrained", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match="cannot write") as caught:
            checkpoints.save(tmp_path / "checkpoint-1", model, make_tokenizer(), STATE)
        assert ("Is the disk full?" in str(caught.value)) == full


def test_the_folder_stays_where_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = make_trainer("out", max_steps=2)
    (tmp_path / "elsewhere").mkdir()
    for _ in run.steps():
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "out" / "final_model").is_dir()
    assert make_trainer("~/x").output_dir == tmp_path / "home" / "x"
