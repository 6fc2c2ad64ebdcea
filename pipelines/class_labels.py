"""What pipelines share that are asked for a class: classes are given by number or by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

Labels = int | str | Sequence[int | str]  # classes by number or by name


class ClassLabels:
    """The part of a pipeline that knows the names of its `transformer`'s classes."""

    transformer: Any
    id2label: dict[int, str]  # number of a class -> its names, separated by commas

    def name_classes(self, id2label: Mapping[Any, str]) -> None:
        """Take over the names. Raises ValueError for what is not a class of these weights or not a text."""
        self.id2label = _read_labels(id2label, self.num_classes)
        self._names = _names(self.id2label)

    @property
    def num_classes(self) -> int:
        """Classes are numbered from 0 to this, without it."""
        return self.transformer.config.num_embeds_ada_norm

    def stored_names(self) -> dict[str, Any]:
        """The names as an entry of model_index.json; nothing where there are none."""
        names = {str(number): text for number, text in sorted(self.id2label.items())}
        return {"id2label": names} if names else {}

    def find_labels(self, text: str) -> list[tuple[int, str]]:
        """(number, name) of every class with a name that holds the text, whole names first.

        Where no name does, those that are spelled much alike; the empty text finds all.
        """
        wanted = text.strip().casefold()
        found = [(name, numbers) for name, numbers in self._names.items() if wanted in name.casefold()]
        if not found:
            by_fold = {name.casefold(): name for name in self._names}
            close = difflib.get_close_matches(wanted, by_fold, n=5, cutoff=0.6)
            return [(number, by_fold[fold]) for fold in close for number in self._names[by_fold[fold]]]

        def rank(entry: tuple[int, str]) -> tuple[bool, bool, int, str]:
            number, name = entry
            return name.casefold() != wanted, not name.casefold().startswith(wanted), number, name

        return sorted(((number, name) for name, numbers in found for number in numbers), key=rank)

    def get_label_ids(self, class_labels: Labels) -> list[int]:
        """Numbers of classes given by number, by one of their names, or by a number in letters ("207").

        Upper and lower case are told apart only where that decides between two classes. Raises ValueError
        for a number out of range, an unknown name, or a name of several classes.
        """
        labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        if not isinstance(labels, list | tuple) or not labels:
            raise ValueError(f"class_labels must be a class or a list of classes, not {class_labels!r}")
        return [self._label_id(label) for label in labels]

    def _label_id(self, label: Any) -> int:
        if isinstance(label, str):
            name = label.strip()
            numbers = self._called(name)
            if len(numbers) == 1:
                return numbers[0]
            if numbers:
                listed = ", ".join(f"{number} ({self.id2label[number]})" for number in numbers)
                raise ValueError(f"'{name}' names several classes: {listed}; give the number")
            if not name.isdecimal():
                raise ValueError(self._no_such_name(name))
            label = int(name)
        if isinstance(label, bool) or not isinstance(label, int):
            raise ValueError(f"a class is given by number or by name, not {label!r}")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"there is no class {label}; they are numbered from 0 to {self.num_classes - 1}")
        return label

    def _called(self, name: str) -> list[int]:
        """Classes of exactly this name; else of it in other letters; else of all these names at once."""
        if name in self._names:
            return sorted(self._names[name])
        folded = name.casefold()
        alike = [numbers for known, numbers in self._names.items() if known.casefold() == folded]
        return sorted(set().union(*alike)) or [n for n, text in self.id2label.items() if text == name]

    def _no_such_name(self, name: str) -> str:
        if not self._names:
            return f"no class is called '{name}': these weights have no names; give a number"
        close = list(dict.fromkeys(known for _, known in self.find_labels(name)))[:5] if name else []
        if close:
            return f"no class is called '{name}'. Did you mean {', '.join(close)}?"
        return f"no class is called '{name}'; they also have numbers, from 0 to {self.num_classes - 1}"


def _read_labels(id2label: Mapping[Any, str], classes: int) -> dict[int, str]:
    """Names by number. Raises ValueError for what is not a class of these weights or not a text."""
    if not isinstance(id2label, Mapping):
        raise ValueError("id2label must map numbers of classes to names")
    labels = {}
    for key, names in id2label.items():
        if not str(key).isdecimal() or not int(key) < classes:
            raise ValueError(f"id2label names a class {key!r}, the weights have 0 to {classes - 1}")
        if not isinstance(names, str):
            raise ValueError(f"id2label: the names of class {key} must be a text, not {names!r}")
        labels[int(key)] = names
    return labels


def _names(id2label: Mapping[int, str]) -> dict[str, set[int]]:
    """Every single name -> the classes that have it; some have two, such as the crane of ImageNet."""
    names: dict[str, set[int]] = {}
    for number, text in sorted(id2label.items()):
        for name in filter(None, (part.strip() for part in text.split(","))):
            names.setdefault(name, set()).add(number)
    return names
