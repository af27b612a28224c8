"""python -m tests.mutants [NAME ...] [--json]: which test catches which mutant?"""

import json
import sys
from dataclasses import asdict

from . import MUTANTS, REPORT, report
from .runner import try_all


def main(arguments: list[str]) -> int:
    as_json, names = "--json" in arguments, {a for a in arguments if a != "--json"}
    chosen = {mutant.name: mutant for mutant in MUTANTS if not names or mutant.name in names}
    missed = 0
    for verdict in try_all(chosen.values()):
        mutant = chosen.get(verdict.name)
        wrong = verdict.outcome != ("failed" if mutant else "passed")
        missed += wrong
        if as_json:
            print(json.dumps(asdict(verdict)), flush=True)
        else:
            tests = mutant.caught_by if mutant else "all tests below"
            said = f"\n{verdict.said}" if wrong else ""
            number = mutant.pitfall or "" if mutant else ""
            print(f"{verdict.outcome:7}{verdict.seconds:6.1f} s {number:>3}  {verdict.name}: {tests}{said}", flush=True)
    if not (as_json or names or missed):
        REPORT.write_text(report(), encoding="utf-8")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
