"""What a text encoder made of a prompt, on disk: asked again, nothing of the encoder is read.

Worth it for encoders of billions of parameters. A file is named by a hash of the encoder's and the
tokenizer's files, the dtype, the number of tokens read and the text, so that none of them can be mixed up. It
holds numbers only, not the text.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from weights import store

log = logging.getLogger(__name__)

MOST_BYTES = 512 * 2**20  # the longest unused are removed beyond that


def folder() -> Path:
    return store.home() / "embeddings"


class Embeddings:
    """From texts to vectors, for one encoder in one dtype."""

    def __init__(self, weights: Path, dtype: str) -> None:
        """`weights`: a pipeline's folder."""
        digest = hashlib.sha256(store.fingerprint(weights / "text_encoder").encode())
        for path in sorted((weights / "tokenizer").iterdir()):
            digest.update(path.read_bytes())
        digest.update(dtype.encode())
        self._key = digest.digest()

    def path(self, text: str, tokens: int) -> Path:
        name = hashlib.sha256(self._key + f"{tokens}\0{text}".encode()).hexdigest()
        return folder() / f"{name}.safetensors"

    def get(self, text: str, tokens: int) -> Any:
        """(L, D) as it was kept, on the CPU; None when it was not, or its file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(text, tokens)
        try:
            vectors = load_file(path)["vectors"]
            os.utime(path)  # it was of use
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError) as error:
            log.warning("%s cannot be used (%s); the prompt is encoded again", path, error)
            return None
        return vectors

    def put(self, text: str, tokens: int, vectors: Any) -> None:
        """Keep (L, D). A disk that does not take it costs time later and nothing else."""
        from safetensors.torch import save

        path = self.path(text, tokens)
        building = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            building.write_bytes(save({"vectors": vectors.contiguous().cpu()}))
            building.replace(path)
            _trim(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                building.unlink()
            log.warning("the encoded prompt was not kept: %s", error)


def _trim(place: Path) -> None:
    files = sorted(place.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)
