"""Words to token ids, from a `tokenizer.json`.

This is the file that transformers' tokenizers read as well, and the same library does the work; only the
import of transformers is spared. Folders with no such file (`spiece.model` alone) need transformers' class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from pipelines.models.network import read_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "added_tokens.json",
)


class Encoding(NamedTuple):
    """Called like transformers' result."""

    input_ids: list[int]
    attention_mask: list[int]


class Tokenizer:
    """Called like transformers' tokenizers, for one text at a time and without padding."""

    def __init__(self, folder: Path | str) -> None:
        from tokenizers import Tokenizer as Backend

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        read_json(path)  # its ValueError names the file
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self.backend.no_padding()
        self.backend.no_truncation()
        # Our own copy of the files: the folder may be gone when the pipeline is saved.
        self._files = {
            name: (self.folder / name).read_bytes() for name in FILES if (self.folder / name).exists()
        }

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Raises ValueError when tokenizer.json is missing or damaged."""
        return cls(folder)

    @classmethod
    def supports(cls, entries: Mapping[str, Any], folder: Path) -> bool:
        return (folder / "tokenizer.json").exists()

    def save_pretrained(self, folder: Path | str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows: T5's is 0."""
        config = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        found = self.backend.token_to_id(str(config.get("pad_token", "<pad>")))
        return 0 if found is None else found

    def __call__(
        self,
        text: str,
        *,
        truncation: bool = False,
        max_length: int | None = None,  # tokens, the end token included
        add_special_tokens: bool = True,
        verbose: bool = True,
    ) -> Encoding:
        """The ids of one text."""
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if truncation and max_length is not None and len(ids) > max_length:
            specials = self.backend.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
            ids = ids[: max_length - specials] + ids[len(ids) - specials :]
        return Encoding(ids, [1] * len(ids))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
