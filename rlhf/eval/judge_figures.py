"""What a judge's verdicts amount to: a win-rate, and how far the judge can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlhf.eval.agreement import cohen_kappa, fleiss_kappa
from rlhf.eval.intervals import Interval, mean_interval, newcombe_difference, wilson
from rlhf.eval.judge import RULES, Judgement, Pair
from rlhf.eval.significance import PairedDifference, mcnemar, paired_bootstrap
from rlhf.eval.winrate import Comparison, WinRate, win_rate
from rlhf.infra.errors import UserError

# What a verdict is where the answers stand the other way around.
TURNED = {"first": "second", "tie": "tie", "second": "first"}


@dataclass(frozen=True)
class Judged:
    """What one judge said of a list of pairs, in the same order."""

    judge: str
    pairs: Sequence[Pair]
    judgements: Sequence[Judgement]
    sees_order: bool = True

    def preferences(self, rule: str = "averaged") -> list[float | None]:
        """One preference for the first answer per pair, None without a verdict; `rule` is a name of `judge.RULES`."""
        if rule not in RULES:
            raise UserError(f"no rule '{rule}' to join both orders; expected one of {', '.join(RULES)}")
        return [RULES[rule](judgement) for judgement in self.judgements]

    def only(self, group: str) -> Judged:
        """The part that is about the pairs of one set."""
        kept = [(pair, one) for pair, one in zip(self.pairs, self.judgements, strict=True) if pair.group == group]
        return Judged(self.judge, [pair for pair, _ in kept], [one for _, one in kept], self.sees_order)


@dataclass(frozen=True)
class JudgeLine:
    """One judge on one comparison: the win-rate (None without a verdict) and how the judge came to it."""

    first: str
    second: str
    judge: str
    win: WinRate | None
    behaviour: Behaviour


@dataclass(frozen=True)
class JudgedModels:
    """Two models by name, and what every judge said of the same pairs of their answers."""

    first: str
    second: str
    judged: Sequence[Judged]


@dataclass(frozen=True)
class JudgePair:
    """How far two judges agree beyond chance, over the pairs on which both have a verdict."""

    first: str
    second: str
    kappa: Interval


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of every two judges, and Fleiss' kappa of all over the pairs on which all have a verdict."""

    pairs: tuple[JudgePair, ...]
    all: Interval | None


@dataclass(frozen=True)
class Duel:
    """Two judges against the same labels: difference of their agreement (first minus second), and two p-values.

    McNemar's test counts pairs that one judge has right in both orders and the other has not.
    """

    first: str
    second: str
    difference: PairedDifference
    mcnemar: float


@dataclass(frozen=True)
class Behaviour:
    """How a judge judges, whatever is true; None where it cannot be measured.

    `consistency` is the share of pairs with the same verdict in both orders and `front` the mean preference for the
    answer in front (0.5: places do not matter), both over pairs that were asked in both orders. `front_always` and
    `back_always` are the shares of pairs in which the place won twice. `longer` is the preference for the longer of two
    answers that differ in length (0.5: length does not matter, or does so in both directions).
    """

    num_pairs: int
    num_unparsable: int
    num_identical: int
    consistency: Interval | None
    front: Interval | None
    front_always: Interval | None
    back_always: Interval | None
    longer: Interval | None


@dataclass(frozen=True)
class Accuracy:
    """Agreement with people's labels; a half preference counts one half.

    `both_orders` is the share of pairs that are right in either order. `longer_right` is the agreement where the answer
    labelled better is the longer one, `shorter_right` where it is the shorter one, and `length_gap` their difference:
    what a judge gains by liking length. `longer_labelled` is how often people preferred the longer answer. `kappa`
    treats a verdict as first, tie or second, each pair counted both ways around. The bounds say how far pairs without a
    verdict could move the agreement.
    """

    num_labelled: int
    num_unparsable: int
    agreement: Interval | None
    both_orders: Interval | None
    kappa: Interval | None
    longer_right: Interval | None
    shorter_right: Interval | None
    length_gap: Interval | None
    longer_labelled: Interval | None
    bounds: tuple[float, float]


