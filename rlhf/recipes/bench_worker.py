"""One run of a comparison, in a process of its own: `python -m rlhf.recipes.bench_worker JOB.json`.

The job names the recipe, the config file, the overrides, and whether seconds are added up by phase as in every run, or
the flops of matrix products instead.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.flop_counter import flop_counter
from rlhf.infra.profiling import measured_by
from rlhf.recipes.bench_sides import TRAINERS
from rlhf.recipes.resume import config_class


@dataclass(frozen=True)
class Job:
    """What a worker is to run."""

    recipe: str
    config: str
    overrides: list[str]
    count_flops: bool

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def work(job: Job) -> None:
    """Do the run; its folder is the result."""
    config = load_config(config_class(job.recipe), job.config, job.overrides)
    if not job.count_flops:
        TRAINERS[job.recipe](config)
        return
    with flop_counter() as counter, measured_by(lambda: float(counter.get_total_flops())):
        TRAINERS[job.recipe](config)


def main() -> None:
    try:
        work(Job.read(Path(sys.argv[1])))
    except UserError as error:
        print(f"rlhf: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
