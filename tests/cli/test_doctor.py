"""The doctor: each thing that can be wrong with a machine gets its row and its cure, and a sound one gets none."""

import os
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch

from grpo_lab import pocket
from grpo_lab.cli import doctor
from grpo_lab.cli import main as cli
from grpo_lab.hardware import system

GB = 10**9
DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\nGCC version: 12.3.0\n"


@pytest.fixture(autouse=True)
def sound_machine(monkeypatch, tmp_path):
    """A machine without a GPU, a container's limits or a network, on which nothing is wrong."""
    monkeypatch.setattr(system, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GB, available=8 * GB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=50 * GB))
    monkeypatch.setattr(system, "available_cores", lambda: 4)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answering(monkeypatch, lambda: 200)


def answering(monkeypatch, status):
    """The Hub's client as it answers here: `status()` gives the status of the answer, or raises."""
    client = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=status()))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: client)


def rows_of(look, *arguments):
    return {row.name: row for row in look(*arguments)}


def only(look, *arguments):
    (row,) = look(*arguments)
    return row


# --- packages -----------------------------------------------------------------------------------------------


GYM = {"reasoning-gym": "0.1.25"}  # of the packages that a run can do without the one that tests do without too


def versions(monkeypatch, **changed):
    """Some packages in another version, or with None not installed."""
    version = metadata.version

    def changed_version(name):
        if changed.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return changed.get(name) or version(name)

    monkeypatch.setattr(metadata, "version", changed_version)


def test_the_versions_of_this_installation_are_said_and_are_those_asked_for(monkeypatch):
    versions(monkeypatch, **GYM)
    row = only(doctor.packages)
    assert row.state == "ok"
    assert f"Python {sys.version.split()[0]}, grpo-lab {metadata.version('grpo-lab')}, torch " in row.words


@pytest.mark.parametrize("name", doctor.OPTIONAL)
def test_a_missing_package_that_costs_a_feature_says_which(monkeypatch, name):
    versions(monkeypatch, **{name: None})
    row = rows_of(doctor.packages)[name]
    assert (row.state, row.words) == ("note", f"not installed: {doctor.OPTIONAL[name]}")
    assert row.cure.startswith(f"pip install '{name}>=")


def test_a_missing_package_that_everything_needs_is_a_problem(monkeypatch):
    versions(monkeypatch, accelerate=None)
    row = rows_of(doctor.packages)["accelerate"]
    assert (row.state, row.cure) == ("problem", "pip install 'accelerate>=1.10'")


def test_an_older_version_than_asked_for_is_noted(monkeypatch):
    versions(monkeypatch, torch="2.4.1+cu121")
    row = rows_of(doctor.packages)["torch"]
    assert (row.state, row.words) == ("note", "2.4.1+cu121 is not tested; grpo-lab needs >=2.11")
    assert "torch>=2.11" in row.cure


def test_a_nightly_build_newer_than_asked_for_is_sound(monkeypatch):
    versions(monkeypatch, torch="2.99.0.dev20260101+cu130", **GYM)
    assert only(doctor.packages).state == "ok"


