"""Tries mutants, each in a process of its own, forked from one that has imported what takes seconds to import."""

import gc
import importlib
import importlib.machinery
import importlib.util
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import hypothesis
import pytest
import torch

from . import ROOT, Mutant

PATIENCE = 300  # seconds; a mutant that hangs has not been caught by a test
# Elsewhere than on Linux a forked PyTorch may crash: there each process imports everything itself, which is slow.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass(frozen=True)
class Verdict:
    """What the tests made of a mutant, or of the package as it is."""

    name: str
    outcome: str
    """"passed", "failed" (a test said so), or "broken": an import error, a crash, no such test, a hang."""
    seconds: float
    said: str
    """The failure, or what pytest printed."""


def warm_up() -> None:
    """Import what tests and package import, but neither of them."""
    for name in ("accelerate.tracking", "peft", "tqdm.auto", "transformers"):
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM  # noqa: F401, or they come later

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)]).step()  # imports PyTorch's compiler
    hypothesis.settings.register_profile(
        "mutants", database=None, derandomize=True, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
    )
    hypothesis.settings.load_profile("mutants")
    gc.freeze()  # pytest collects garbage twice: not among all of this


def put_in(mutant: Mutant) -> None:
    """Whoever imports the mutant's module from now on gets the wrong version. No file is written."""

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, fullname):  # never from a cached .pyc, and none is left behind
            return compile(mutant.source(), self.path, "exec")

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == mutant.module:
                return importlib.util.spec_from_file_location(name, mutant.path, loader=Loader(name, str(mutant.path)))

    assert mutant.module not in sys.modules
    sys.meta_path.insert(0, Finder)


def _is_a_verdict(error: BaseException) -> bool:
    # and not a NameError, say: that mutant would test nothing. Of warnings only the trainer's own are errors here.
    if isinstance(error, BaseExceptionGroup):  # hypothesis found several
        return all(map(_is_a_verdict, error.exceptions))
    return isinstance(error, AssertionError | pytest.fail.Exception | UserWarning)


def _test(mutant: Mutant | None, tests: list[str], results) -> None:
    class Watcher:
        outcome, said = "", ""

        def pytest_exception_interact(self, call, report):
            fair = report.when == "call" and _is_a_verdict(call.excinfo.value)
            self.outcome = self.outcome or ("failed" if fair else "broken")
            self.said = self.said or f"{report.nodeid}: {call.excinfo.exconly()}"

    warm_up()  # in a forked process there is nothing left to do
    os.chdir(ROOT)
    if mutant:
        put_in(mutant)
    watcher, printed = Watcher(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(printed), redirect_stderr(printed):
        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--basetemp", f"{folder}/pytest"]
        options += ["--import-mode=importlib", "-Wdefault", "-Werror::UserWarning:grpo_lab.training.trainer"]
        status = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[watcher])
    passed = status == pytest.ExitCode.OK
    results.send(("passed" if passed else watcher.outcome or "broken", watcher.said or printed.getvalue()[-2000:]))


def examine(name: str, tests: list[str], mutant: Mutant | None = None) -> Verdict:
    """Run the tests, against a mutant or the package as it is, until one fails."""
    began = time.perf_counter()
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_test, args=(mutant, tests, sender))
    process.start()
    sender.close()
    try:
        outcome, said = receiver.recv() if receiver.poll(PATIENCE) else ("broken", f"still runs after {PATIENCE} s")
    except EOFError:
        outcome, said = "broken", "the process died"
    process.kill()
    process.join()
    return Verdict(name, outcome, time.perf_counter() - began, said)


def try_all(mutants: Iterable[Mutant]) -> Iterator[Verdict]:
    """First the package as it is, which must pass all their tests; then each mutant, which must fail its own."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if CONTEXT.get_start_method() == "fork":
        warm_up()
    mutants = list(mutants)
    with tempfile.TemporaryDirectory() as sys.pycache_prefix:  # compiled tests, from one process to the next
        sys.dont_write_bytecode = False
        yield examine("unchanged", sorted({mutant.caught_by for mutant in mutants}))
        for mutant in mutants:
            yield examine(mutant.name, [mutant.caught_by], mutant)
