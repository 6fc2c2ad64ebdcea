"""The base of our networks: a configuration, and folders that diffusers and transformers read and write too.

Why not their base classes: importing diffusers' ModelMixin takes several times as long as importing torch,
and a picture from the small weights would mostly be waiting for imports. The folders are the same:
`config.json` and safetensors, in one file or in shards with an index. Only safetensors are read, never
pickles.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Config = Any  # a frozen data class, one per network
NAMES = ".names.json"  # after the name of a file of weights: how its tensors are called here


class Network(nn.Module):
    """A module built from a configuration. Subclasses fill in the class attributes."""

    config_class: ClassVar[type]
    weights_name: ClassVar[str] = "diffusion_pytorch_model.safetensors"
    header: ClassVar[Mapping[str, Any]]  # entries of config.json by which the libraries know the class
    required: ClassVar[tuple[str, ...]] = ()  # keys without which the shapes would be guessed
    ignored: ClassVar[
        Mapping[str, tuple[Any, ...]]
    ] = {}  # keys of older configurations: values meaning "off"
    takes_unknown_keys: ClassVar[bool] = False
    # fields that the libraries' class of this name does not know: written only when they say something
    beyond: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config = None, **options: Any) -> None:
        super().__init__()
        self.config = self.config_class(**options) if config is None else config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    streamed_on: torch.device | None = None  # where it computes when its weights are not kept there

    @property
    def device(self) -> torch.device:
        return self.streamed_on or next(self.parameters()).device

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to` and its like do with every tensor."""
        self._refuse_streamed("moved or converted")
        return super()._apply(fn, recurse)

    def _refuse_streamed(self, done: str) -> None:
        if self.streamed_on is not None:
            raise ValueError(
                f"a {type(self).__name__} that leaves its weights elsewhere cannot be {done}; "
                "load it without `offload`"
            )

    _repeated_blocks: ClassVar[list[str]] = ["Block"]  # as diffusers names what repeats in a network

    def set_attention_backend(self, backend: str) -> None:
        """Like diffusers' method, for its names and for ours: see `pipelines.attention`. Its own does nothing
        for these families.

        Raises ValueError for a name that is unknown or cannot run here.
        """
        from pipelines.attention import DIFFUSERS_NAMES, set_attention

        set_attention(self, DIFFUSERS_NAMES.get(backend, backend))

    def reset_attention_backend(self) -> None:
        """Back to `auto`."""
        self.set_attention_backend("auto")

    def compile_repeated_blocks(self, cache: Path | str | None = None) -> None:
        """Like diffusers' method: compile the blocks, once for all of them. `cache` is a folder that keeps
        what was compiled, by default torch's own. Raises ValueError, see `pipelines.compiled`."""
        from pipelines.compiled import compile_blocks

        compile_blocks(self, cache)

    @classmethod
    def read_config(cls, folder: Path | str) -> Config:
        """The configuration in the folder. Raises ValueError naming what does not fit."""
        path = Path(folder) / "config.json"
        entries = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
        lacking = [key for key in cls.required if key not in entries]
        if lacking:
            raise ValueError(f"{path} lacks {', '.join(map(repr, lacking))}")
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        for key in entries.keys() - known:
            if key in cls.ignored and entries[key] in cls.ignored[key]:
                continue
            if not cls.takes_unknown_keys:
                raise ValueError(f"{path}: unknown key '{key}' with value {entries[key]!r}")
        chosen = {key: _frozen(entries[key]) for key in entries.keys() & known}
        try:
            return cls.config_class(**chosen)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def empty(cls, config: Config) -> Self:
        """On the meta device: no memory and no random numbers, for a state dict to be assigned."""
        with torch.device("meta"), _Uninitialised():
            return cls(config)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        torch_dtype: torch.dtype | None = None,  # None keeps what the file holds
        device: torch.device | str | None = None,
        offload: str | None = None,  # where large layers stay, "file" or "host": see `pipelines.streaming`
    ) -> Self:
        """Read configuration and weights, ready for inference.

        Raises ValueError: files missing or unreadable, keys or shapes that do not fit, numbers that are not
        finite.
        """
        folder = Path(folder)
        model = cls.empty(cls.read_config(folder))
        state = model.rename(read_tensors(folder, cls.weights_name))
        if offload is not None:
            from pipelines.streaming import OFFLOAD

            model.check_shapes(state, folder)
            OFFLOAD[offload](model, state, torch_dtype, device, folder)
            return model.eval()
        model.check_state(state, folder)
        # Moving one tensor at a time keeps the peak at one copy of the weights.
        state = {key: model.cast(key, state.pop(key), torch_dtype, device) for key in list(state)}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def save_pretrained(self, folder: Path | str, **layout: Any) -> None:
        """Write config.json and one safetensors file, as the libraries do.

        `layout` are the options of the network's `stored_state`, where it has any.
        """
        from safetensors.torch import save_file

        self._refuse_streamed("saved")
        state = self.stored_state(**layout)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        idle = {
            field.name
            for field in dataclasses.fields(self.config)
            if field.name in self.beyond and getattr(self.config, field.name) == field.default
        }
        values = dataclasses.asdict(self.config)
        entries = {**self.header, **{key: value for key, value in values.items() if key not in idle}}
        (folder / "config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
        save_file(state, folder / self.weights_name, metadata={"format": "pt"})
        # safetensors makes it readable by its owner only, whatever the umask says
        (folder / self.weights_name).chmod((folder / "config.json").stat().st_mode)

    def stored_state(self) -> dict[str, Tensor]:
        """The tensors of the file, under the names they have there; the reverse of `rename`."""
        return {key: value.detach().contiguous() for key, value in self.state_dict().items()}

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring keys of older files to today's names."""
        return state

    def cast(
        self, key: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> Tensor:
        """One tensor as the model wants it; subclasses keep some in float32."""
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    def check_state(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Refuse weights that do not belong to this configuration, or are not all numbers."""
        self.check_shapes(state, folder)
        for key, tensor in state.items():
            finite(key, tensor, folder)

    def check_shapes(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Refuse weights that do not belong to this configuration, naming the first tensors that differ."""
        wanted = {key: tensor.shape for key, tensor in self.state_dict().items()}
        for problem, keys in (
            ("has no", wanted.keys() - state.keys()),
            ("has unexpected", state.keys() - wanted.keys()),
        ):
            if keys:
                first = ", ".join(sorted(keys)[:3])
                raise ValueError(f"{folder}: the file {problem} {len(keys)} tensors, such as {first}")
        for key, shape in wanted.items():
            if state[key].shape != shape:
                raise ValueError(
                    f"{folder}: {key} is {tuple(state[key].shape)}, config.json means {tuple(shape)}"
                )


def finite(key: str, tensor: Tensor, source: Path) -> None:
    """Raises ValueError for numbers that are not finite."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"{source}: {key} holds numbers that are not finite (NaN or infinity)")


class _Uninitialised(TorchFunctionMode):
    """Leaves out `torch.nn.init`.

    On the meta device even a division imports torch's compiler, which takes seconds, so constructors of
    networks get all their numbers from `torch.nn.init`.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of its shards. Raises ValueError naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [folder / name]
    index = folder / f"{name}.index.json"
    if not files[0].exists() and index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no 'weight_map'")
        for shard in shards.values():  # a plain name: an index must not lead out of its folder
            if Path(str(shard)).name != shard:
                raise ValueError(f"{index} names a file outside its folder: {shard!r}")
        files = [folder / shard for shard in sorted(set(shards.values()))]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except FileNotFoundError as error:
            raise ValueError(f"{file} is missing (weights are read from safetensors only)") from error
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    names = folder / f"{name}{NAMES}"
    return renamed(tensors, read_json(names), names) if names.exists() else tensors


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """Tensors of a file in another layout under our names, which `names` lists: one; several for equal parts
    along the rows, which become views; none for what is not needed. Raises ValueError."""
    if other := sorted(tensors.keys() ^ names.keys()):
        raise ValueError(f"{source} and the file differ in {len(other)} names, such as {other[0]}")
    ours: dict[str, Tensor] = {}
    for name, targets in names.items():
        if len(targets) == 1:
            ours[targets[0]] = tensors[name]
        elif targets:
            if tensors[name].ndim == 0 or tensors[name].shape[0] % len(targets):
                raise ValueError(f"{source}: {name} cannot be cut into {len(targets)} equal parts")
            ours |= zip(targets, tensors[name].chunk(len(targets)), strict=True)
    return ours


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
