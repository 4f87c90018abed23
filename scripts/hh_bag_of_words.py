"""What words alone tell of preferences: tf-idf differences and a logistic regression, by subset.

python scripts/hh_bag_of_words.py TRAIN.jsonl.gz VALIDATION.jsonl.gz
"""

from __future__ import annotations

import sys

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf.data.data_config import SourceConfig
from rlhf.data.loading import load_rows
from rlhf.eval.intervals import wilson


def main() -> None:
    train, held = (load_rows(SourceConfig(), [file], "train").rows for file in sys.argv[1:3])
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2).fit([text for r in train for text in (r.chosen, r.rejected)])
    difference = words.transform([r.chosen for r in train]) - words.transform([r.rejected for r in train])
    signs = np.where(np.arange(len(train)) % 2 == 0, 1, -1)
    model = LogisticRegression(C=1.0, max_iter=1000, fit_intercept=False).fit(
        difference.multiply(signs[:, None]).tocsr(), signs
    )
    right = (
        model.decision_function(words.transform([r.chosen for r in held]) - words.transform([r.rejected for r in held]))
        > 0
    )
    for subset in ["", *sorted({r.columns["subset"] for r in held})]:
        mine = [ok for ok, r in zip(right, held, strict=True) if subset in ("", r.columns["subset"])]
        rate = wilson(sum(mine), len(mine))
        print(f"{subset or 'all'}: {rate.estimate:.3f} [{rate.low:.3f}, {rate.high:.3f}] of {len(mine)}")


if __name__ == "__main__":
    main()
