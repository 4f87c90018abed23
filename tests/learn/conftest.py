"""A base model of some twenty thousand weights and toy data, shared by the tests that something is learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_backbones import tiny_model, word_tokenizer
from toy_runs import WriteRows


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of two layers with a tokenizer of whole words, as a user's model folder."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), word_tokenizer()
    tiny_model("llama", len(tokenizer), spread=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows to a JSONL file and return its path."""

    def write(rows: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / f"rows_{len(list(tmp_path.glob('rows_*')))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
