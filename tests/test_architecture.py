"""docs/ARCHITECTURE.md and README.md describe the package as it is today."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from grpo_lab.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
sys.path.append(str(ROOT / "docs"))
import generate  # noqa: E402

AGAIN = "run `python docs/generate.py`"


def test_the_picture_shows_the_imports():
    assert generate.drawn_graph() == generate.architecture(), AGAIN


def test_every_room_is_in_the_picture_and_arrows_point_down():
    imports = generate.architecture()["imports"]
    levels = generate.levels(imports)
    assert levels.keys() == generate.SPANS.keys()
    assert all(levels[above] > levels[below] for above, below in generate.arrows(imports))


def test_an_arrow_that_follows_from_others_is_left_out():
    assert generate.arrows({"a": [], "b": ["a"], "c": ["a", "b"]}) == [("b", "a"), ("c", "b")]


@pytest.mark.parametrize("page", generate.PARTS, ids=lambda page: page.name)
def test_lists_are_what_the_code_says_of_itself(page):
    assert page.read_text(encoding="utf-8") == generate.rewritten(page), AGAIN


def test_the_tree_names_every_folder():
    in_git = {path.name + "/" for path in ROOT.iterdir() if path.is_dir() and any(path.glob("[!_.]*"))}
    known = {"grpo_lab/", *generate.FOLDERS}
    assert known <= in_git
    made = {"build/", "demo_output/", "dist/", "test-artefacts/", "wandb/"}
    assert {name for name in in_git if not name.startswith(".") and not name.endswith(".egg-info/")} - made <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


def test_what_the_page_says_is_in_a_file_is_there():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    links = [link for cell in cells for link in re.findall(r"\]\(\.\./(grpo_lab/[\w/]+\.py)\)([^\[]*)", cell)]
    named = [(file, name) for file, words in links for name in re.findall(r"`(\w+)`", words)]
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), (file, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    for words in (words for words in lines if words[:1] == ["grpo-lab"] and len(words) > 2):
        cli.make_parser().parse_args(words[1:])


def test_the_readmes_program_trains(tmp_path, monkeypatch, model_folder):
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    code = code.replace("Qwen/Qwen2.5-0.5B-Instruct", model_folder).replace("max_new_tokens=128", "max_new_tokens=4")
    exec(code, {})
    assert (tmp_path / "grpo_checkpoints" / "final_model" / "model.safetensors").exists()
