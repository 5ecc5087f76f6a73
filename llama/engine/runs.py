"""The free blocks of a pool, as runs of neighbours. No torch: numbers only."""

from collections.abc import Iterator


class FreeRuns:
    """Free blocks by the runs that they form: taking one and giving one back need no walk over the others."""

    def __init__(self, num_blocks: int):
        self._ends = {0: num_blocks} if num_blocks else {}  # by a run's first block, the block after its last one
        self._firsts = {end: first for first, end in self._ends.items()}
        self._count = num_blocks

    def __len__(self) -> int:
        """How many blocks are free."""
        return self._count

    def __iter__(self) -> Iterator[int]:
        """Every free block, run by run."""
        for first, end in self._ends.items():
            yield from range(first, end)

    def begins_with(self, block: int) -> bool:
        """Whether a run begins with this block; so does every free block behind one that is not free."""
        return block in self._ends

    def longest(self) -> tuple[int, int]:
        """The first block of the longest run, and the block after its last one; of equals, those that come first."""
        return max(self._ends.items(), key=lambda run: (run[1] - run[0], -run[0]))

    def add(self, block: int) -> None:
        """Free a block, which joins the runs on both its sides."""
        first = self._firsts.pop(block, block)
        self._enter(first, self._ends.pop(block + 1, block + 1))
        self._count += 1

    def take(self, first: int, block: int) -> None:
        """Take a block out of the run that begins with `first`."""
        end = self._ends.pop(first)
        del self._firsts[end]
        if first < block:
            self._enter(first, block)
        if block + 1 < end:
            self._enter(block + 1, end)
        self._count -= 1

    def _enter(self, first: int, end: int) -> None:
        self._ends[first] = end
        self._firsts[end] = first
