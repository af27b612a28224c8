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
ROOMS = [
    "algorithm", "hardware", "models", "rollout", "rewards", "training", "tasks", "planning", "course", "cli",
]  # fmt: skip
"""From the bottom up: a room imports from itself and from those before it."""
MATHEMATICS = ("logprobs", "advantages", "kl", "losses")
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The dotted name below grpo_lab, such as "training.config"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_of(path) for path in MODULES}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_lab"):
            base = node.module.removeprefix("grpo_lab").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                candidates = (full, grpo_lab._HOME.get(full), grpo_lab._MODULES.get(full), base)
                found |= {next(name for name in candidates if name in NAMES or name == "")}
    return found - {""}  # its own version


def room_of(module: str) -> int:
    """The number of its room; interop stands on training, train_grpo on everything."""
    room = module.split(".")[0]
    return ROOMS.index({"interop": "training", "train_grpo": "cli"}.get(room, room))


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return
    name = module_of(path)
    above = [other for other in imports_of(path) if room_of(other) > room_of(name)]
    assert not above, f"{name} imports {above} from above"


def test_no_module_imports_itself_by_way_of_others():
    arrows = {module_of(path): imports_of(path) for path in MODULES}
    while free := {name for name, others in arrows.items() if not others & arrows.keys() - {name}}:
        arrows = {name: others for name, others in arrows.items() if name not in free}
    assert not arrows


def roots_of(name: str) -> set[str]:
    """The top-level packages that a module imports."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    return roots | {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_mathematics_knows_no_model_no_files_and_no_randomness(name):
    assert roots_of(f"algorithm/{name}") <= {"torch", "typing", "dataclasses", "grpo_lab"}
    assert "torch.rand" not in (PACKAGE / f"algorithm/{name}.py").read_text(encoding="utf-8")


def test_the_algorithm_can_be_read_in_an_hour():
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in (PACKAGE / "algorithm").glob("*.py")) < 900


def test_rewards_use_the_standard_library_one_matcher_that_can_be_stopped_and_a_process_that_can():
    assert roots_of("rewards/verifiable") <= sys.stdlib_module_names | {"regex", "grpo_lab"}
    assert imports_of(PACKAGE / "rewards/verifiable.py") == {"rewards.isolated"}
    assert roots_of("rewards/isolated") <= sys.stdlib_module_names | {"math_verify", "reasoning_gym"}  # only there


def test_every_module_opens_with_a_sentence_and_is_short():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), path
        assert text.count("\n") <= 400, path


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
            "import grpo_lab, grpo_lab.interop, grpo_lab.tasks, grpo_lab.rollout.vllm\n"
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
def test_the_wheel_holds_the_model_and_the_course_and_weighs_less_than_ten_megabytes(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("grpo_lab-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("model/model.safetensors", "model/config.json", "model/tokenizer.json", "card.json", "make.py"):
        assert f"grpo_lab/tasks/pocket/{name}" in names
    assert wheel.stat().st_size < 10 * 10**6


def test_no_function_is_longer_than_sixty_lines():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{module_of(path)}.{node.name}"
