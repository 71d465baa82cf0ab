"""batches: rows of tokens -> which of them go through a model together, padded to the longest."""

from collections.abc import Iterator, Mapping


def batches(lengths: Mapping[int, int], max_tokens: int) -> Iterator[list[int]]:
    """Keys of `lengths`, the longest first: memory runs out at once or never. Ties stay in order.

    A batch has at most max_tokens, padding included, or one row.
    """
    batch: list[int] = []
    for place in sorted(lengths, key=lambda place: -lengths[place]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
