"""Best of n: what picking the best of several answers by a score is worth, and how far it leaves the policy.

Legend: K prompts, N answers to each, of which the best of n <= N is asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    """KL(best of n, policy) = log n - (n - 1) / n, in nats; at most that with equal scores (arXiv:2009.01325 G.3)."""
    if n < 1:
        raise ValueError(f"got n = {n}; expected at least one answer")
    return math.log(n) - (n - 1) / n


def kl_by_ties(scores_KN: Tensor, n: int) -> Tensor:
    """What equal scores take off the KL of the best of n (K,), in nats, where the N answers are all that is ever drawn.

    Of levels with shares p and of the answers up to each F, the best of n lies on a level with q = F^n - (F - p)^n, so
    its KL is the sum of q log(q / p), since within a level each answer is as likely as before. This is that sum for N
    different scores less that for the scores as they are: 0 without ties, all of the KL where all are equal.
    """
    num = scores_KN.shape[1]
    below_KN = (scores_KN.unsqueeze(2) > scores_KN.unsqueeze(1)).double().mean(dim=2)
    share_KN = (scores_KN.unsqueeze(2) == scores_KN.unsqueeze(1)).double().mean(dim=2)
    chosen_KN = (below_KN + share_KN) ** n - below_KN**n
    # Each of a level's answers carries its part of the level's term.
    tied_K = (chosen_KN / (share_KN * num) * (chosen_KN / share_KN).log()).sum(dim=1)
    edges = torch.arange(num + 1, dtype=torch.float64, device=scores_KN.device) / num
    apart = edges[1:] ** n - edges[:-1] ** n
    return (apart * (apart * num).log()).sum() - tied_K


def expected_best(scores_KN: Tensor, worths_KN: Tensor, n: int) -> Tensor:
    """Mean worth (K,) of the answer with the highest score among n, over all ways of drawing n of the N.

    Without bias, and less noisy than looking at the first n: with worths sorted by score, sum over i of
    C(i - 1, n - 1) / C(N, n) w_(i) (arXiv:2112.09332 appendix I). Answers with equal scores are drawn as by a coin, so
    each of them counts with the mean worth of all that share its score.
    """
    num = scores_KN.shape[1]
    if not 1 <= n <= num:
        raise ValueError(f"got n = {n}; expected 1 to {num}, the number of answers there are")
    shares = [math.comb(place, n - 1) / math.comb(num, n) for place in range(num)]
    order_KN = scores_KN.argsort(dim=1, stable=True)
    same_KNN = (scores_KN.unsqueeze(2) == scores_KN.unsqueeze(1)).double()
    tied_KN = (same_KNN @ worths_KN.double().unsqueeze(2)).squeeze(2) / same_KNN.sum(dim=2)
    sorted_KN = tied_KN.gather(1, order_KN)
    return sorted_KN @ torch.tensor(shares, dtype=torch.float64, device=sorted_KN.device)