def win_rate_of(judged: Judged, names: tuple[str, str], rule: str = "averaged", seed: int = 0) -> WinRate | None:
    """The first model's win-rate against the second; None where no pair has a verdict."""
    comparisons = [
        Comparison(pair.prompt_id, preference, len(pair.first), len(pair.second))
        for pair, preference in zip(judged.pairs, judged.preferences(rule), strict=True)
        if preference is not None
    ]
    if not comparisons:
        return None
    unjudged = {pair.prompt_id for pair in judged.pairs} - {one.prompt_id for one in comparisons}
    return win_rate(comparisons, names, judged.judge, num_unpaired=len(unjudged), seed=seed)


def line_of(judged: Judged, names: tuple[str, str], rule: str = "averaged", seed: int = 0) -> JudgeLine:
    """All figures of one judge on one comparison."""
    return JudgeLine(*names, judged.judge, win_rate_of(judged, names, rule, seed), behaviour_of(judged, seed))


def lines_of(comparisons: Sequence[JudgedModels], rule: str = "averaged", seed: int = 0) -> list[JudgeLine]:
    """All figures of every judge on every comparison."""
    return [line_of(one, (models.first, models.second), rule, seed) for models in comparisons for one in models.judged]


def agreement_over(comparisons: Sequence[JudgedModels], rule: str = "averaged", seed: int = 0) -> Agreement | None:
    """How far the judges agree over the pairs of all comparisons, at which the same judges were asked."""
    joined: dict[str, Judged] = {}
    for one in (one for models in comparisons for one in models.judged):
        before = joined.get(one.judge, Judged(one.judge, [], [], one.sees_order))
        pairs, judgements = [*before.pairs, *one.pairs], [*before.judgements, *one.judgements]
        joined[one.judge] = Judged(one.judge, pairs, judgements, one.sees_order)
    return agreement_of(list(joined.values()), rule, seed)


def agreement_of(
    judged: Sequence[Judged], rule: str = "averaged", seed: int = 0, either_way: bool = False
) -> Agreement | None:
    """How far judges of the same pairs agree; None for fewer than two judges.

    `either_way` True: which answer stands first says nothing, as in labelled pairs; False: each side is one model's.
    """
    turned = TURNED if either_way else None
    if len(judged) < 2:
        return None
    said = [[None if p is None else outcome(p) for p in one.preferences(rule)] for one in judged]
    pairs = []
    for (one, first), (two, second) in combinations(zip(judged, said, strict=True), 2):
        both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        if both:
            kappa = cohen_kappa([a for a, _ in both], [b for _, b in both], seed, turned)
            pairs.append(JudgePair(one.judge, two.judge, kappa))
    whole = [of_pair for of_pair in zip(*said, strict=True) if None not in of_pair]
    return Agreement(tuple(pairs), fleiss_kappa(whole, seed, turned) if whole else None)


def duel_of(one: Judged, two: Judged, rule: str = "averaged", seed: int = 0) -> Duel | None:
    """Compare two judges of the same labelled pairs; None where there is no pair on which both have a verdict."""
    rows = [
        (pair.label, first, second, a, b)
        for pair, first, second, a, b in zip(
            one.pairs, one.preferences(rule), two.preferences(rule), one.judgements, two.judgements, strict=True
        )
        if pair.label not in (None, 0.5) and first is not None and second is not None
    ]
    if not rows:
        return None
    labels = [float(label > 0.5) for label, *_ in rows if label is not None]
    firsts = [1 - abs(label - first) for label, (_, first, *_) in zip(labels, rows, strict=True)]
    seconds = [1 - abs(label - second) for label, (_, _, second, *_) in zip(labels, rows, strict=True)]
    right = [
        (a.in_front == a.behind == label, b.in_front == b.behind == label)
        for label, (*_, a, b) in zip(labels, rows, strict=True)
    ]
    p_value = mcnemar([a for a, _ in right], [b for _, b in right])
    return Duel(one.judge, two.judge, paired_bootstrap(firsts, seconds, seed), p_value)


