"""Install the package as its users do, each time into a fresh environment, and run what they run first. Linux.

    python .ci/check_installs.py [option of pip ...]

    sdist    the source distribution holds every file of the repository; the wheel is built from it
    lab      the extra [lab] alone, from a checkout, with the tested versions: notebooks 00 and 11
    nbgrader the solved notebooks are released, submitted and graded by nbgrader itself
    torchao  the same beside torchao 0.10.0, which Colab ships: LoRA is refused with its cure
    newest   the same with the newest Transformers: notebook 00
    oldest   the wheel alone, with the oldest supported version of everything but PyTorch: three steps of training,
             with LoRA and without, write no warning

The test environment hides what these find: it has every optional package, in the tested version. PyTorch is the
tested one everywhere, because its older wheels for Linux are CUDA builds of gigabytes.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP_OPTIONS = sys.argv[1:]
LIMIT = 600  # seconds for any one command
PROGRESS = re.compile(r"^Step \d+ of \d+: ")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
ENVIRONMENT.pop("PYTHONPATH", None)  # what is installed is tested, not the checkout


def run(*command: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed; show what it wrote if it does not."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}\nended with {done.returncode}")
    return done


@contextmanager
def step(name: str):
    """Say what is checked, and how long it took."""
    began = time.monotonic()
    print(f"{name} ... ", end="", flush=True)
    yield
    print(f"passed in {time.monotonic() - began:.0f} s", flush=True)


def environment(folder: Path, *requirements: str | Path, on_top_of: Path | None = None) -> Path:
    """Make a virtual environment with these packages, and return its Python.

    on_top_of: another environment, whose packages this one sees below its own.
    """
    run(sys.executable, "-m", "venv", folder)
    if on_top_of:
        (below,) = on_top_of.glob("lib/python*/site-packages")
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    python = folder / "bin" / "python"
    if requirements:
        run(python, "-m", "pip", "install", "--quiet", "--no-compile", *PIP_OPTIONS, *requirements)
    return python


def oldest(requirements: list[str]) -> list[str]:
    """Return the lower bound of each requirement as the version to install; PyTorch's is left out."""
    bounds = [re.match(r"([\w-]+)>=([\w.]+)", requirement) for requirement in requirements]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound[1] != "torch"]


def pinned(name: str) -> str:
    """Return the tested version of a package as a requirement."""
    return re.search(rf"^{name}==.+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]


def check_sdist(folder: Path) -> Path:
    """Build the source distribution, and the wheel from it; return the wheel."""
    python = environment(folder / "build", "build")
    said = run(python, "-m", "build", "--outdir", folder / "dist", ROOT)
    assert "would be ignored" not in said.stdout + said.stderr, said.stderr
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files").stdout.splitlines()
    missing = [name for name in tracked if name not in held and (ROOT / name).is_file()]
    assert not missing, f"the source distribution lacks {missing}: see MANIFEST.in"
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def check_notebooks(python: Path, *numbers: str) -> None:
    """Run these notebooks with this Python."""
    notebooks = [path for number in numbers for path in sorted(ROOT.glob(f"notebooks/{number}_*.ipynb"))]
    assert len(notebooks) == len(numbers), notebooks
    run(python, ROOT / ".ci" / "run_notebooks.py", *notebooks)


def check_training(python: Path, folder: Path) -> None:
    """Train three steps, with LoRA and without; nothing but the progress may be on stderr."""
    train = [python.with_name("grpo-lab"), "train", "--max-steps", "3", "--warmup-steps", "0", "--overwrite-output-dir"]
    for extra in ([], ["--lora-rank", "4"]):
        said = run(*train, *extra, folder=folder).stderr
        lines = [line for line in re.split(r"[\r\n]", said) if line.strip() and not PROGRESS.match(line)]
        assert not lines, "\n".join(lines)


def check_torchao(python: Path, folder: Path) -> None:
    """Ask for LoRA beside an old torchao: one sentence with the cure, from training and from doctor."""
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *PIP_OPTIONS, "torchao==0.10.0")
    command = [python, "-m", "grpo_lab.cli", "train", "--lora-rank", "4", "--output-dir", folder / "torchao-run"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pip uninstall -y torchao" in done.stderr, done.stderr
    assert "torchao" in run(python, "-m", "grpo_lab.cli", "doctor", folder=folder).stdout


def main() -> None:
    """Run all checks in a temporary folder; stop at the first that fails."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = oldest([*project["dependencies"], *project["optional-dependencies"]["lora"]])
    with tempfile.TemporaryDirectory(prefix="grpo-lab-installs-") as name:
        folder = Path(name)
        with step("sdist and wheel"):
            wheel = check_sdist(folder)
        with step("lab: installing"):
            lab = environment(folder / "lab", "-c", "constraints.txt", "-e", ".[lab]")
        with step("lab: notebooks 00 and 11"):
            check_notebooks(lab, "00", "11")
        with step("nbgrader: release, submit, autograde"):
            python = environment(folder / "nbgrader", "nbgrader==0.9.6", on_top_of=Path(sys.prefix))
            said = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/course/test_nbgrader.py").stdout
            assert "1 passed" in said, said
        with step("torchao 0.10.0: LoRA"):
            check_torchao(environment(folder / "torchao", on_top_of=folder / "lab"), folder)
        with step("oldest: installing the wheel"):
            python = environment(folder / "oldest", wheel, *requirements, pinned("torch"))
        with step("oldest: training, with LoRA and without"):
            check_training(python, folder)
        with step("newest Transformers: installing"):
            newest = environment(folder / "newest", "--upgrade", "transformers", on_top_of=folder / "lab")
        with step("newest Transformers: notebook 00"):
            check_notebooks(newest, "00")


if __name__ == "__main__":
    main()
