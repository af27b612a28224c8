"""Binder builds what the course needs: a CPU environment with the tested versions, opened at notebook 00."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BINDER = ROOT / "binder"


@pytest.fixture(scope="module")
def dockerfile(tmp_path_factory):
    """What repo2docker, the program behind Binder, would build from a fresh clone."""
    pytest.importorskip("repo2docker")
    clone = tmp_path_factory.mktemp("clone")
    (clone / "binder").symlink_to(BINDER)
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(clone)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout + result.stderr


def test_binder_builds_our_environment_and_runs_our_scripts(dockerfile):
    assert "binder/environment.yml" in dockerfile
    assert "RUN ./binder/postBuild" in dockerfile
    assert 'ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"' in dockerfile
    assert "conda environment for python=3.11\n" in dockerfile


def test_python_is_pinned_in_the_only_way_that_repo2docker_reads():
    # "python>=3.11" would be passed over, and its own default taken
    assert "  - python=3.11\n" in (BINDER / "environment.yml").read_text()


def test_packages_are_the_tested_versions_and_torch_comes_without_cuda():
    build = (BINDER / "postBuild").read_text()
    assert "-c constraints.txt" in build
    assert "whl/cpu" in build
    assert "assert not torch.version.cuda" in build


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permission, and no bash")
@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_scripts_can_run(name):
    assert os.access(BINDER / name, os.X_OK)
    subprocess.run(["bash", "-n", str(BINDER / name)], check=True)


def test_start_keeps_to_one_core_and_goes_on_with_the_server():
    lines = (BINDER / "start").read_text().splitlines()
    assert lines[-1] == 'exec "$@"'
    assert "OMP_NUM_THREADS=1" in lines[2]
