"""How an ensemble of reward models is set up and how it lies on disk; the ensemble itself is in `reward_model.py`.

reward_model/
    reward_config.json      its kind, the number of members, the rule and the weight of the variance
    member_0/ member_1/ ... a whole reward model each, which can be used by itself
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.models.scoring import CONFIG_FILE

ENSEMBLE = "reward ensemble"
EnsembleRuleName = Literal["mean", "worst", "penalised"]


class EnsembleConfig(Config):
    """How many reward models are trained side by side, and how their scores of an answer become one."""

    members: int = Field(
        1, ge=1, description="reward models on the one base; they differ in the head's start and the order of the data"
    )
    rule: EnsembleRuleName = Field(
        "mean", description="one score of many: their mean, the worst, or the mean less their variance"
    )
    penalty: float = Field(0.5, ge=0, description="weight of the variance of standardised scores under `penalised`")

    def idle_keys(self) -> dict[str, str]:
        """See `Config.idle_keys`."""
        if self.members == 1:
            return dict.fromkeys(["rule", "penalty"], "members is 1, so there is nothing to combine")
        return {} if self.rule == "penalised" else {"penalty": f"rule is {self.rule}"}


def write_ensemble(folder: Path, members: int, rule: EnsembleRuleName, penalty: float) -> None:
    """Say beside the members' folders what they make together."""
    description = {"kind": ENSEMBLE, "members": members, "rule": rule, "penalty": penalty}
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_ensemble(folder: Path) -> dict[str, Any] | None:
    """What `write_ensemble` wrote; None where the folder holds no ensemble."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    found: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return found if found.get("kind") == ENSEMBLE else None


def member_folders(folder: Path) -> list[Path]:
    """The members' folders in order; none where the folder holds no ensemble.

    Raises:
        UserError: one is not there.
    """
    description = read_ensemble(folder)
    places = [folder / member_name(k) for k in range(description["members"])] if description else []
    for place in places:
        if not (place / CONFIG_FILE).is_file():
            raise UserError(
                f"{folder} holds an ensemble of {len(places)} reward models, but {place.name} is missing; train it "
                "again, or name one of the others"
            )
    return places


def member_name(k: int) -> str:
    """Folder of the member number k, and the prefix of its parameters' names."""
    return f"member_{k}"


def member_adapters(adapter: str, members: int) -> list[str]:
    """Under which names the members' adapters stand on a backbone."""
    return [f"{adapter}_{k}" for k in range(members)]
