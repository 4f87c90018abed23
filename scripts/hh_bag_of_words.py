"""What words alone tell of preferences: tf-idf differences and a logistic regression, on each subset and on both.

python scripts/hh_bag_of_words.py TRAIN.jsonl.gz VALIDATION.jsonl.gz
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf.data.data_config import SourceConfig
from rlhf.data.loading import load_rows
from rlhf.data.rows import PreferenceRow
from rlhf.eval.intervals import wilson


def ordered_rightly(train: Sequence[PreferenceRow], held: Sequence[PreferenceRow]) -> np.ndarray:
    """Whether each held-out pair is put in the right order by a model of the training pairs."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    words.fit([text for row in train for text in (row.chosen, row.rejected)])
    difference = words.transform([row.chosen for row in train]) - words.transform([row.rejected for row in train])
    signs = np.where(np.arange(len(train)) % 2 == 0, 1, -1)
    model = LogisticRegression(max_iter=1000, fit_intercept=False)
    model.fit(difference.multiply(signs[:, None]).tocsr(), signs)
    return (
        model.decision_function(words.transform([r.chosen for r in held]) - words.transform([r.rejected for r in held]))
        > 0
    )


def main() -> None:
    train, held = (load_rows(SourceConfig(), [file], "train").rows for file in sys.argv[1:3])
    together = ordered_rightly(train, held)
    for subset in sorted({row.columns["subset"] for row in held}):
        mine = [row for row in held if row.columns["subset"] == subset]
        alone = ordered_rightly([row for row in train if row.columns["subset"] == subset], mine)
        both = [right for right, row in zip(together, held, strict=True) if row.columns["subset"] == subset]
        for what, right in (("trained on this subset", alone), ("trained on both", both)):
            rate = wilson(sum(right), len(right))
            print(f"{subset}, {what}: {rate.estimate:.3f} [{rate.low:.3f}, {rate.high:.3f}] of {len(right)}")


if __name__ == "__main__":
    main()