def test_a_package_used_from_its_folder_is_noted(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    assert only(doctor.packages).cure == f"grpo-lab is not installed: pip install '{Path(doctor.__file__).parents[2]}'"


@pytest.mark.parametrize(
    ("torchao", "state"), [("0.10.0", "note"), ("0.15.0+cpu", "note"), ("0.16.0", "ok"), ("0.17.0", "ok")]
)
def test_a_torchao_that_peft_refuses_is_noted(monkeypatch, torchao, state):
    versions(monkeypatch, torchao=torchao, peft="0.20.0")
    row = only(doctor.torchao)
    assert row.state == state
    assert row.words.startswith(torchao)
    assert row.cure == ("pip uninstall -y torchao" if state == "note" else "")


@pytest.mark.parametrize("missing", ["torchao", "peft"])
def test_torchao_matters_only_beside_peft(monkeypatch, missing):
    versions(monkeypatch, **{"torchao": "0.10.0", "peft": "0.20.0", missing: None})
    assert list(doctor.torchao()) == []


def test_no_cure_needs_a_checkout():
    package = Path(doctor.__file__).parents[1]
    texts = {path.name: path.read_text(encoding="utf-8") for path in (package / "cli").glob("*.py")}
    assert not [name for name, text in texts.items() if "constraints.txt" in text or "install -e" in text]


# --- the device -----------------------------------------------------------------------------------------------


def gpu(monkeypatch, *, bf16=True, free=70 * GB, compute=torch.ones):
    for name, value in {
        "is_available": True, "get_device_name": "T4", "device_count": 2, "mem_get_info": (free, 80 * GB),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch, "ones", lambda *size, device: compute(*size))


def test_a_machine_without_a_gpu_is_sound():
    row = only(doctor.device)
    assert (row.state, row.words) == ("ok", "cpu, fp32")
    assert list(doctor.device_memory()) == []


def test_a_driver_without_a_cuda_build_is_noted():
    doctor.DRIVER.write_text(DRIVER)
    row = only(doctor.device)
    assert row.state == "note"
    assert "built without CUDA, and there is an NVIDIA driver (560.35.03)" in row.words
    assert "--force-reinstall torch" in row.cure


@pytest.mark.parametrize(
    ("driver", "hidden", "cure"),
    [
        ("", None, "install its driver; start a container with --gpus all"),
        (DRIVER, None, "nvidia-smi should list the device"),
        (DRIVER, "-1", "CUDA_VISIBLE_DEVICES=-1 may hide it"),
        (DRIVER, "", "CUDA_VISIBLE_DEVICES= may hide it"),
    ],
    ids=["no driver", "driver", "hidden", "hidden by nothing"],
)
def test_a_cuda_build_without_a_device_says_where_to_look(monkeypatch, driver, hidden, cure):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    doctor.DRIVER.write_text(driver)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    row = only(doctor.device)
    assert row.state == "note"
    assert "PyTorch for CUDA 12.8 finds no device" in row.words
    assert cure in row.cure


def test_what_pytorch_says_about_an_old_driver_is_passed_on(monkeypatch):
    def old_driver():
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old (found version 11040). Please update", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    assert only(doctor.device).words.endswith("The NVIDIA driver on your system is too old (found version 11040)")


def test_a_gpu_that_computes_is_sound(monkeypatch):
    gpu(monkeypatch)
    row = only(doctor.device)
    assert (row.state, row.words) == ("ok", "cuda, bf16: T4, one of 2")
    row = only(doctor.device_memory)
    assert (row.state, row.words) == ("ok", "70.0 GB free of 80.0 GB")


def test_a_gpu_without_bf16_is_noted(monkeypatch):
    gpu(monkeypatch, bf16=False)
    row = only(doctor.device)
    assert (row.state, row.words) == ("note", "cuda, fp16: T4, one of 2, without bf16")
    assert "skipped_steps" in row.cure


def test_a_gpu_that_cannot_compute_is_a_problem(monkeypatch):
    def no_kernel(*_):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    gpu(monkeypatch, compute=no_kernel)
    row = only(doctor.device)
    assert row.state == "problem"
    assert "no kernel image is available" in row.words
    assert "a PyTorch built for this GPU" in row.cure


def test_a_gpu_that_others_fill_is_noted(monkeypatch):
    gpu(monkeypatch, free=3 * GB)
    row = only(doctor.device_memory)
    assert (row.state, row.words) == ("note", "3.0 GB free of 80.0 GB")
    assert "nvidia-smi names" in row.cure


# --- memory, threads, disk ---------------------------------------------------------------------------------------


def limit(folder, name, value, stat):
    folder.mkdir(parents=True)
    (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize(
    ("free", "state", "cure"),
    [(8 * GB, "ok", ""), (1.5 * GB, "note", "enough for the pocket model only"), (0.2 * GB, "problem", "0.5 GB")],
)
def test_little_free_memory_is_said_by_what_still_fits(monkeypatch, free, state, cure):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GB, available=free))
    row = only(doctor.memory)
    assert row.state == state
    assert cure in row.cure


@pytest.mark.parametrize(
    ("folder", "name", "stat"),
    [("", "memory.max", "anon 600000000\nfile 1\n"), ("memory", "memory.limit_in_bytes", "total_rss 600000000\n")],
    ids=["version 2", "version 1"],
)
def test_the_containers_limit_counts_where_the_machine_has_more(folder, name, stat):
    limit(system.CGROUP / folder, name, 24 * 10**8, stat)
    row = only(doctor.memory)
    assert row.state == "note"  # 2.4 - 0.6 GB
    assert "the container may use 2.4 GB and uses 0.6 GB" in row.words


@pytest.mark.parametrize("value", ["max", str(2**63 - 4096), "nonsense"])
def test_no_limit_is_no_limit(value):
    limit(system.CGROUP, "memory.max", value, "")
    assert only(doctor.memory) == ("memory", "8.0 GB free of 16.0 GB", "", False)


@pytest.mark.parametrize(
    ("used", "policy", "state", "cure"),
    [
        (1, None, "ok", ""),
        (4, "PASSIVE", "ok", ""),
        (4, "passive", "ok", ""),
        (4, None, "note", "OMP_WAIT_POLICY=PASSIVE before Python starts"),
        (4, "ACTIVE", "note", "2 to 5 times slower"),
        (16, "PASSIVE", "note", "OMP_NUM_THREADS=4 before Python starts"),
    ],
)
def test_threads_follow_the_quota_and_do_not_spin(monkeypatch, used, policy, state, cure):
    monkeypatch.setattr(torch, "get_num_threads", lambda: used)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    row = only(doctor.threads)
    assert row.state == state
    assert cure in row.cure
    assert f"4 of {os.cpu_count()} cores available; PyTorch's threads: {used}" in row.words


