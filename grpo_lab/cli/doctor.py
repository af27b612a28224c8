"""`grpo-lab doctor`: what would stop or slow a run on this machine, and the cure.

Each check changes nothing; the only network request asks whether the Hub answers. Imports stand inside the checks,
because one of them may be what is broken. (`transformers env`, `accelerate env` and torch.utils.collect_env list
versions; they neither judge them nor name a cure.)
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

from grpo_lab.training.config import GRPOConfig

GB = 1e9  # bytes
HUB_SECONDS = 3.0
DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_TORCHAO = "0.16"  # peft raises ImportError for an older one
OPTIONAL = {  # package -> what is missing without it
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
        """Return "problem" if a run would stop, "note" if it works with less or more slowly, else "ok"."""
        return "problem" if self.stops else "note" if self.cure else "ok"


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine for what would stop or slow a run",
        description="Check this machine for what would stop or slow a run: packages, device, memory, threads, disk, "
        "Hub, widgets, and the pocket model. Exit status 1 if a run would stop.",
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
    """Yield all rows, each as soon as it is known: some take seconds."""
    for check in (packages, torchao, device, device_memory, memory, threads, disk, cache, hub, widgets, pocket_model):
        try:
            yield from check(*[output_dir] * (check is disk))
        except Exception as error:
            yield Row(check.__name__, f"could not be checked ({_describe(error)})", "The other rows are still valid.")


def packages() -> Iterator[Row]:
    """Check the versions of Python and of the required and optional packages."""
    needed = {name: versions for name, versions, extra in _requirements("grpo-lab") if not extra or name in OPTIONAL}
    shown = {name: _version(name) for name in ("grpo-lab", "torch", "transformers", "accelerate", *OPTIONAL)}
    words = [f"Python {sys.version.split()[0]}", *(f"{name} {v}" for name, v in shown.items() if v)]
    checkout = Path(__file__).parents[2]
    yield Row("versions", ", ".join(words), "" if needed else f"grpo-lab is not installed: pip install '{checkout}'")
    for name, versions in needed.items():
        found, cure = _version(name), f"pip install '{name}{versions}'"
        if found is None:
            yield Row(name, f"not installed: {OPTIONAL.get(name, 'every run needs it')}", cure, name not in OPTIONAL)
        elif not versions.contains(found, prereleases=True):
            yield Row(name, f"{found} is not tested; grpo-lab needs {versions}", cure)


def torchao() -> Iterator[Row]:
    """Check that peft accepts the installed torchao; grpo-lab itself does not use it."""
    from packaging.version import Version

    found = _version("torchao")
    if found and _version("peft"):
        old = Version(found) < Version(OLDEST_TORCHAO)
        words = f"{found}: peft needs {OLDEST_TORCHAO} or newer, or none; --lora-rank fails" if old else found
        yield Row("torchao", words, "pip uninstall -y torchao" if old else "")


def device() -> Iterator[Row]:
    """Check where a run would compute and in which precision; a small sum tests the GPU."""
    import torch

    from grpo_lab.hardware.devices import resolve_device, resolve_precision

    with warnings.catch_warnings(record=True) as caught:  # PyTorch warns about a driver that is too old
        warnings.simplefilter("always")
        found = resolve_device("auto")
    words, cure, stops = f"{found}, {resolve_precision('auto', found)}", "", False
    if found == "cuda":
        fp16 = "fp16" in words
        words += f": {torch.cuda.get_device_name()}, one of {torch.cuda.device_count()}"
        try:
            torch.ones(2, device="cuda").sum().item()
            if fp16:
                words, cure = f"{words}, without bf16", "Watch the metric skipped_steps: updates that overflowed."
        except RuntimeError as error:
            words, stops = f"{words}, does not compute ({_describe(error)})", True
            cure = "No kernel image? Install a PyTorch built for this GPU. Out of memory? nvidia-smi names who uses it."
    elif found == "cpu":
        missing, cure = _why_no_cuda(torch.version.cuda, caught)
        words += missing
    yield Row("device", words, cure, stops)


def _why_no_cuda(built: str | None, caught: list) -> tuple[str, str]:
    """Return why PyTorch uses no NVIDIA GPU, and the cure; two empty strings if there is none to use."""
    from grpo_lab.hardware.system import text_of

    match = re.search(r"\b\d{3}\.\d[\d.]*", text_of(DRIVER))
    driver, visible = match and match[0], os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver and not built:
        words = f": PyTorch is built without CUDA, and there is an NVIDIA driver ({driver})"
        return words, "pip install --force-reinstall torch, from PyPI and not from PyTorch's CPU index."
    if not built:
        return "", ""
    words = f": PyTorch for CUDA {built} finds no device; NVIDIA driver: {driver or 'none'}"
    words += f". {_shorten(caught[0].message)}" if caught else ""
    if not driver:
        cure = "On a machine with a GPU: install its driver; start a container with --gpus all. Otherwise ignore this."
    elif visible is not None:
        cure = f"CUDA_VISIBLE_DEVICES={visible} may hide it: unset it."
    else:
        cure = "nvidia-smi should list the device. If it does: a newer driver, or PyTorch for an older CUDA."
    return words, cure


def device_memory() -> Iterator[Row]:
    """Check the free memory of the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        cure = "" if free > total / 2 else "nvidia-smi names the program that uses the rest."
        yield Row("GPU memory", f"{free / GB:.1f} GB free of {total / GB:.1f} GB", cure)


