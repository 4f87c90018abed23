"""What a run starts from, by checksum: a run that is taken up again must find the reference it was held near.

A run names its sources (an SFT run, a reward model, a base), and a name says nothing about content: the source may have
been trained again meanwhile. What they were is in `run.json` and is compared before a resumed run touches anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from rlhf.infra.durable import sha256_file
from rlhf.infra.errors import UserError
from rlhf.infra.run_folder import data_hashes, read_run_info
from rlhf.models.backbone import resolve_model
from rlhf.models.ensemble import member_folders
from rlhf.recipes.stages import ADAPTER_CONFIG, POLICY, PROCESS_MODEL, REWARD_MODEL, base_of, locate

# What a model consists of; a README beside it may change.
_MODEL_FILES = {".safetensors", ".bin", ".pt", ".json", ".model", ".jinja", ".txt"}
# What a run keeps for whoever names it in a role that begins so; any other role is a policy's.
_KEPT_BY_ROLE = {"reward_model": REWARD_MODEL, "process_model": PROCESS_MODEL}
_WHOLE_BYTES = 2**30
_SAMPLE_BYTES = 2**24


def fingerprints(lineage: Mapping[str, str], output_dir: Path) -> dict[str, str]:
    """A checksum of the files of each source, of the base model under an adapter too; by the source's role."""
    return {role: _of_model(locate(source, output_dir, _kept_for(role))) for role, source in lineage.items()}


def _kept_for(role: str) -> str:
    return next((kept for start, kept in _KEPT_BY_ROLE.items() if role.startswith(start)), POLICY)


def refuse_changed(folder: Path, found: Mapping[str, str], data_files: Iterable[Path]) -> None:
    """Raise `UserError` where the sources or the data of the run in `folder` are not what it started with."""
    info = read_run_info(folder)
    for role, fingerprint in info.get("fingerprints", {}).items():
        if found.get(role) != fingerprint:
            raise UserError(
                f"run '{folder}' cannot go on: the {role.replace('_', ' ')} '{info['lineage'][role]}' that it started "
                "from has changed since, and so would its reference; put the old one back, or start a new run"
            )
    hashes = data_hashes(data_files)
    for name, recorded in info.get("data", {}).items():
        if hashes.get(name, recorded) != recorded:
            raise UserError(
                f"run '{folder}' cannot go on: its data file '{name}' has changed since it started; put the old one "
                "back, or start a new run"
            )


def _of_model(source: str) -> str:
    folder = Path(resolve_model(source))
    if not folder.is_dir():
        return _of_hub(source)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _MODEL_FILES:
            digest.update(json.dumps([path.name, _of_file(path)]).encode())
    if (folder / ADAPTER_CONFIG).is_file():
        digest.update(_of_model(base_of(str(folder))).encode())
    for member in member_folders(folder):
        digest.update(_of_model(str(member)).encode())
    return digest.hexdigest()


def _of_hub(name: str) -> str:
    """The revision in the local cache: its name is the hash of its content."""
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else "unknown"


def _of_file(path: Path) -> str:
    """SHA-256; of a file beyond a gibibyte that of its size and three samples, which no new training leaves alone."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in (0, size // 2, size - _SAMPLE_BYTES):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
