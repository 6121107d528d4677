"""Batches whose order and random numbers depend on a seed and their number alone.

So a run that goes on from a checkpoint, and one spread over processes, sees the same batches as one
process that was never interrupted, with any number of workers.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

Loader = DataLoader[Any]


class Batch(NamedTuple):
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

    Raises:
        TypeError: ``loader`` is no ``DataLoader``.
        ValueError: It has no batch, or shares out the samples among processes itself.
    """

    def __init__(self, loader: Loader, name: str, seed: int, samples: Tensor | None = None) -> None:
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
        self.loader, self.name, self.seed, self.samples = loader, name, seed, samples
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
            self._size = self._batch_size()
            self._length = -(-len(samples) // self._size)
        if self._length == 0:
            raise ValueError(f"Trainer.fit: the {name} loader must have a batch, got none")
        self._order: tuple[int, list[Any]] = (-1, [])

    def _batch_size(self) -> int:
        loader = self.loader
        for source in (loader, loader.batch_sampler, loader.sampler):
            size = getattr(source, "batch_size", None)
            if isinstance(size, int) and not self.iterable:
                return size
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
            generator = torch.Generator().manual_seed(_entropy(key))
            rows = self.samples[torch.randperm(len(self.samples), generator=generator)]
            return [part.tolist() for part in rows.split(self._size)]
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
                    generator.manual_seed(_entropy(key))
                return list(islice(sampler, self._length))
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def samples_of(self, epoch: int) -> Tensor:
        """Indices of the samples that the sampler gives in an epoch, in ascending order, once."""
        order = self.order(epoch)
        flat = {
            i for batch in order for i in (batch if isinstance(batch, (list, tuple)) else [batch])
        }
        return torch.tensor(sorted(flat))

    def read(self, numbers: Iterable[int], skip: int = 0) -> Iterator[Batch]:
        """Batches of these numbers, one after the other; number ``per_epoch`` starts epoch 1.

        Args:
            numbers: Of an ``IterableDataset`` only how many there are counts.
            skip: Batches of an ``IterableDataset`` to read past first.

        Raises:
            RuntimeError: A sample cannot be read; the message names it.
        """
        if self.iterable:
            batches = islice(self._again(), skip, None)
            return (Batch(data, None) for _, data in zip(numbers, batches, strict=False))
        return self._read(numbers)

    def _again(self) -> Iterator[Any]:
        while True:
            empty = True
            for data in self.loader:
                empty = False
                yield data
            if empty:
                raise ValueError(f"Trainer.fit: the {self.name} loader must have a batch, got none")

    def _read(self, numbers: Iterable[int]) -> Iterator[Batch]:
        asked: list[Any] = []  # read ahead of what was given back, by the workers' prefetching

        def requests() -> Iterator[tuple[int, Any]]:
            for number in numbers:
                epoch, position = divmod(number, self._length or 1)
                samples = self.order(epoch)[position]
                asked.append(samples)
                yield _entropy((self.seed, 1, epoch, position)), samples

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
            yield Batch(data, asked.pop(0))


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


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """State of torch's, NumPy's and Python's global random numbers, of tensors and plain values.

    Args:
        device: A CUDA device, for that of its generator too.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, torch.tensor(words), gauss],
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Go back to what :func:`rng_state` gave."""
    name, keys, *rest = state["numpy"]
    version, words, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate((version, tuple(words.tolist()), gauss))
    if device is not None and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def seeded(key: tuple[int, ...]) -> Iterator[None]:
    """The CPU's random numbers follow from ``key``; on leaving they are as they were."""
    state = rng_state()
    entropy = _entropy(key)
    torch.default_generator.manual_seed(entropy)
    np.random.seed(entropy % 2**32)  # noqa: NPY002
    random.seed(entropy)
    try:
        yield
    finally:
        set_rng_state(state)


def _entropy(key: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
