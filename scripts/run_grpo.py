"""`rlhf grpo` as a script: `python scripts/run_grpo.py --config configs/grpo.yaml key=value ...`."""

from __future__ import annotations

import sys

from rlhf.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "grpo")
    main()
