"""In which order examples are seen: a function of seed and step alone, so a resumed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MEGABATCH = 32  # batches among which examples of like length are brought together


def seed_of(seed: int, step: int, rank: int) -> int:
    """What random numbers of this step, such as dropout, begin with."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


class Order:
    """The global batch of every step. Each epoch is a new permutation; its incomplete last batch is left out.

    With `lengths`, each batch holds examples of like length, so little is padded, and batches come in random order.
    Raises ValueError where there are fewer examples than one batch needs.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None):
        if num_examples < batch_size:
            raise ValueError(
                f"{num_examples} usable examples are fewer than one global batch of {batch_size} "
                "(ranks x batch_size x accumulate_steps); lower optim.batch_size or add data"
            )
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.batches_per_epoch = num_examples // batch_size
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    def _epoch_batches(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng((self.seed, epoch))
        permutation = generator.permutation(self.num_examples)
        if self.lengths is not None:
            size = self.batch_size * MEGABATCH
            chunks = [permutation[start : start + size] for start in range(0, self.num_examples, size)]
            permutation = np.concatenate([chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks])
        count = self.batches_per_epoch
        batches = list(permutation[: count * self.batch_size].reshape(count, self.batch_size))
        if self.lengths is not None:
            batches = [batches[i] for i in generator.permutation(count)]
        return batches

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of this step's global batch."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._epoch_batches(epoch)
        return [int(index) for index in self._batches[position]]
