"""The tests see what they are there to see: each wrong version of the package in mutants/ makes one of them fail."""

import json
import subprocess
import sys

import pytest
from mutants import MUTANTS, PITFALLS, REPORT, ROOT, report


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_differs_in_one_place_and_is_python(mutant):
    assert mutant.path.read_text(encoding="utf-8").count(mutant.right) == 1
    assert "\n" not in mutant.wrong
    compile(mutant.source(), mutant.file, "exec")


def test_every_pitfall_has_a_mutant():
    assert list(PITFALLS) == list(range(1, 31))
    assert {mutant.pitfall for mutant in MUTANTS} - {None} == set(PITFALLS)


def test_the_report_is_that_of_the_catalogue():
    assert REPORT.read_text(encoding="utf-8") == report(), "run: python -m tests.mutants"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="without fork each mutant takes ten seconds; Linux tries them all")
def test_every_mutant_is_rejected_and_the_package_is_not():
    # a process of its own, which has imported neither the package nor a test, and forks once for each mutant
    command = [sys.executable, "-m", "tests.mutants", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    unchanged, *verdicts = map(json.loads, result.stdout.splitlines())
    assert unchanged["outcome"] == "passed", unchanged["said"]
    assert len(verdicts) == len(MUTANTS), result.stderr
    # "passed": no test saw it; "broken": no test judged it, because it crashed or could not be imported
    assert not [(v["name"], v["outcome"], v["said"]) for v in verdicts if v["outcome"] != "failed"]
