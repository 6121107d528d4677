"""Partitions of the class ids into groups, and the layout of the head they imply (MOS)."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkernels._checks import check_int
from oodkernels._files import check_file, read_json, write_text
from oodkernels._wordnet import WORDNET_GROUPS, cut, super_classes
from oodkernels.cluster import kmeans

Ints: TypeAlias = Sequence[int] | NDArray[Any] | Tensor
PathLike: TypeAlias = str | os.PathLike[str]

__all__ = ["WORDNET_GROUPS", "Groups"]

_FORMAT, _VERSION = "oodkernels.groups", 1
_AUTHORS_SIZES = [398, 521, 9, 7, 52, 8, 3, 2]  # MOS's taxonomy_level0.npy


class Groups:
    """A partition of the class ids 0..C-1 into K groups, and the head layout it implies.

    A MOS head (Huang & Li, CVPR 2021, section 3) has C + K columns: group k owns the columns
    ``[offsets[k], offsets[k + 1])``, of which the first is its "others" and its classes follow.
    Three numberings meet here:

    - the *class id*, 0..C-1, which belongs to the user; ids of a group need not be neighbours;
    - the *grouped index*, 0..C-1, which counts the classes in the order of the columns: the ops
      take targets and return labels as grouped indices;
    - the *column* of the head, 0..C+K-1.

    Whose ids these are is known where ``class_names`` says so: :meth:`matched` then gives the same
    groups for classes that are counted in another order.

    A ``Groups`` is immutable and compares by value (layout and all names, wherever its tensors
    live). All its tensors are int64. It can be pickled; what comes back lives on the CPU.

    Args:
        class_to_group: Group 0..K-1 of each class id, shape (C,). Every group has a class.
        names: K distinct names; "0".."K-1" by default.
        index_in_group: Rank of each class id among the classes of its group, shape (C,). By
            default the classes of a group stand in the order of their ids.
        class_names: C distinct names or WordNet ids, one of each class id; None if not known.

    Raises:
        ValueError: An entry is out of range, a group has no class, or lengths disagree.
        TypeError: Not integers, or names that are not strings.
    """

    def __init__(
        self,
        class_to_group: Ints,
        names: Sequence[str] | None = None,
        index_in_group: Ints | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        group = _ints("Groups: class_to_group", class_to_group)
        end = group.size if names is None else len(names)
        _check(
            f"Groups: class_to_group must be in 0..{end - 1}", group, (group >= 0) & (group < end)
        )
        num_groups = int(group.max()) + 1 if names is None else len(names)
        sizes = np.bincount(group, minlength=num_groups)
        if not sizes.all():
            raise ValueError(
                f"Groups: every group must have a class, group {sizes.argmin()} has none"
            )

        rank = np.arange(group.size)
        if index_in_group is not None:
            rank = _ints("Groups: index_in_group", index_in_group)
            if rank.size != group.size:
                raise ValueError(
                    f"Groups: index_in_group must have {group.size} entries, one per class, "
                    f"got {rank.size}"
                )
        classes = np.lexsort((rank, group))
        if index_in_group is not None:
            expected = np.empty_like(rank)
            expected[classes] = np.arange(group.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            _check(
                "Groups: index_in_group must number the classes of each group from 0",
                rank,
                rank == expected,
            )

        self.names = tuple(map(str, range(num_groups))) if names is None else _names("names", names)
        self.class_names = None if class_names is None else _names("class_names", class_names)
        if self.class_names is not None and len(self.class_names) != group.size:
            raise ValueError(
                f"Groups: class_names must have {group.size} entries, one per class, got "
                f"{len(self.class_names)}"
            )
        offsets = np.concatenate(([0], np.cumsum(sizes + 1)))
        grouped = np.empty_like(classes)
        grouped[classes] = np.arange(classes.size)
        column = grouped + group + 1
        class_at = np.full(offsets[-1], -1)
        class_at[column] = np.arange(classes.size)
        self._offsets = _tensor(offsets)
        self._classes = _tensor(classes)
        self._class_to_group = _tensor(group)
        self._grouped = _tensor(grouped)
        self._column = _tensor(column)
        self._class_at = _tensor(class_at)
        self._key = (self.names, self.class_names, offsets.tobytes(), classes.tobytes())
        self._on: dict[torch.device, Groups] = {self.device: self}

    # Constructors

    @classmethod
    def from_labels(
        cls,
        class_to_group: Sequence[Hashable] | NDArray[Any] | Tensor,
        names: Sequence[str] | None = None,
        index_in_group: Ints | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Groups:
        """Groups from one group label per class id.

        Args:
            class_to_group: C labels: the ints 0..K-1, or any hashable values such as strings.
                The latter become the names, in the order in which they are first seen.
            names: Names of the groups 0..K-1; with string labels, the order of the groups.
            index_in_group: As in :class:`Groups`.
            class_names: As in :class:`Groups`.

        Raises:
            ValueError: As :class:`Groups`, or a label is not among the names.
            TypeError: Labels are floats or not hashable.
        """
        where = "Groups.from_labels: class_to_group"
        if isinstance(class_to_group, (str, bytes)):
            raise TypeError(f"{where} must hold one label per class, got {class_to_group!r}")
        if isinstance(class_to_group, (np.ndarray, Tensor)):
            class_to_group = class_to_group.tolist()
        labels = list(class_to_group)
        if labels and all(isinstance(x, (int, np.integer)) for x in labels):
            return cls(labels, names, index_in_group, class_names)
        if any(isinstance(x, (float, np.floating)) for x in labels):
            raise TypeError(f"{where} must hold ints or hashables such as strings, got floats")
        try:
            first_seen = list(dict.fromkeys(labels))
        except TypeError as error:
            raise TypeError(f"{where} must hold hashable labels, got an {error}") from None
        if names is None:
            names = [str(x) for x in first_seen]
            index: dict[Hashable, int] = {x: k for k, x in enumerate(first_seen)}
        else:
            index = {x: k for k, x in enumerate(names)}
            for x in first_seen:
                if x not in index:
                    raise ValueError(
                        f"{where} must hold labels that are in names, "
                        f"got {x!r} at index {labels.index(x)}"
                    )
        group = np.array([index[x] for x in labels], np.int64)
        return cls(group, names, index_in_group, class_names)

    @classmethod
    def from_sizes(
        cls,
        sizes: Ints,
        names: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Groups:
        """Groups of consecutive class ids: the first ``sizes[0]`` classes, the next, ...

        Args:
            sizes: Number of classes per group, others not counted, shape (K,).
            names: As in :class:`Groups`.
            class_names: As in :class:`Groups`.

        Raises:
            ValueError: A size is below 1; or these are the sizes of MOS's ``taxonomy_level0.npy``
                without ``class_names``: the authors count classes in the order of their columns,
                and taken for ImageNet's class ids 998 of 1,000 would be wrong.
        """
        array = _ints("Groups.from_sizes: sizes", sizes)
        _check("Groups.from_sizes: sizes must be >= 1", array, array >= 1)
        if class_names is None and array.tolist() == _AUTHORS_SIZES:
            raise ValueError(
                "Groups.from_sizes: sizes are those of MOS's taxonomy, whose classes are in the "
                "order of the authors' columns, not of ImageNet's class ids: give class_names in "
                "that order, or take Groups.from_image_list of the authors' list file"
            )
        return cls(np.repeat(np.arange(array.size), array), names, class_names=class_names)

    @classmethod
    def from_slices(
        cls,
        slices: Sequence[Sequence[int]] | NDArray[Any] | Tensor,
        names: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Groups:
        """Groups of consecutive class ids from the ``group_slices`` of MOS's published code.

        Args:
            slices: First and past-the-end column per group, others included, shape (K, 2).
            names: As in :class:`Groups`.
            class_names: As in :class:`Groups`.

        Raises:
            ValueError: The slices do not follow one another from column 0, one is narrower than
                2 columns, or as :meth:`from_sizes`.
        """
        where = "Groups.from_slices: slices"
        array = _ints(where, slices, ndim=2)
        if array.shape[1] != 2:
            raise ValueError(f"{where} must have shape (K, 2), got {tuple(array.shape)}")
        start, end = array.T
        follows = start == np.concatenate(([0], end[:-1]))
        _check(f"{where} must start at 0, then where the one before ends", start, follows)
        width = end - start
        _check(f"{where} must be >= 2 columns wide", width, width >= 2)
        return cls.from_sizes(width - 1, names, class_names)

    @classmethod
    def from_table(cls, path: PathLike, names: Sequence[str] | None = None) -> Groups:
        """Groups from a CSV file with a header and one row per class, in the order of class ids.

        Args:
            path: The file. Column ``group`` holds the group, as an int or a name. Optional are
                ``index_in_group``, as in :class:`Groups`, and ``wnid`` or ``class_name``, which
                becomes ``class_names``. Others are not read.
            names: As in :meth:`from_labels`.

        Raises:
            ValueError: A column is missing or holds something else.
        """
        where = f"Groups.from_table: {os.fspath(path)}"
        with check_file(where, path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows or "group" not in rows[0]:
            raise ValueError(
                f"{where} must have a header with a column 'group' and a row for each class"
            )
        labels: list[Any] = [row["group"] for row in rows]
        if None in labels:
            raise ValueError(
                f"{where} must give each class a group, got no group in row {labels.index(None)}"
            )
        if all(re.fullmatch(r"\d+", label) for label in labels):
            labels = [int(label) for label in labels]
        rank = None
        if "index_in_group" in rows[0]:
            try:
                rank = [int(row["index_in_group"]) for row in rows]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: index_in_group must hold ints: {error}") from None
        called = [column for column in ("wnid", "class_name") if column in rows[0]]
        if len(called) > 1:
            raise ValueError(f"{where} must name classes in one column, got wnid and class_name")
        class_names = [row[called[0]] for row in rows] if called else None
        return cls.from_labels(labels, names, rank, class_names)

    @classmethod
    def from_image_list(cls, path: PathLike, names: Sequence[str] | None = None) -> Groups:
        """Groups from an image list of MOS's published code.

        Such a list (``data_lists/imagenet2012_group_softmax_val_list.txt``) says of each image its
        group and the index of its class in the group: ``val/n01751748/x.JPEG 0 328``. The folder
        names the class; class ids count the names in sorted order, which is that of ImageNet's
        class ids and of torchvision's ``ImageFolder``.

        Args:
            path: The file. Every class has an image in it.
            names: As in :class:`Groups`.

        Raises:
            ValueError: A line is of another form, a class is in two places, or as :class:`Groups`.
        """
        where = f"Groups.from_image_list: {os.fspath(path)}"
        places: dict[str, tuple[int, int]] = {}
        with check_file(where, path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                found = re.fullmatch(r"(?:.*/)?([^/]+)/[^/]+ (\d+) (\d+)", line.strip())
                if found is None:
                    raise ValueError(
                        f"{where}: line {number} must be 'folder/image group index', got "
                        f"{line.strip()[:80]!r}"
                    )
                place = int(found[2]), int(found[3])
                if places.setdefault(found[1], place) != place:
                    raise ValueError(
                        f"{where}: line {number} must have class {found[1]} in group and index "
                        f"{places[found[1]]}, as above, got {place}"
                    )
        class_names = sorted(places)
        group, rank = (
            zip(*(places[name] for name in class_names), strict=True) if places else ((), ())
        )
        return cls(group, names, rank, class_names)

    @classmethod
    def random(cls, num_classes: int, k: int, seed: int = 0) -> Groups:
        """Classes to groups at random, group sizes equal to within one (MOS, random grouping).

        The same arguments give the same groups on any platform and version of NumPy.

        Args:
            num_classes: C.
            k: Number of groups, 1..C.
            seed: >= 0.

        Raises:
            ValueError: An argument is out of its range.
        """
        where = "Groups.random"
        num_classes = _in_range(where, "num_classes", num_classes, 1)
        k = _in_range(where, "k", k, 1, num_classes)
        # NumPy keeps the raw stream of a bit generator fixed, but not Generator.permutation.
        draws = np.random.PCG64(_in_range(where, "seed", seed, 0)).random_raw(num_classes)
        group = np.empty(num_classes, np.int64)
        group[np.argsort(draws, kind="stable")] = np.arange(num_classes) % k
        return cls(group)

    @classmethod
    def from_features(cls, class_means: NDArray[Any] | Tensor, k: int, seed: int = 0) -> Groups:
        """Groups by K-means on one mean embedding per class (MOS, feature clustering).

        Groups are numbered by their lowest class id. Where K-means leaves clusters empty, each
        takes the class that lies farthest from the centroid of a cluster of several.

        Args:
            class_means: Mean embedding per class id, finite, shape (C, d), clustered as float64.
            k: Number of groups, 1..C.
            seed: Of the initialisation, >= 0.

        Raises:
            ValueError: Wrong shape, a value is not finite, or k is out of range.
        """
        where = "Groups.from_features"
        if isinstance(class_means, Tensor):
            class_means = class_means.detach().double().cpu().numpy()
        x = np.asarray(class_means, np.float64)
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"{where}: class_means must have shape (C, d), got {x.shape}")
        k = _in_range(where, "k", k, 1, len(x))
        seed = _in_range(where, "seed", seed, 0)
        infinite = np.flatnonzero(~np.isfinite(x).all(1))
        if infinite.size:
            raise ValueError(
                f"{where}: class_means must be finite, got {infinite.size} classes that are "
                f"not, the first of them {infinite[0]}"
            )
        fitted = kmeans(torch.from_numpy(x), k, n_init=10, seed=seed)
        group = fitted.labels.numpy()
        distance = np.linalg.norm(x - fitted.centroids.numpy()[group], axis=1)
        sizes = np.bincount(group, minlength=k)
        for empty in np.flatnonzero(sizes == 0):
            farthest = np.where(sizes[group] > 1, distance, -1).argmax()
            sizes[group[farthest]] -= 1
            sizes[empty] = 1
            group[farthest] = empty
        first = np.unique(group, return_index=True)[1]
        order = np.empty(k, np.int64)
        order[np.argsort(first)] = np.arange(k)
        return cls(order[group])

    @classmethod
    def from_wordnet(
        cls, wnids: Sequence[str], wordnet: PathLike | None = None, k: int | None = None
    ) -> Groups:
        """Groups by WordNet super-class (MOS, taxonomy): see :data:`WORDNET_GROUPS`.

        A class belongs to the super-class found in the closure of its hypernyms, to "natural
        object" if that and "geological formation" are both there, to "misc" if none is. Groups
        stand in the order of :data:`WORDNET_GROUPS`; those without a class are left out.

        With ``k``, groups are instead as many subtrees of the hierarchy, cut off the largest group
        one after the other: for classes of which most would be in one group, or in "misc".

        Args:
            wnids: WordNet 3.0 id of each class id, such as "n01440764", as ImageNet has them.
            wordnet: Directory with WordNet 3.0's file ``data.noun``. By default ``$WNSEARCHDIR``,
                or else where systems keep it (Debian: package wordnet-base).
            k: Number of groups; None for the super-classes.

        Raises:
            ValueError: An id is malformed or not in the database, or that is not WordNet 3.0; or
                ``k`` is not 1 to the number of classes.
            FileNotFoundError: There is no ``data.noun``.
        """
        if k is not None:
            labels = cut("Groups.from_wordnet", wnids, k, wordnet)
            return cls.from_labels(labels, list(dict.fromkeys(labels)), class_names=wnids)
        labels = super_classes("Groups.from_wordnet", wnids, wordnet)
        names = [name for name in WORDNET_GROUPS if name in labels]
        return cls.from_labels(labels, names, class_names=wnids)

    # Layout

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self._classes.shape[0]

    @property
    def num_groups(self) -> int:
        """K, the number of groups; also ``len(groups)``."""
        return len(self.names)

    @property
    def width(self) -> int:
        """C + K, the number of columns of the head."""
        return self._class_at.shape[0]

    @property
    def offsets(self) -> Tensor:
        """First column of each group, then the width: int64, shape (K + 1,)."""
        return self._offsets

    @property
    def sizes(self) -> Tensor:
        """Number of classes per group, others not counted: int64, shape (K,)."""
        return self._offsets.diff() - 1

    @property
    def classes(self) -> Tensor:
        """Class id at each grouped index: int64, shape (C,)."""
        return self._classes

    @property
    def class_to_group(self) -> Tensor:
        """Group of each class id: int64, shape (C,)."""
        return self._class_to_group

    @property
    def index_in_group(self) -> Tensor:
        """Rank of each class id among the classes of its group: int64, shape (C,)."""
        # The columns before a class are those before its group, and its group's "others".
        return self._column - self._offsets[self._class_to_group] - 1

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self._offsets.device

    def slices(self) -> Tensor:
        """First and past-the-end column per group, as MOS's published code has it: (K, 2)."""
        return torch.stack((self._offsets[:-1], self._offsets[1:]), 1)

    def matched(self, class_names: Sequence[str]) -> Groups:
        """These groups for classes that are counted in another order.

        Args:
            class_names: Name of each class id 0..C-1; the names that these groups have.

        Returns:
            Groups with the same columns, in which class id i is ``class_names[i]``.

        Raises:
            ValueError: These groups do not know their classes' names, or know others.
        """
        where = "Groups.matched"
        if self.class_names is None:
            raise ValueError(
                f"{where}: the order of the {self.num_classes} classes in these groups is not "
                "known: make them with class_names (`oodk group taxonomy` of WordNet ids or of a "
                "table with a column wnid or class_name, `oodk convert groups` of MOS's image list)"
            )
        wanted = _names("class_names", class_names)
        if wanted == self.class_names:
            return self
        index = {name: i for i, name in enumerate(self.class_names)}
        unknown = [name for name in wanted if name not in index]
        missing = sorted(set(self.class_names) - set(wanted))
        if unknown or missing:
            raise ValueError(
                f"{where}: class_names must be those of the groups, got {len(wanted)} names for "
                f"{self.num_classes} classes: {len(unknown)} that the groups do not have "
                f"{unknown[:3]}, {len(missing)} missing {missing[:3]}"
            )
        order = torch.tensor([index[name] for name in wanted], device="cpu")
        here = self.to("cpu")
        return Groups(
            here.class_to_group[order], self.names, here.index_in_group[order], wanted
        ).to(self.device)

    # Mappings

    def to_grouped(self, class_ids: Tensor, ignore_index: int = -100) -> Tensor:
        """Grouped indices of class ids: the targets that the ops take.

        Args:
            class_ids: integers, any shape and device.
            ignore_index: A value outside 0..C-1 that is kept as it is.

        Returns:
            int64, the shape and device of ``class_ids``.

        Raises:
            ValueError: An id is neither in 0..C-1 nor ``ignore_index`` (-1, the label of OOD
                samples, is neither unless ``ignore_index`` says so), or ``ignore_index`` is a
                class. Contents are looked at on the CPU, elsewhere only under
                ``OODK_VALIDATE=1``: reading them back would wait for the device. Unchecked, an
                id that is no class stays as it is, for the op that takes it to refuse.
            TypeError: Not an integer tensor.
        """
        where = "Groups.to_grouped"
        if 0 <= ignore_index < self.num_classes:
            raise ValueError(f"{where}: ignore_index must be no class id, got {ignore_index}")
        _check_ids(f"{where}: class_ids", class_ids, self.num_classes, ignore_index)
        # What is no class id is no grouped index either: passed on, it is still recognised.
        return _look_up(self.to(class_ids.device)._grouped, class_ids, class_ids.long())

    def to_class(self, grouped: Tensor) -> Tensor:
        """Class ids of grouped indices: the labels that the ops return, as the user has them.

        Args:
            grouped: integers, any shape and device. -1, no label, is kept as it is.

        Returns:
            int64, the shape and device of ``grouped``.

        Raises:
            ValueError: An index is outside -1..C-1. Checked as in :meth:`to_grouped`; unchecked,
                such an index gives -1.
            TypeError: Not an integer tensor.
        """
        _check_ids("Groups.to_class: grouped", grouped, self.num_classes, -1)
        return _look_up(self.to(grouped.device)._classes, grouped)

    def to_column(self, class_ids: Tensor) -> Tensor:
        """Columns of the head that hold the given classes.

        Args:
            class_ids: integers, any shape and device.

        Returns:
            int64, the shape and device of ``class_ids``.

        Raises:
            ValueError: An id is outside 0..C-1. Checked as in :meth:`to_grouped`; unchecked,
                such an id gives -1.
            TypeError: Not an integer tensor.
        """
        _check_ids("Groups.to_column: class_ids", class_ids, self.num_classes)
        return _look_up(self.to(class_ids.device)._column, class_ids)

    def from_column(self, columns: Tensor) -> Tensor:
        """Class ids of columns of the head, -1 for a column that is some group's "others".

        Args:
            columns: integers, any shape and device.

        Returns:
            int64, the shape and device of ``columns``.

        Raises:
            ValueError: A column is outside 0..C+K-1. Checked as in :meth:`to_grouped`;
                unchecked, such a column gives -1.
            TypeError: Not an integer tensor.
        """
        _check_ids("Groups.from_column: columns", columns, self.width)
        return _look_up(self.to(columns.device)._class_at, columns)

    # Where it lives, and how it is kept

    def to(self, device: torch.device | str | int) -> Groups:
        """These groups with their tensors on ``device``; made once a device and kept."""
        device = torch.device(device)
        if device not in self._on:
            device = torch.empty(0, device=device).device  # "cuda" has an index then
        if device in self._on:
            return self._on[device]
        moved = object.__new__(Groups)
        with torch.inference_mode(False):  # see _tensor
            for name, value in vars(self._on[torch.device("cpu")]).items():
                setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        if not torch.compiler.is_compiling():
            self._on[device] = moved
        return moved

    def to_json(self) -> str:
        """The groups as JSON: per group its name and class ids in the order of columns; names."""
        here = self.to("cpu")
        members = torch.split(here._classes, here.sizes.tolist())
        groups = [
            {"name": name, "classes": classes.tolist()}
            for name, classes in zip(self.names, members, strict=True)
        ]
        content = {"format": _FORMAT, "version": _VERSION, "groups": groups}
        if self.class_names is not None:
            content["class_names"] = self.class_names
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Groups:
        """Groups from :meth:`to_json`.

        Raises:
            ValueError: ``text`` is not JSON, not of this format, of a later version, or its
                groups do not hold every class id once.
        """
        where = "Groups.from_json"
        content = read_json(where, text, _FORMAT, _VERSION)
        try:
            names = _names("names", [group["name"] for group in content["groups"]])
            members = [_ints("classes", group["classes"]) for group in content["groups"]]
            classes = np.concatenate(members)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: groups must hold a name and a list of class ids each: {error!r}"
            ) from None
        if not np.array_equal(np.sort(classes), np.arange(classes.size)):
            raise ValueError(
                f"{where}: groups must hold each of the class ids 0..{classes.size - 1} once"
            )
        group, rank = np.empty_like(classes), np.empty_like(classes)
        group[classes] = np.repeat(np.arange(len(members)), [m.size for m in members])
        rank[classes] = np.concatenate([np.arange(m.size) for m in members])
        try:
            return cls(group, names, rank, content.get("class_names"))
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None

    def save(self, path: PathLike) -> None:
        """Write the groups to a JSON file. The file is replaced whole or not at all."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: PathLike) -> Groups:
        """Groups from a file that :meth:`save` wrote.

        Raises:
            ValueError: As :meth:`from_json`, or the file is not text.
            OSError: The file cannot be read.
        """
        try:
            return cls.from_json(check_file("file", path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Groups.load: {os.fspath(path)}: {error}") from error

    def __len__(self) -> int:
        return self.num_groups

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Groups) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __deepcopy__(self, memo: dict[int, Any]) -> Groups:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Groups.from_json, (self.to_json(),)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name} {size}" for name, size in zip(self.names[:8], self.sizes[:8], strict=True)
        )
        more = ", ..." if len(self) > 8 else ""
        return f"Groups({self.num_classes} classes in {len(self)} groups: {shown}{more})"


def _tensor(array: NDArray[Any]) -> Tensor:
    # from_numpy, because torch's factories follow its default device; and no inference tensor,
    # because autograd refuses to save one.
    with torch.inference_mode(False):
        return torch.from_numpy(array.astype(np.int64))


def _look_up(table: Tensor, index: Tensor, otherwise: Tensor | int = -1) -> Tensor:
    index = index.long()
    last = table.shape[0] - 1
    return torch.where((index >= 0) & (index <= last), table[index.clamp(0, last)], otherwise)


def _check_ids(what: str, ids: Tensor, end: int, other: int | None = None) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{what} must be an integer tensor, got {type(ids).__name__}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{what} must be an integer tensor, got {ids.dtype}")
    if torch.compiler.is_compiling():
        return
    if ids.device.type != "cpu" and os.environ.get("OODK_VALIDATE") != "1":
        return
    ids = ids.detach().long()
    wrong = (ids < 0) | (ids >= end)
    if other is not None:
        wrong &= ids != other
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        allowed = f"in 0..{end - 1}" + ("" if other is None else f" or {other}")
        index = at[0] if len(at) == 1 else at
        raise ValueError(f"{what} must be {allowed}, got {int(ids[at])} at index {index}")


def _names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"Groups: {what} must be a sequence of strings, got {names!r}")
    seen: set[str] = set()
    for k, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"Groups: {what} must be strings, got {name!r} at index {k}")
        if name in seen:
            raise ValueError(f"Groups: {what} must be distinct, got {name!r} again at index {k}")
        seen.add(name)
    return tuple(names)


def _check(expectation: str, array: NDArray[np.int64], fine: NDArray[np.bool_]) -> None:
    wrong = np.flatnonzero(~fine)
    if wrong.size:
        raise ValueError(f"{expectation}, got {array[wrong[0]]} at index {wrong[0]}")


def _in_range(where: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    value = check_int(where, name, value)
    if value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{where}: {name} must be {allowed}, got {value}")
    return value


def _ints(what: str, values: Any, ndim: int = 1) -> NDArray[np.int64]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            raise TypeError(f"{what} must be integers, got {values.dtype}")
        values = values.cpu().numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{what} must be a regular array: {error}") from None
    if array.size == 0:
        raise ValueError(f"{what} must not be empty")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{what} must be {ndim}-dimensional, got shape {array.shape}")
    return array.astype(np.int64)