def memory() -> Iterator[Row]:
    """Check the free memory of the machine and of its container."""
    import psutil

    from grpo_lab.hardware.system import container_memory, free_memory

    machine, free, container = psutil.virtual_memory(), free_memory("cpu"), container_memory()
    words = f"{machine.available / GB:.1f} GB free of {machine.total / GB:.1f} GB"
    if container is not None:
        words += f"; the container may use {container[0] / GB:.1f} GB and uses {container[1] / GB:.1f} GB"
    cure = "" if free > 2 * GB else "Close other programs and notebooks, or give the container more: "
    needs = "the pocket model needs 0.5 GB." if free < 0.5 * GB else "this is enough for the pocket model only."
    yield Row("memory", words, cure and cure + needs, free < 0.5 * GB)


def threads() -> Iterator[Row]:
    """Check that PyTorch uses no more threads than there are cores, and that waiting threads do not spin."""
    import torch

    from grpo_lab.hardware.system import available_cores

    cores, used, policy = available_cores(), torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY", "not set")
    when, cure = "before Python starts (`grpo-lab train` sets it itself)", ""
    if used > cores:
        cure = f"OMP_NUM_THREADS={cores} {when}: two threads on one core are many times slower."
    elif used > 1 and policy.upper() != "PASSIVE":
        cure = f"OMP_WAIT_POLICY=PASSIVE {when}: a spinning thread on a busy core is 2 to 5 times slower."
    words = f"{cores} of {os.cpu_count()} cores available; PyTorch's threads: {used}, OMP_WAIT_POLICY: {policy}"
    yield Row("threads", words, cure)


def disk(output_dir: Path) -> Iterator[Row]:
    """Check that the output folder is writable and has room."""
    from grpo_lab.training.output_dir import cannot_write, folder_above

    if refused := cannot_write(output_dir):
        yield Row("disk", f"cannot write to {output_dir} ({refused})", "Choose another: --output-dir FOLDER.", True)
        return
    free = shutil.disk_usage(folder_above(output_dir)).free
    cure = "Make room, or --output-dir on another disk: a checkpoint takes about 12 bytes per parameter."
    yield Row("disk", f"{free / GB:.1f} GB free for {output_dir}", cure if free < 5 * GB else "", free < 0.1 * GB)


