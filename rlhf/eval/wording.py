"""Sentences that the page and the Markdown report share."""

from __future__ import annotations

from rlhf.eval.report_data import Report

NOTHING_FAILED = "Nothing that was looked at failed."
NO_CAUTION = "None of the questions that could be asked of these numbers gave a further reason for caution."
HOW_HACKING_IS_JUDGED = (
    "A sign is caught when the change is beyond its threshold and its 95 % interval leaves no change out. What changed "
    "is not always wrong: a sign says where to read the answers."
)
_JUDGES = {"gold": "the gold scorer", "reward": "the reward model"}


def subtitle_of(report: Report) -> str:
    """Say in a sentence or two what was compared with what, on how much, and by whom it was judged."""
    names = list(report.models)
    models = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    num = max(metrics.num_prompts for metrics in report.main_view.metrics.values())
    sentence = f"{models} on {num} prompts ({report.main_view.title.lower()})."
    if report.reference is not None:
        sentence += f" Compared with {report.reference}."
    if report.judge == "reward":
        sentence += " There is no gold scorer for these prompts, so the reward model is the judge."
    elif report.judge == "gold":
        sentence += " Judged by the gold scorer."
    return sentence


def outcome_words(report: Report, model: str | None, outcome: str) -> str:
    """Name how a model fared in an example in terms of the two models compared."""
    first, second = model, report.reference
    return {
        "win": f"{first} better than {second}",
        "tie": f"{first} and {second} alike",
        "loss": f"{second} better than {first}",
    }.get(outcome, "not judged")


def how_measured(report: Report) -> list[str]:
    """Explain the numbers: the judge, the unit, the intervals, and each metric that needs a definition."""
    sentences = []
    if report.judge is not None:
        sentences.append(
            f"Win-rates compare two models' answers to the same prompt by {_JUDGES[report.judge]}; a tie counts one "
            "half. Their intervals, like those of means, are percentile bootstraps over prompts with "
            f"seed {report.seed}. Rates have Wilson intervals. At equal length means the win-rate that a logistic "
            "model of preference and difference in characters leaves when the difference is taken out "
            "(arXiv:2404.04475)."
        )
    if report.judge == "reward":
        sentences.append(
            "The judge here is the reward model that the policy may have been trained against. Its score says what was "
            "optimised, not what is good."
        )
    sentences.append(
        f"KL is the sum over an answer's tokens of log p(model) - log p({report.reference or 'reference'}), averaged "
        "over answers; entropy is the mean per token. Distinct word pairs are different pairs over all pairs in all "
        "answers. Repetition is the share of four-word sequences that occurred before in the same answer. Finished "
        "means that the answer ended with the stop token; the gold-reward correlation is Spearman's, over answers."
    )
    return sentences
