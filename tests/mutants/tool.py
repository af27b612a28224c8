"""What two mutation tools find in the algorithm and the verifiable rewards; `make mutants` writes SURVIVORS.md.

Every operator of cosmic-ray and of mutmut is applied at every place of the five modules. A mutant is killed if
the module's own test file fails (or takes longer than a minute); its doctests and the other tests do not count.
Two mutants of one syntax tree count once; types and type aliases, which nobody runs, are not mutated.
Each survivor needs its reason in explained.toml; without, or if more than 5 % survive, the command fails.
Linux only: each mutant runs in a fork of one process that has imported PyTorch.
"""

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
MODULES = ("algorithm/logprobs", "algorithm/advantages", "algorithm/kl", "algorithm/losses", "rewards/verifiable")
SECONDS, SHARE = 60, 0.05
KNOWN = ROOT / "build" / "mutants.json"  # a module is tried anew when it or its tests have changed


class WithoutTypes(ast.NodeTransformer):
    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node):
        return ast.AnnAssign(node.target, ast.Name("object"), node.value and self.visit(node.value), node.simple)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_Assign(self, node):
        alias = re.match("[A-Z][a-z]", ast.unparse(node.targets[0]))  # Scale = Literal[...]
        return None if alias else self.generic_visit(node)


def normal(code: str) -> str:
    """One line per statement: two sources that do the same for trivial reasons have the same normal form."""
    return ast.unparse(ast.fix_missing_locations(WithoutTypes().visit(ast.parse(code))))


def sources(code: str):
    """All mutated sources that the two tools make."""
    from cosmic_ray import mutating, plugins
    from mutmut.mutation.file_mutation import create_mutations

    def mutate(operator, occurrence: int) -> str | None:
        try:
            return mutating.mutate_code(code, operator(), occurrence)
        except AttributeError:  # cosmic-ray 8.7 cannot replace an exception whose name has a dot
            return code

    operators = [plugins.get_operator(name) for name in plugins.operator_names()]
    for operator in (o for o in operators if not o.arguments()):
        yield from itertools.takewhile(lambda source: source, (mutate(operator, i) for i in itertools.count()))
    module, mutations, *_ = create_mutations("", code)
    for mutation in mutations:
        yield module.deep_replace(mutation.original_node, mutation.mutated_node).code


def describe(code: str, mutated: str) -> tuple[int, str]:
    """In which line, and what was changed in which function, with some text around it."""

    def shared(a, b) -> int:
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

    line = 1 + shared(code.split("\n"), mutated.split("\n"))
    old, new = (re.findall(r"\w+|[=<>!*/&|^~]+|.", normal(source), re.DOTALL) for source in (code, mutated))
    start = shared(old, new)
    end = shared(old[start:][::-1], new[start:][::-1])
    parts = old[:start], old[start : len(old) - end], new[start : len(new) - end], old[len(old) - end :]
    before, was, is_now, after = map("".join, parts)
    change = f"{before.split(chr(10))[-1][-30:].lstrip()}[{was} → {is_now}]{after.split(chr(10))[0][:30]}"
    holders = [f"{n.name}: " for n in ast.parse(code).body if hasattr(n, "name") and n.lineno <= line <= n.end_lineno]
    return line, "".join([*holders, change]).replace("\n", " ")


def test_of(module: str) -> str:
    """The test file of a module, below tests/."""
    room, name = module.split("/")
    return f"{room}/test_{name}.py"


def run_tests(module: str) -> None:
    """In a fork of a process that has imported torch: seconds less for every mutant."""
    import hypothesis
    import pytest
    import torch

    torch.manual_seed(0)
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=["explicit", "generate"])
    hypothesis.settings.load_profile("mutants")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they cost time, and the five files need none
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os._exit(pytest.main(["-xq", "--noconftest", "-p", "no:cacheprovider", f"tests/{test_of(module)}"]))


def survives(module: str) -> bool:
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(module,))
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    return process.exitcode == 0


def survivors(path: Path) -> tuple[int, dict[str, int], float]:
    """How many mutants there are, the line of each survivor, named by its function and its change, and seconds."""
    began = time.monotonic()
    code, found = path.read_text(encoding="utf-8"), {}
    module = path.relative_to("grpo_lab").with_suffix("").as_posix()
    if not survives(module):
        raise SystemExit(f"tests/{test_of(module)} fails even without a mutant")
    tried = {normal(code)}
    for mutated in sources(code):
        with contextlib.suppress(SyntaxError):
            if normal(mutated) in tried:
                continue
            tried.add(normal(mutated))
            path.write_text(mutated, encoding="utf-8")
            os.utime(path, (len(tried), len(tried)))  # another time each: an old .pyc must not stand in for it
            if survives(module):
                line, change = describe(code, mutated)
                while change in found:
                    change += " again"
                found[change] = line
                print(f"{path}:{line} {change}", flush=True)
    path.write_text(code, encoding="utf-8")
    return len(tried) - 1, found, time.monotonic() - began


def main() -> int:
    import hypothesis.strategies  # noqa: F401  what is imported here, the forks require_package not import
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # its imports take seconds: once, before the forks
    gc.freeze()
    rows, totals, bad, seconds = [], [], 0, 0.0
    known = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {}
    tools = [f"{name} {importlib.metadata.version(name)}" for name in ("cosmic-ray", "mutmut")]
    explained = tomllib.loads((HERE / "explained.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "grpo_lab")  # mutmut wants the folder of the project to have the name of the package
        ignored = shutil.ignore_patterns("__pycache__", "model")
        for part in ("grpo_lab", "tests"):
            shutil.copytree(ROOT / part, work / part, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", work)
        os.chdir(work)
        sys.path.insert(0, str(work))
        for module in MODULES:
            files = Path("grpo_lab", f"{module}.py"), Path("tests", test_of(module))
            key = hashlib.sha256(b"".join(file.read_bytes() for file in files) + str(tools).encode()).hexdigest()
            if known.get(module, [None])[0] != key:
                known[module] = [key, *survivors(files[0])]
                KNOWN.parent.mkdir(exist_ok=True)
                KNOWN.write_text(json.dumps(known), encoding="utf-8")
            _, number, found, took = known[module]
            seconds += took
            reasons = explained.get(Path(module).name, {})
            for change in sorted(reasons.keys() ^ found.keys()):
                bad += 1
                print("this one has no reason:" if change in found else "this one survives no longer:", module, change)
            totals.append((module, number, len(found)))
            rows += [(f"{module}.py:{line}", f"`{c}`", reasons.get(c, "**?**")) for c, line in found.items()]
        os.chdir(ROOT)
    totals.append(("all", *(sum(column) for column in list(zip(*totals, strict=True))[1:])))
    lines = [
        "# Mutants that survive their module's tests",
        "",
        f"Made by {' and '.join(tools)} on {time.strftime('%Y-%m-%d')}, in {seconds / 60:.0f} minutes of one core.",
        "Written by `make mutants`; the reasons stand in `explained.toml`, and what counts as a mutant in `tool.py`.",
        "",
        "| module | mutants | killed | survived | survived, % |\n|---|--:|--:|--:|--:|",
        *(f"| {name} | {n} | {n - left} | {left} | {100 * left / n:.1f} |" for name, n, left in totals),
        "",
        "| line | change: [what it was → what it becomes] | why no test can tell, or need tell |\n|---|---|---|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
    (HERE / "SURVIVORS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines[5 : -len(rows) - 2], sep="\n")
    return int(bad > 0 or totals[-1][2] > SHARE * totals[-1][1])


if __name__ == "__main__":
    sys.exit(main())
