"""Batches whose order and random numbers depend on a seed and their number alone.

So a run that goes on from a checkpoint, and one spread over processes, sees the same batches as one
process that was never interrupted, with any number of workers.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from oodkernels._checks import check_count
from oodkernels._digest import digest
from oodkernels.training._random import entropy, seeded

Loader = DataLoader[Any]


class LoaderBatch(NamedTuple):
    """What a loader gave."""

    data: Any
    samples: Any
    """Indices in the data set, as the sampler gave them; None where it is iterable."""


class Batches:
    """The batches of a loader, numbered from 0 on, over as many epochs as are asked for.

    The loader's data set, sampler, collate function and worker settings are kept. A sampler is
    asked for its order once an epoch, with random numbers of the epoch; a batch is read with random
    numbers of its own. An ``IterableDataset`` is read as it comes, again and again: only that its
    batches are skipped can be seen to on resuming.

    Args:
        loader: Any ``DataLoader``.
        name: What it holds, for messages.
        seed: Of order and random numbers.
        samples: Read only these samples, in an order of their own each epoch; None for those of
            the loader's sampler.
        parts: Batches an epoch that ``samples`` are dealt out to; None: as the loader's batch size
            has it.

    Attributes:
        first: Digest of what batch 0 held; None until it is read. Of an ``IterableDataset`` nothing
            is noted, for who can say that it gives the same again.

    Raises:
        TypeError: ``loader`` is no ``DataLoader``.
        ValueError: It has no batch, or shares out the samples among processes itself.
    """

    def __init__(
        self,
        loader: Loader,
        name: str,
        seed: int,
        samples: Tensor | None = None,
        parts: int | None = None,
    ) -> None:
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"Trainer.fit: the {name} loader must be a torch DataLoader, got "
                f"{type(loader).__name__}"
            )
        if isinstance(loader.sampler, DistributedSampler):
            raise ValueError(
                f"Trainer.fit: the {name} loader must have a plain sampler, got a "
                "DistributedSampler; batches are shared out among processes by the Trainer"
            )
        self.loader, self.name, self.seed = loader, name, seed
        self.samples, self.parts = samples, parts
        self.first: str | None = None
        self._order_digest: str | None = None
        self.iterable = isinstance(loader.dataset, IterableDataset)
        try:
            self._length: int | None = len(loader)
        except TypeError:
            if not self.iterable:
                raise ValueError(
                    f"Trainer.fit: the {name} loader's sampler must have a length"
                ) from None
            self._length = None
        if samples is not None:
            self._length = min(parts or -(-len(samples) // self._batch_size()), len(samples))
        if self._length == 0:
            raise ValueError(f"Trainer.fit: the {name} loader must have a batch, got none")
        self._order: tuple[int, list[Any]] = (-1, [])

    def _batch_size(self) -> int:
        loader = self.loader
        for source in (loader, loader.batch_sampler, loader.sampler):
            size = getattr(source, "batch_size", None)
            if isinstance(size, Integral) and not self.iterable:
                return int(size)
        raise ValueError(
            f"Trainer.fit: the {self.name} loader must have a batch size and a data set with "
            "indices, to be mined"
        )

    @property
    def per_epoch(self) -> int | None:
        """Batches an epoch; None where that is not known."""
        return self._length

    def order(self, epoch: int) -> list[Any]:
        """What the sampler gives for every batch of an epoch."""
        if self._order[0] != epoch:
            self._order = (epoch, self._draw(epoch))
        return self._order[1]

    def _draw(self, epoch: int) -> list[Any]:
        loader, key = self.loader, (self.seed, 0, epoch)
        if self.samples is not None:
            generator = torch.Generator().manual_seed(entropy(key))
            rows = self.samples[torch.randperm(len(self.samples), generator=generator)]
            if self.parts is None:
                return [part.tolist() for part in rows.split(self._batch_size())]
            return [part.tolist() for part in rows.tensor_split(self._length or 1)]
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        generators = []
        source: Any = sampler
        while source is not None:  # a batch sampler has a sampler
            if isinstance(found := getattr(source, "generator", None), torch.Generator):
                generators.append(found)
            source = getattr(source, "sampler", None)
        states = [generator.get_state() for generator in generators]
        try:
            with seeded(key):
                for generator in generators:
                    generator.manual_seed(entropy(key))
                return list(islice(sampler, self._length))
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def leave_out_ragged(self) -> tuple[int, int] | None:
        """Leave out the last batch of every epoch where it is smaller than the first.

        Returns:
            Samples in it and in the first; None where there is none such.
        """
        if self.iterable or self._length is None or self._length < 2:
            return None
        sizes = [len(batch) for batch in self.order(0) if isinstance(batch, (list, tuple))]
        if len(sizes) < 2 or sizes[-1] >= sizes[0]:
            return None
        self._length -= 1
        self._order = (-1, [])
        return sizes[-1], sizes[0]

    def facts(self) -> dict[str, str | None]:
        """What another run has to have in common with this one to see the same batches."""
        if self.iterable:
            return {}
        if self._order_digest is None:  # once: another epoch's order is in use when it is asked for
            self._order_digest = digest(str(self.order(0)))
        return {"order": self._order_digest, "first batch": self.first}

    def read_first(self) -> None:
        """Take the digest of batch 0 without going on from it."""
        if not self.iterable:
            next(self._read(range(1)))

    def samples_of(self, epoch: int) -> Tensor:
        """Indices of the samples that the sampler gives in an epoch, in ascending order, once."""
        order = self.order(epoch)
        flat = {
            i for batch in order for i in (batch if isinstance(batch, (list, tuple)) else [batch])
        }
        return torch.tensor(sorted(flat))

    def read(self, numbers: Iterable[int], skip: int = 0) -> Iterator[LoaderBatch]:
        """Batches of these numbers, one after the other; number ``per_epoch`` starts epoch 1.

        Args:
            numbers: Of an ``IterableDataset`` only how many there are counts.
            skip: Batches of an ``IterableDataset`` to read past first.

        Raises:
            RuntimeError: A sample cannot be read; the message names it.
        """
        if self.iterable:
            batches = islice(self._again(), skip, None)
            return (LoaderBatch(data, None) for _, data in zip(numbers, batches, strict=False))
        return self._read(numbers)

    def _again(self) -> Iterator[Any]:
        while True:
            empty = True
            for data in self.loader:
                empty = False
                yield data
            if empty:
                raise ValueError(f"Trainer.fit: the {self.name} loader must have a batch, got none")

    def _read(self, numbers: Iterable[int]) -> Iterator[LoaderBatch]:
        asked: list[Any] = []  # read ahead of what was given back, by the workers' prefetching

        def requests() -> Iterator[tuple[int, Any]]:
            for number in numbers:
                epoch, position = divmod(number, self._length or 1)
                samples = self.order(epoch)[position]
                asked.append((number, samples))
                yield entropy((self.seed, 1, epoch, position)), samples

        loader = self.loader
        batched = loader.batch_sampler is not None
        workers: dict[str, Any] = {}
        if loader.num_workers:
            workers = {
                "num_workers": loader.num_workers,
                "prefetch_factor": loader.prefetch_factor,
                "multiprocessing_context": loader.multiprocessing_context,
                "timeout": loader.timeout,
                "worker_init_fn": _WorkerInit(loader.worker_init_fn),
            }
        reader: Loader = DataLoader(
            _Samples(loader.dataset, self.name, batched),
            batch_size=None,
            sampler=requests(),
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            # Its own, or it would draw from torch's global one each time it starts.
            generator=torch.Generator().manual_seed(0),
            **workers,
        )
        for data in reader:
            number, samples = asked.pop(0)
            if number == 0 and self.first is None:
                self.first = digest(*_tensors(data))
            yield LoaderBatch(data, samples)


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, (list, tuple)):
        for part in data:
            yield from _tensors(part)


class _Samples(Dataset[Any]):
    """Samples of a batch, read under its seed."""

    def __init__(self, dataset: Dataset[Any], name: str, batched: bool) -> None:
        self.dataset, self.name, self.batched = dataset, name, batched

    def __getitem__(self, request: tuple[int, Any]) -> Any:
        seed, index = request
        with seeded((seed,)):
            if not self.batched:
                return self._read(index)
            fetch: Callable[[Any], Any] | None = getattr(self.dataset, "__getitems__", None)
            if fetch is not None:
                try:
                    return fetch(index)
                except Exception:  # one by one, to find out which
                    pass
            return [self._read(i) for i in index]

    def _read(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise RuntimeError(
                f"Trainer.fit: sample {index} of the {self.name} data could not be read: "
                f"{type(error).__name__}: {error}"
            ) from error


class _WorkerInit:
    """Leaves Ctrl-C to the main process, which has to finish its step."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


def tensor_loader(
    *tensors: Tensor, batch_size: int, shuffle: bool = False, drop_last: bool = False
) -> Loader:
    """A loader of tensors in memory that indexes whole batches, which is much the fastest.

    Args:
        tensors: Of equal length, such as (x, y).
        batch_size: Samples a batch.
        shuffle: Whether the order is drawn anew each epoch.
        drop_last: Whether a last batch that is not full is left out.

    Raises:
        ValueError: No batch: fewer samples than one takes, or ``batch_size`` is no number of them.
    """
    dataset = TensorDataset(*tensors)
    batch_size = check_count("tensor_loader", "batch_size", batch_size)
    if len(dataset) < (batch_size if drop_last else 1):
        raise ValueError(
            f"tensor_loader: tensors must fill a batch of {batch_size}, got {len(dataset)}"
        )
    order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(dataset, None, sampler=BatchSampler(order, batch_size, drop_last))
