"""Wrong versions of the package, each one line away from the right one. The tests must reject every one.

`catalogue.toml` names the mistakes; `python -m tests.mutants` tries them all and writes REPORT.md.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REPORT = HERE / "REPORT.md"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    """Below grpo_lab/."""
    right: str
    """Stands in the file once."""
    wrong: str
    """What the mistake makes of it, in one line."""
    caught_by: str
    """The test that must fail, below tests/."""
    pitfall: int | None = None
    """The number of the mistake among PITFALLS, if it is one of these."""

    @property
    def path(self) -> Path:
        return ROOT / "grpo_lab" / self.file

    @property
    def module(self) -> str:
        return f"grpo_lab.{self.file.removesuffix('.py').replace('/', '.')}"

    def source(self) -> str:
        """The whole file, with the mistake in it."""
        return self.path.read_text(encoding="utf-8").replace(self.right, self.wrong)


_catalogue = tomllib.loads((HERE / "catalogue.toml").read_text(encoding="utf-8"))
PITFALLS: dict[int, str] = {int(number): mistake for number, mistake in _catalogue["pitfalls"].items()}
MUTANTS: list[Mutant] = [Mutant(name, **entry) for name, entry in _catalogue["mutants"].items()]


def report() -> str:
    """REPORT.md: which test catches what."""
    tests = {mutant.caught_by.split("[")[0] for mutant in MUTANTS}
    lines = [
        "# Mistakes that the tests catch",
        "",
        f"Each of these {len(MUTANTS)} wrong versions differs from the package in one line, and makes the test that",
        f"stands beside it fail; these are {len(tests)} tests. Written by `python -m tests.mutants`, which tries them.",
        "",
        "## Mistakes that GRPO code makes",
        "",
        "| # | mistake | as a mutant |",
        "|--:|---|---|",
    ]
    for number, mistake in PITFALLS.items():
        names = ", ".join(f"`{mutant.name}`" for mutant in MUTANTS if mutant.pitfall == number)
        lines.append(f"| {number} | {mistake} | {names} |")
    lines += ["", "## All mutants", "", "| mutant | # | in | caught by |", "|---|--:|---|---|"]
    for mutant in MUTANTS:
        test = mutant.caught_by.split("[")[0].replace("::", " ")
        lines.append(f"| `{mutant.name}` | {mutant.pitfall or ''} | {mutant.file} | {test} |")
    return "\n".join(lines) + "\n"
