"""How often a micro-batch makes Python wait for the device: a small fixed number, whatever it holds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from sync_counter import counted_syncs
from tiny_backbones import Family, tiny_backbone

from rlhf.models.backbone import Backbone
from rlhf.models.lora import LoRAConfig
from rlhf.models.policy import Policy, masked_logprobs

# Where answers stand decides shapes, and is asked for in the mask of attention, the width, the last MLP and the head.
AT_MOST = 5


def waits(backbone: Backbone, num_rows: int, num_answer: int, *, online: bool) -> Counter[str]:
    """Of forward and backward over one micro-batch, as PPO and GRPO or the offline recipes ask for it."""
    ids_BT = torch.randint(3, 20, (num_rows, num_answer + 4), generator=torch.Generator().manual_seed(0))
    mask_BT, action_BT = torch.ones_like(ids_BT, dtype=torch.bool), torch.zeros_like(ids_BT, dtype=torch.bool)
    action_BT[:, 4:] = True
    with counted_syncs() as found:
        if online:
            statistics = Policy(backbone, "policy").response_statistics(ids_BT, mask_BT, action_BT[:, 4:], 1.0)
            statistics.logprobs_BR.sum().backward()
        else:
            masked_logprobs(backbone, "policy", ids_BT, mask_BT, action_BT).sum().backward()
    return found


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_micro_batch_waits_a_few_times_whatever_it_holds(family: Family, online: bool) -> None:
    backbone = tiny_backbone(family)
    backbone.add_adapter("policy", LoRAConfig(r=2))
    backbone.train_only(["policy"])
    waits(backbone, 2, 3, online=online)  # what is set up once does not count
    small, large = (waits(backbone, rows, answer, online=online) for rows, answer in ((2, 3), (9, 17)))
    assert small == large and small.total() <= AT_MOST