def cache() -> Iterator[Row]:
    """Check that the folder for Hub models is writable."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from grpo_lab.training.output_dir import cannot_write

    refused = cannot_write(Path(HF_HUB_CACHE))
    words = f"cannot write to {HF_HUB_CACHE} ({refused})" if refused else f"models of the Hub go to {HF_HUB_CACHE}"
    yield Row("cache", words, "For models of the Hub, choose another: HF_HOME=FOLDER." if refused else "")


def hub() -> Iterator[Row]:
    """Check that the Hub answers, through its own client, which uses mirrors and proxies."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        yield Row("hub", "not asked: HF_HUB_OFFLINE is set", "To download models, unset it.")
        return
    answer: list = []

    def ask() -> None:
        try:
            answer.append(get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code)
        except Exception as error:
            answer.append(_describe(error))

    thread = threading.Thread(target=ask, daemon=True)  # the client's timeout does not cover the DNS lookup
    thread.start()
    thread.join(HUB_SECONDS)
    status = answer[0] if answer else f"no answer in {HUB_SECONDS:g} s"
    if isinstance(status, int) and (status < 400 or status == 405):  # 405: reachable, but without HEAD
        yield Row("hub", f"{constants.ENDPOINT} answers")
    else:
        cure = "--model-name FOLDER, HF_ENDPOINT for a mirror, HTTPS_PROXY for a proxy. Pocket needs no network."
        yield Row("hub", f"{constants.ENDPOINT} cannot be reached ({status})", cure)


def widgets() -> Iterator[Row]:
    """Check that ipywidgets is installed, with the version of its browser part that it asks for."""
    ours, front = _version("ipywidgets"), _version("jupyterlab_widgets")
    if ours is None:
        words, cure = "ipywidgets is not installed: no sliders in the notebooks", "pip install ipywidgets"
        yield Row("widgets", words, f"{cure}, then restart JupyterLab.")
        return
    found = {name.replace("-", "_"): versions for name, versions, _ in _requirements("ipywidgets")}
    fitting = found.get("jupyterlab_widgets")
    if front is None or (fitting is not None and not fitting.contains(front, prereleases=True)):
        words = f"ipywidgets {ours} needs jupyterlab_widgets {fitting or ''} for the browser, found {front or 'none'}"
        yield Row("widgets", words, f"pip install 'jupyterlab_widgets{fitting or ''}', then restart JupyterLab.")
    else:
        yield Row("widgets", f"ipywidgets {ours}, jupyterlab_widgets {front}")


def pocket_model() -> Iterator[Row]:
    """Check that a model loads and generates: the pocket model, on the CPU."""
    start = time.perf_counter()
    try:
        import torch

        from grpo_lab import pocket
        from grpo_lab.rollout import prompts, sampling

        model, tokenizer = pocket.load()
        loaded, pad = time.perf_counter(), sampling.pad_token_id(tokenizer, model)
        rollouts = sampling.sample(
            model.eval(), *sampling.left_pad([prompts.encode_prompt(tokenizer, "3,5,7:22=")], pad), num_generations=1,
            uniforms=torch.rand(1, 16, generator=torch.Generator().manual_seed(0)),
            end_ids=sampling.end_token_ids(model, tokenizer), pad_id=pad,
        )  # fmt: skip
        text = tokenizer.decode(rollouts.completion_ids[0], skip_special_tokens=True)
    except Exception as error:
        cure = "Reinstall grpo-lab with pip install --force-reinstall; `grpo-lab train --debug` shows the full error."
        yield Row("pocket", f"the pocket model does not load or generate ({_describe(error)})", cure, True)
        return
    words = f"loaded in {loaded - start:.1f} s, completed in {time.perf_counter() - loaded:.2f} s: 3,5,7:22={text}"
    yield Row("pocket", words)


def _requirements(name: str) -> list[tuple]:
    """Return (name, versions, whether an extra asks for it) of each package that `name` requires."""
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


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {_shorten(error)}"


def _shorten(message: object) -> str:
    return " ".join(str(message).split(". ")[0].split())[:150]
