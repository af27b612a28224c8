"""Run `grpo-lab train` as `python -m grpo_lab.train_grpo` or `python grpo_lab/train_grpo.py`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # When this file is run by its path, Python puts its folder first in sys.path; imports need the folder above.
    here = Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0]).resolve() == here:
        sys.path[0] = str(here.parent)
    from grpo_lab.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
