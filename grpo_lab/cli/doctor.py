"""What this machine has, and what would stop or slow a run on it: `grpo-lab doctor`.

Each function looks at one thing and changes nothing; the network is asked only whether the Hub answers.
Imports wait until they are needed, because one of them may be what is broken.
"""

import argparse
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

GB = 1e9  # bytes
HUB_SECONDS = 3.0
DRIVER = Path("/proc/driver/nvidia/version")
INSTALL = "pip install -c constraints.txt"
COSTS = {  # packages that a run can do without
    "matplotlib": "no training.png, no `grpo-lab plot`, no figures in the notebooks",
    "datasets": "no --dataset, no --eval-dataset",
    "peft": "no --lora-rank",
    "math-verify": "no --reward math_answer",
    "reasoning-gym": "no --task reasoning-gym:NAME",
}


class Row(NamedTuple):
    """One line of the report."""

    name: str
    words: str
    cure: str = ""
    stops: bool = False

    @property
    def state(self) -> str:
        """ok; note: it works, but with less or more slowly; problem: a run would stop."""
        return "problem" if self.stops else "note" if self.cure else "ok"


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its flags."""
    from grpo_lab.training.config import GRPOConfig

    parser = commands.add_parser(
        "doctor",
        help="look for what would stop or slow a run on this machine",
        description="Look for what would stop or slow a run on this machine: packages, device, memory, threads, disk, "
        "Hub, widgets, and whether the pocket model works. Exit status 1 if a run would stop.",
    )
    folder = GRPOConfig.output_dir
    parser.add_argument("--output-dir", default=folder, help=f"the folder a run would write to (default: {folder})")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print a row for each check, with the cure below it if it needs one; return 1 if something would stop a run."""
    problems = []
    for row in examine(Path(options.output_dir)):
        cure = f"\n{'':22} → {row.cure}" if row.cure else ""
        print(f"{row.state:8} {row.name:13} {row.words}{cure}", flush=True)
        problems += [row.name] if row.stops else []
    print(f"\nA run would stop: {', '.join(problems)}." if problems else "\nNothing here stops a run.")
    return 1 if problems else 0


def examine(output_dir: Path) -> Iterator[Row]:
    """All rows, each as soon as it is known: some take seconds."""
    for look in (packages, device, device_memory, memory, threads, disk, cache, hub, widgets, pocket_model):
        try:
            yield from look(*[output_dir] * (look is disk))
        except Exception as error:
            yield Row(look.__name__, f"could not be examined ({_said(error)})", "The other lines stand without it.")


def packages() -> Iterator[Row]:
    """Python and the packages: those that are needed, and those that only cost a feature."""
    asked = {name: versions for name, versions, extra in _asked("grpo-lab") if not extra or name in COSTS}
    shown = {name: _version(name) for name in ("grpo-lab", "torch", "transformers", "accelerate", *COSTS)}
    words = [f"Python {sys.version.split()[0]}", *(f"{name} {v}" for name, v in shown.items() if v)]
    yield Row("versions", ", ".join(words), "" if asked else f"grpo-lab is not installed: {INSTALL} -e .")
    for name, versions in asked.items():
        found, cure = _version(name), f"{INSTALL} '{name}{versions}'"
        if found is None:
            yield Row(name, f"not installed: {COSTS.get(name, 'nothing runs without it')}", cure, name not in COSTS)
        elif not versions.contains(found, prereleases=True):
            yield Row(name, f"{found} was never tried; asked for is {versions}", cure)


