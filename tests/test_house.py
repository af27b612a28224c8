"""The shape of the project: who may import whom, what an import costs, what a wheel weighs."""

import ast
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import grpo_lab

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_lab"
FLOORS = [
    {"logprobs", "advantages", "kl", "losses", "rewards", "apart"},  # mathematics, and the reading of answers
    {
        "data",
        "forward",
        "decoding",
        "sampling",
        "scoring",
        "reward_models",
        "adapters",
        "batches",
        "processes",
        "rehearsal",
    },  # prompts and models
    {"config", "devices", "machines", "phases", "checkpoints", "reporting", "vllm"},  # settings, and what is written
    {"endings", "trainer", "interop", "comparison", "pretraining"},  # the run here and elsewhere, and what comes before
    {"pocket", "judge"},
    {"checks", "planning"},
    {"widgets", "lessons", "doctor", "tasks"},
    {"cli", "train_grpo"},
]
MATHEMATICS = ("logprobs", "advantages", "kl", "losses")
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_lab"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found & FLOOR.keys()


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return
    name = module_of(path)
    above = [other for other in imports_of(path) if FLOOR[other] > FLOOR[name]]
    assert not above, f"{name} imports {above} from above"


def roots_of(name: str) -> set[str]:
    """The top-level packages that a module imports."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    return roots | {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_mathematics_knows_no_model_no_files_and_no_randomness(name):
    assert roots_of(name) <= {"torch", "typing", "dataclasses", "grpo_lab"}
    assert "torch.rand" not in (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def test_rewards_use_the_standard_library_one_matcher_that_can_be_stopped_and_a_process_that_can():
    assert roots_of("rewards") <= sys.stdlib_module_names | {"regex", "grpo_lab"}
    assert imports_of(PACKAGE / "rewards.py") == {"apart"}
    assert roots_of("apart") <= sys.stdlib_module_names | {"math_verify", "reasoning_gym"}  # imported in there alone


def test_every_module_opens_with_a_sentence_and_is_short():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), path
        assert text.count("\n") < 800, path


def test_public_names_exist():
    for name in grpo_lab.__all__:
        assert getattr(grpo_lab, name).__module__.startswith("grpo_lab."), name
    with pytest.raises(AttributeError, match="no attribute 'GRPO'"):
        grpo_lab.GRPO  # noqa: B018


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_everything_needs_no_optional_package():
    assert (
        python(
            "import sys\n"
            "optional = 'datasets peft wandb ipywidgets matplotlib trl vllm math_verify reasoning_gym'\n"
            "for name in optional.split(): sys.modules[name] = None\n"
            "import grpo_lab, grpo_lab.interop, grpo_lab.tasks, grpo_lab.vllm\n"
            "print(*[name for name in grpo_lab.__all__ if getattr(grpo_lab, name) is None])"
        )
        == ""
    )


def test_help_answers_in_half_a_second():
    def seconds(*arguments):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return time.perf_counter() - began

    python_alone = min(seconds("-c", "") for _ in range(3))
    with_help = min(seconds("-m", "grpo_lab.cli", "train", "--help") for _ in range(3))
    assert with_help < 0.5 or with_help < 10 * python_alone  # a very busy machine is not our fault


@pytest.mark.slow
def test_the_wheel_holds_the_model_and_weighs_little(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("grpo_lab-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("model/model.safetensors", "model/config.json", "model/tokenizer.json", "card.json", "make.py"):
        assert f"grpo_lab/pocket/{name}" in names
    assert wheel.stat().st_size < 4 * 2**20
