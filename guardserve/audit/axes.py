"""Which inputs of an example have the batch as their first axis, where their lengths alone do not tell."""

from __future__ import annotations

import itertools

from guardserve.audit.comparison import sample_of, shapes_of, tolerance, whole, worst_difference
from guardserve.audit.examples import Example, middle
from guardserve.audit.workbench import Workbench
from guardserve.nonfinite import named_tensors

_MOST_DOUBTFUL = 4


def settled(bench: Workbench, example: Example) -> Example:
    """Find out which inputs are the same for all samples though they are as long as the batch.

    Class weights may happen to be as many as the rows. With the first row alone the model gives that row's output
    again if it keeps all of them, and not if it keeps only the first one.

    Args:
        bench: The model.
        example: Its input, in which every tensor as long as the batch counts as one with a batch axis.

    Returns:
        The example, with as many batch axes as explain what the model gives.
    """
    doubtful = sorted(example.batched)[1 : 1 + _MOST_DOUBTFUL]
    given = bench.run(example.args, example.kwargs) if doubtful else None
    if given is None or given.error:
        return example
    for count in range(len(doubtful) + 1):
        for shared in itertools.combinations(doubtful, count):
            candidate = example.sharing(shared)
            if _explains(bench, candidate, given.output):
                return candidate
    return example


def _explains(bench: Workbench, example: Example, given: object) -> bool:
    """Tell whether the first row's output is the same in a batch of another size."""
    single = example.rows == 1
    run = bench.run(*(example.among(2, 0) if single else example.take([0])).call)
    if run.error:
        return False
    small, large = (given, run.output) if single else (run.output, given)
    place, rows = (middle(2), 2) if single else (0, example.rows)
    allowed = tolerance({tensor.dtype for _, tensor in named_tensors(small)}, same_size=False)
    sample = list(sample_of(large, place, rows, shapes_of(small)))
    difference = worst_difference(sample, whole(small), allowed, labels=True)
    return difference is not None and not difference.is_real
