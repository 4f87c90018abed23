"""The refusal detector against XSTest's human labels: python scripts/refusal_agreement.py FILE.csv.gz ..."""

import sys
from pathlib import Path

from rlhf.eval.intervals import Interval
from rlhf.eval.refusal_agreement import agreement, agreement_gap, cross_validated, read_xstest
from rlhf.rewards.refusal import detect_refusal

rows = [row for path in sys.argv[1:] for row in read_xstest(Path(path))]
judges = {
    "this detector, entries supported by other prompts": cross_validated(rows),
    "this detector as it is": [detect_refusal(row.answer).kind for row in rows],
} | {name: [row.others[name] for row in rows] for name in rows[0].others}


def text(found: Interval | None) -> str:
    return "-" if found is None else f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


names = ["agreement", "precision", "recall", "three_way", "recall_full", "recall_partial", "precision_partial"]
print(f"| {len(rows)} answers | " + " | ".join(names) + " |")
print("|---" * (len(names) + 1) + "|")
for judge, kinds in judges.items():
    print(f"| {judge} | " + " | ".join(text(vars(agreement(rows, kinds))[name]) for name in names) + " |")
mean = sum(agreement(rows, cross_validated(rows, seed=seed)).agreement.estimate for seed in range(20)) / 20
print(f"mean agreement over 20 ways to cut ten folds: {mean:.3f}")
gap = agreement_gap(rows, judges["this detector, entries supported by other prompts"], judges["strmatch_label"])
print(f"cross-validated agreement minus that of the string match: {text(gap)}")