@pytest.mark.parametrize(("free", "state"), [(50 * GB, "ok"), (2 * GB, "note"), (0.05 * GB, "problem")])
def test_a_disk_that_is_nearly_full_is_said(monkeypatch, tmp_path, free, state):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    row = only(doctor.disk, tmp_path / "not" / "yet" / "there")
    assert row.state == state
    assert ("--output-dir on another disk" in row.cure) == (state != "ok")
    assert list(tmp_path.iterdir()) == []  # it was only looked at


def test_a_file_in_the_way_of_the_output_folder_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("in the way")
    row = only(doctor.disk, tmp_path / "file" / "out")
    assert row.state == "problem"
    assert "cannot write to" in row.words
    assert row.cure == "Choose another: --output-dir FOLDER."


@pytest.fixture
def no_permission(monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))  # root may write everywhere, so it is not tried

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)


def test_no_permission_is_a_problem_for_the_output_and_a_note_for_the_cache(no_permission, tmp_path):
    row = only(doctor.disk, tmp_path)
    assert (row.state, row.words) == ("problem", f"cannot write to {tmp_path} (Permission denied)")
    row = only(doctor.cache)
    assert row.state == "note"
    assert "HF_HOME=FOLDER" in row.cure


def test_a_cache_that_can_be_written_is_sound(tmp_path):
    assert only(doctor.cache) == ("cache", f"models of the Hub go to {tmp_path / 'cache'}", "", False)


# --- the Hub, widgets, the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 307, 405])
def test_a_hub_that_answers_is_sound(monkeypatch, status):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://mirror.example")
    answering(monkeypatch, lambda: status)
    assert only(doctor.hub) == ("hub", "https://mirror.example answers", "", False)


def refused():
    raise ConnectionError("name or service not known")


@pytest.mark.parametrize(("status", "why"), [(lambda: 503, "503"), (refused, "name or service not known")])
def test_a_hub_that_cannot_be_reached_is_noted(monkeypatch, status, why):
    answering(monkeypatch, status)
    row = only(doctor.hub)
    assert row.state == "note"
    assert why in row.words
    assert all(word in row.cure for word in ("HF_ENDPOINT", "HTTPS_PROXY", "--model-name FOLDER"))


def test_a_hub_that_hangs_is_given_up(monkeypatch):
    enough = threading.Event()
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.1)
    answering(monkeypatch, lambda: enough.wait(30))
    began = time.monotonic()
    row = only(doctor.hub)
    enough.set()
    assert "no answer in 0.1 s" in row.words
    assert time.monotonic() - began < 10


def test_offline_means_that_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("it was asked"))
    row = only(doctor.hub)
    assert (row.state, row.cure) == ("note", "To download models, unset it.")


def test_widgets_that_fit_are_sound():
    row = only(doctor.widgets)
    assert row.state == "ok"
    assert f"ipywidgets {metadata.version('ipywidgets')}" in row.words


@pytest.mark.parametrize(
    ("changed", "words", "cure"),
    [
        ({"ipywidgets": None}, "ipywidgets is not installed", "pip install ipywidgets, then restart JupyterLab"),
        ({"jupyterlab_widgets": None}, "for the browser, found none", "pip install 'jupyterlab_widgets~=3"),
        ({"jupyterlab_widgets": "1.1.7"}, "for the browser, found 1.1.7", "pip install 'jupyterlab_widgets~=3"),
    ],
)
def test_widgets_that_do_not_fit_are_noted(monkeypatch, changed, words, cure):
    versions(monkeypatch, **changed)
    row = only(doctor.widgets)
    assert row.state == "note"
    assert words in row.words
    assert cure in row.cure


def test_the_pocket_model_answers():
    row = only(doctor.pocket_model)
    assert row.state == "ok"
    assert row.words.partition("3,5,7:22=")[2]


def test_a_pocket_model_without_weights_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(pocket, "WEIGHTS", tmp_path)
    row = only(doctor.pocket_model)
    assert row.state == "problem"
    assert "--force-reinstall" in row.cure


# --- the report -----------------------------------------------------------------------------------------------


def test_what_cannot_be_examined_does_not_hide_the_rest(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: 1 / 0)
    rows = rows_of(doctor.examine, Path("out"))
    assert rows["memory"].words == "could not be checked (ZeroDivisionError: division by zero)"
    assert {"versions", "device", "threads", "disk", "cache", "hub", "widgets", "pocket"} < rows.keys()


def test_a_sound_machine_has_status_0_and_a_problem_status_1(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    versions(monkeypatch, **GYM)
    assert cli.main(["doctor", "--output-dir", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok       ") for line in lines[:-2])
    assert lines[-1] == "Nothing here stops a run."
    answering(monkeypatch, refused)  # a note alone stops nothing
    assert cli.main(["doctor", "--output-dir", str(tmp_path / "out")]) == 0
    assert "note     hub  " in capsys.readouterr().out
    (tmp_path / "out").write_text("in the way")
    assert cli.main(["doctor", "--output-dir", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "problem  disk          cannot write to" in captured.out
    assert " → Choose another: --output-dir FOLDER." in captured.out
    assert captured.out.endswith("A run would stop: disk.\n")
    assert captured.err == ""