def behaviour_of(judged: Judged, seed: int = 0) -> Behaviour:
    """How the judge treats places and lengths."""
    whole = [(pair, one) for pair, one in zip(judged.pairs, judged.judgements, strict=True) if one.is_whole]
    asked = [(one.in_front, one.behind) for _, one in whole if one.is_asked] if judged.sees_order else []
    orders = [(front, back) for front, back in asked if front is not None and back is not None]
    different = [(pair, one) for pair, one in whole if len(pair.first) != len(pair.second)]
    longer = [_for_longer(pair, _mean_of(one)) for pair, one in different]
    return Behaviour(
        num_pairs=len(judged.pairs),
        num_unparsable=len(judged.pairs) - len(whole),
        num_identical=sum(not one.is_asked for one in judged.judgements),
        consistency=_share([front == back for front, back in orders]),
        front=mean_interval([(front + 1 - back) / 2 for front, back in orders], seed) if orders else None,
        front_always=_share([front > 0.5 > back for front, back in orders]),
        back_always=_share([front < 0.5 < back for front, back in orders]),
        longer=mean_interval(longer, seed) if longer else None,
    )


def accuracy_of(judged: Judged, rule: str = "averaged", seed: int = 0) -> Accuracy:
    """Agreement with the labels of the pairs; pairs that people called alike do not count.

    Raises UserError when no pair has a label.
    """
    rows = [
        (pair, pair.label, preference, one)
        for pair, preference, one in zip(judged.pairs, judged.preferences(rule), judged.judgements, strict=True)
        if pair.label is not None and pair.label != 0.5
    ]
    if not rows:
        raise UserError("no pair has a label that prefers one answer, so there is nothing to agree with")
    known = [(pair, label, preference, one) for pair, label, preference, one in rows if preference is not None]
    credit = [preference if label > 0.5 else 1 - preference for _, label, preference, _ in known]
    longer = [_for_longer(pair, float(label > 0.5)) for pair, label, _, _ in known]
    when_longer = _rate([c for c, (pair, *_), lab in zip(credit, known, longer, strict=True) if _differ(pair) and lab])
    when_shorter = _rate(
        [c for c, (pair, *_), lab in zip(credit, known, longer, strict=True) if _differ(pair) and not lab]
    )
    has_both = when_longer is not None and when_shorter is not None
    missing = len(rows) - len(known)
    return Accuracy(
        num_labelled=len(rows),
        num_unparsable=missing,
        agreement=_rate(credit),
        both_orders=_share(
            [one.in_front == one.behind == float(label > 0.5) for _, label, _, one in known if one.is_whole]
        ),
        kappa=_kappa(known, seed),
        longer_right=when_longer,
        shorter_right=when_shorter,
        length_gap=newcombe_difference(when_longer, when_shorter) if has_both else None,
        longer_labelled=_rate([_for_longer(pair, float(label > 0.5)) for pair, label, *_ in rows if _differ(pair)]),
        bounds=(sum(credit) / len(rows), (sum(credit) + missing) / len(rows)),
    )


def outcome(preference: float) -> str:
    """A preference as one of three verdicts."""
    return "tie" if preference == 0.5 else "first" if preference > 0.5 else "second"


def _kappa(known: Sequence[tuple[Pair, float, float, Judgement]], seed: int) -> Interval | None:
    if not known:
        return None
    said = [outcome(preference) for _, _, preference, _ in known]
    return cohen_kappa(said, [outcome(label) for _, label, _, _ in known], seed, TURNED)


def _for_longer(pair: Pair, preference: float) -> float:
    return preference if len(pair.first) > len(pair.second) else 1 - preference


def _differ(pair: Pair) -> bool:
    return len(pair.first) != len(pair.second)


def _mean_of(judgement: Judgement) -> float:
    mean = RULES["averaged"](judgement)
    assert mean is not None, "only whole judgements are averaged here"
    return mean


def _rate(credit: Sequence[float]) -> Interval | None:
    return wilson(float(np.sum(credit)), len(credit)) if credit else None


def _share(flags: Sequence[bool]) -> Interval | None:
    return wilson(sum(flags), len(flags)) if flags else None
