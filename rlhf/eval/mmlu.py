"""MMLU and questions of its form: four choices, a few worked examples before, the likeliest letter counts.

The prompt is word for word that of the original (arXiv:2009.03300, its `evaluate.py`): a line that names the subject,
examples with their answers, the question, "Answer:". What is compared is how likely each letter is as the next text.
"""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.eval.suite_items import Item
from rlhf.infra.errors import UserError

NUM_SHOTS = 5
LETTERS = "ABCD"
_CHOICES = tuple(f" {letter}" for letter in LETTERS)
_SPLITS = ("test", "val")
Question = Sequence[str]  # question, four choices, letter of the right one


def read_mmlu(source: str) -> list[Item]:
    """Questions of the test files (of val where there are none), with five examples of the same subject from dev.

    `source` is a folder or tar archive with dev/ and test/ or val/, files named <subject>_<split>.csv without a heading
    line, or a hub name such as cais/mmlu. Raises UserError for anything else.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = {f"{file.parent.name}/{file.name}": file.read_text(encoding="utf-8") for file in path.rglob("*.csv")}
    elif path.is_file():
        files = _from_archive(path)
    elif source.count("/") == 1 and not source.startswith(("/", ".", "~")):
        return _from_hub(source)
    else:
        raise UserError(f"'{source}' is no folder, archive or hub name of MMLU")
    tables = {split: _subjects(files, split) for split in ("dev", *_SPLITS)}
    asked = next((tables[split] for split in _SPLITS if tables[split]), None)
    if asked is None or not tables["dev"]:
        raise UserError(f"'{source}' has no dev/*_dev.csv with test/*_test.csv or val/*_val.csv")
    return [
        question_item(f"{subject}-{number}", subject, question, tables["dev"].get(subject, ()))
        for subject, questions in sorted(asked.items())
        for number, question in enumerate(questions)
    ]


def question_item(name: str, subject: str, question: Question, examples: Sequence[Question]) -> Item:
    """One question with its examples as an item for ranking the four letters."""
    shown = subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {shown}.\n\n"
    return Item(
        name,
        prompt=f"{_block(question)}",
        group=subject,
        choices=_CHOICES,
        shots=tuple(f"{_block(example)} {example[5]}\n\n" for example in examples[:NUM_SHOTS]),
        spec={"answer": LETTERS.index(question[5]), "header": header},
    )


def _block(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question[1:5], strict=True))
    return f"{question[0]}{choices}\nAnswer:"


def _subjects(files: Mapping[str, str], split: str) -> dict[str, list[Question]]:
    found = {}
    for name, text in files.items():
        if name.endswith(f"{split}/{name.rsplit('/', 1)[-1]}") and name.endswith(f"_{split}.csv"):
            rows = [row for row in csv.reader(io.StringIO(text)) if row]
            bad = next((row for row in rows if len(row) != 6 or row[5] not in LETTERS), None)
            if bad is not None:
                raise UserError(f"'{name}' holds {bad}; expected question, four choices and the letter of one")
            found[name.rsplit("/", 1)[-1].removesuffix(f"_{split}.csv")] = rows
    return found


def _from_archive(path: Path) -> dict[str, str]:
    try:
        with tarfile.open(path) as archive:
            return {
                member.name: stream.read().decode("utf-8")
                for member in archive.getmembers()
                if member.name.endswith(".csv") and (stream := archive.extractfile(member)) is not None
            }
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"'{path}' is no tar archive that can be read: {error}") from None


def _from_hub(name: str) -> list[Item]:
    import datasets

    try:
        dev, test = (datasets.load_dataset(name, "all", split=split) for split in ("dev", "test"))
    except Exception as error:  # the library raises a dozen kinds, for want of a network as for a wrong name
        raise UserError(f"the data set '{name}' cannot be had from the hub: {str(error).splitlines()[0]}") from None

    def question(row: Mapping[str, object]) -> Question:
        return [str(row["question"]), *map(str, list(row["choices"])), LETTERS[int(str(row["answer"]))]]  # type: ignore[call-overload]

    examples: dict[str, list[Question]] = {}
    for row in dev:
        examples.setdefault(str(row["subject"]), []).append(question(row))
    return [
        question_item(f"{row['subject']}-{number}", str(row["subject"]), question(row), examples[str(row["subject"])])
        for number, row in enumerate(test)
    ]