def device() -> Iterator[Row]:
    """Where a run would compute, and how precisely; a small sum shows that the device can."""
    import torch

    from grpo_lab.hardware.devices import resolve_device, resolve_precision

    with warnings.catch_warnings(record=True) as said:  # PyTorch's own, about a driver that is too old
        warnings.simplefilter("always")
        found = resolve_device("auto")
    words, cure = f"{found}, {resolve_precision('auto', found)}", ""
    built, driver, hidden = torch.version.cuda, _driver(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if found == "cuda":
        words += f": {torch.cuda.get_device_name()}, one of {torch.cuda.device_count()}"
        try:
            torch.ones(2, device="cuda").sum().item()
        except RuntimeError as error:
            cure = "No kernel image? Install a PyTorch built for this device. No memory? nvidia-smi names who has it."
            words, stops = f"{words}, does not compute ({_said(error)})", True
            yield Row("device", words, cure, stops)
            return
        if "fp16" in words:
            words, cure = f"{words}, without bf16", "Watch skipped_steps: updates that overflowed."
    elif found == "cpu" and driver and not built:
        words += f": PyTorch is built without CUDA, and there is an NVIDIA driver ({driver})"
        cure = f"{INSTALL} --force-reinstall torch, without the CPU's --extra-index-url."
    elif found == "cpu" and built:
        words += f": PyTorch for CUDA {built} finds no device; NVIDIA driver: {driver or 'none'}"
        words += f". {_short(said[0].message)}" if said else ""
        cure = "On a machine with a GPU: install its driver; start a container with --gpus all. Else nothing is wrong."
        if driver:
            cure = "nvidia-smi should list the device. If it does: a newer driver, or PyTorch for an older CUDA."
        if driver and hidden is not None:
            cure = f"CUDA_VISIBLE_DEVICES={hidden} may hide it: unset it."
    yield Row("device", words, cure)


def device_memory() -> Iterator[Row]:
    """What is free on the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        cure = "" if free > total / 2 else "nvidia-smi names the program that holds the rest."
        yield Row("GPU memory", f"{free / GB:.1f} GB free of {total / GB:.1f} GB", cure)


def memory() -> Iterator[Row]:
    """What the machine has free, and what the container may use of it."""
    import psutil

    from grpo_lab.hardware.system import container_memory, free_memory

    machine, room, container = psutil.virtual_memory(), free_memory("cpu"), container_memory()
    words = f"{machine.available / GB:.1f} GB free of {machine.total / GB:.1f} GB"
    if container is not None:
        words += f"; the container may use {container[0] / GB:.1f} GB and uses {container[1] / GB:.1f} GB"
    little = "" if room > 2 * GB else "Close other programs and notebooks, or give the container more: "
    needs = "the pocket model takes 0.5 GB." if room < 0.5 * GB else "this is for the pocket model, not a large one."
    yield Row("memory", words, little and little + needs, room < 0.5 * GB)


def threads() -> Iterator[Row]:
    """Cores seen, cores that are ours, threads, and whether a thread that waits spins."""
    import torch

    from grpo_lab.hardware.system import available_cores

    ours, used, policy = available_cores(), torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY", "not set")
    when, cure = "before Python starts (`grpo-lab train` sees to it itself)", ""
    if used > ours:
        cure = f"OMP_NUM_THREADS={ours} {when}: two threads on one core are many times slower."
    elif used > 1 and policy.upper() != "PASSIVE":
        cure = f"OMP_WAIT_POLICY=PASSIVE {when}: a spinning thread on a busy core is 2 to 5 times slower."
    words = f"{os.cpu_count()} cores, {ours} ours; PyTorch's threads: {used}, OMP_WAIT_POLICY: {policy}"
    yield Row("threads", words, cure)


def disk(output_dir: Path) -> Iterator[Row]:
    """Can the output folder be written, and is there room?"""
    from grpo_lab.training.output_dir import cannot_write, folder_above

    if refused := cannot_write(output_dir):
        yield Row("disk", f"cannot write to {output_dir} ({refused})", "--output-dir FOLDER names another.", True)
        return
    free = shutil.disk_usage(folder_above(output_dir)).free
    cure = "Make room, or --output-dir on another disk: a checkpoint takes 12 bytes per weight, or a little more."
    yield Row("disk", f"{free / GB:.1f} GB free for {output_dir}", cure if free < 5 * GB else "", free < 0.1 * GB)


def cache() -> Iterator[Row]:
    """Can models of the Hub be kept?"""
    from huggingface_hub.constants import HF_HUB_CACHE

    from grpo_lab.training.output_dir import cannot_write

    refused = cannot_write(Path(HF_HUB_CACHE))
    words = f"cannot write to {HF_HUB_CACHE} ({refused})" if refused else f"models of the Hub go to {HF_HUB_CACHE}"
    yield Row("cache", words, "For models of the Hub, HF_HOME=FOLDER names another." if refused else "")


def hub() -> Iterator[Row]:
    """Does the Hub answer? Asked through its own client, which knows mirrors and proxies."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        yield Row("hub", "not asked: HF_HUB_OFFLINE is set", "To download models, unset it.")
        return
    answer: list = []

    def ask() -> None:
        try:
            answer.append(get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code)
        except Exception as error:
            answer.append(_said(error))

    asking = threading.Thread(target=ask, daemon=True)  # a timeout of the client leaves out the look-up of the name
    asking.start()
    asking.join(HUB_SECONDS)
    status = answer[0] if answer else f"no answer in {HUB_SECONDS:g} s"
    if isinstance(status, int) and (status < 400 or status == 405):  # 405: it is there, and answers no HEAD
        yield Row("hub", f"{constants.ENDPOINT} answers")
    else:
        cure = "--model-name FOLDER, HF_ENDPOINT for a mirror, HTTPS_PROXY for a proxy. The pocket model needs none."
        yield Row("hub", f"{constants.ENDPOINT} cannot be reached ({status})", cure)


def widgets() -> Iterator[Row]:
    """Is ipywidgets here, and does the part that the browser loads fit it?"""
    ours, front = _version("ipywidgets"), _version("jupyterlab_widgets")
    fitting = next((v for name, v, _ in _asked("ipywidgets") if name.replace("-", "_") == "jupyterlab_widgets"), None)
    words, cure, again = f"ipywidgets {ours}, jupyterlab_widgets {front}", "", ", then restart JupyterLab."
    if ours is None or front is None:
        missing = "ipywidgets" if ours is None else "jupyterlab_widgets, its part for the browser,"
        words, cure = f"{missing} is not installed: no sliders in the notebooks", f"{INSTALL} -e '.[lab]'{again}"
    elif fitting is not None and not fitting.contains(front, prereleases=True):
        words, cure = f"{words}: they do not fit", f"pip install 'jupyterlab_widgets{fitting}'{again}"
    else:
        import ipywidgets

        ipywidgets.IntSlider().close()
    yield Row("widgets", words, cure)


def pocket_model() -> Iterator[Row]:
    """Does a model load and write? The embedded one, on the CPU."""
    began = time.perf_counter()
    try:
        import torch

        from grpo_lab import pocket
        from grpo_lab.rollout import prompts, sampling

        model, tokenizer = pocket.load()
        loaded, pad = time.perf_counter(), sampling.pad_token_id(tokenizer, model)
        row = sampling.sample(
            model.eval(), *sampling.left_pad([prompts.encode_prompt(tokenizer, "3,5,7:22=")], pad), num_generations=1,
            uniforms=torch.rand(1, 16, generator=torch.Generator().manual_seed(0)),
            end_ids=sampling.end_token_ids(model, tokenizer), pad_id=pad,
        )  # fmt: skip
        text = tokenizer.decode(row.completion_ids[0], skip_special_tokens=True)
    except Exception as error:
        cure = f"Install it again, with all that it needs: {INSTALL} --force-reinstall -e ."
        yield Row("pocket", f"the pocket model does not load or write ({_said(error)})", cure, True)
        return
    words = f"loaded in {loaded - began:.1f} s, completed in {time.perf_counter() - loaded:.2f} s: 3,5,7:22={text}"
    yield Row("pocket", words)


def _asked(name: str) -> list[tuple]:
    # name and versions of each package that this one asks for, and whether that is for an extra
    from packaging.requirements import Requirement

    try:
        found = map(Requirement, metadata.requires(name) or ())
    except metadata.PackageNotFoundError:
        return []
    return [(r.name, r.specifier, "extra" in str(r.marker)) for r in found]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    from grpo_lab.hardware.system import text_of

    found = re.search(r"\b\d{3}\.\d[\d.]*", text_of(DRIVER))
    return found[0] if found else None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {_short(error)}"


def _short(message: object) -> str:
    return " ".join(str(message).split(". ")[0].split())[:150]
