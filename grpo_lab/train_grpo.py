"""`python grpo_lab/train_grpo.py …` and `python -m grpo_lab.train_grpo …` are `grpo-lab train …`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks for imports in this folder, where it would find our modules by bare names.
    here = Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0]).resolve() == here:
        sys.path[0] = str(here.parent)
    from grpo_lab.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
