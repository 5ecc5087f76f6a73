"""Blocks of the KV cache: who holds which, and which already hold a known prefix. No torch: numbers only.

A block is `block_size` consecutive positions. Blocks are counted by reference, because sequences share them: the
samples of one prompt, and every prompt that begins like another. A full block whose content is known is
*published* under the digest of all ids up to its end; as long as nobody needs the room, it stays after its last
holder has left, and the next prompt with the same beginning takes it instead of computing it again.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from llama.engine.runs import FreeRuns


def root_digest(salt: str = "", edits: str = "") -> bytes:
    """Where a chain of digests begins. Different salts or edits never share a block."""
    return hashlib.sha256(repr((salt, edits)).encode()).digest()


def block_digest(parent: bytes, ids: array) -> bytes:
    """The name of a block: its own ids (64-bit integers), after everything before them."""
    return hashlib.sha256(parent + ids.tobytes()).digest()


class BlockPool:
    """A fixed number of blocks, each free, held (references > 0), or kept only for its content.

    Kept blocks leave in the order of their last use. Holders release a table from its end, so a chain of kept
    blocks goes leaf by leaf and never leaves one that cannot be reached.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = FreeRuns(num_blocks)
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # unreferenced but published, least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones, and those kept only for their content."""
        return len(self._free) + len(self._kept)

    @property
    def num_held(self) -> int:
        """Blocks that somebody refers to."""
        return self.num_blocks - self.num_available

    def is_shared(self, block: int) -> bool:
        """Whether writing into the block would change it for another holder."""
        return self._references[block] > 1

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The published blocks for the longest prefix of the chain; no reference is taken."""
        blocks = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_kept(self, blocks: Sequence[int]) -> int:
        """How many of these are kept only for their content: holding them makes so many unavailable."""
        return sum(self._references[block] == 0 for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Take one more reference to each."""
        for block in blocks:
            self._references[block] += 1
            self._kept.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Give one reference to each back. The last one frees the block, or keeps it if it is published."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released more often than held"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digests[block] is None:
                    self._free.add(block)
                else:
                    self._kept[block] = None

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Hold `count` blocks of nobody's content, next to block `after` and to each other where that is free.

        The caller has seen to it that num_available suffices.
        """
        assert count <= self.num_available, f"{count} blocks asked for, {self.num_available} available"
        blocks: list[int] = []
        for _ in range(count):
            if not self._free:
                self._evict(count - len(blocks))
            if after is not None and self._free.begins_with(after + 1):
                first = block = after + 1
            else:
                first, block = self._roomiest()
            self._free.take(first, block)
            self._references[block] = 1
            blocks.append(block)
            after = block
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable. If another block already has this content, that one stays."""
        if digest not in self._published and self._digests[block] is None:
            self._published[digest] = block
            self._digests[block] = digest

    def _evict(self, at_least: int) -> None:
        """Free kept blocks, some at once: neighbours that were one sequence become one free run again."""
        for _ in range(min(len(self._kept), max(at_least, self.num_blocks // 32))):
            block, _ = self._kept.popitem(last=False)
            del self._published[self._digests[block]]
            self._digests[block] = None
            self._free.add(block)

    def _roomiest(self) -> tuple[int, int]:
        """Where a sequence that cannot go on beside its last block should: the start of the longest free run, or
        the middle of it, if the block before belongs to somebody who may want to grow. Returns (the run's first
        block, the place in it)."""
        first, end = self._free.longest()
        neighbour_may_grow = first > 0 and self._references[first - 1] > 0
        return first, first + ((end - first) // 2 if neighbour_may_grow else 0)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books agree with the block tables of all who hold blocks."""
        counted = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
            for block in table:
                counted[block] += 1
        assert counted == self._references, "reference counts differ from the tables"
        held = {block for block, references in enumerate(counted) if references}
        free = set(self._free)
        assert len(held) + len(self._free) + len(self._kept) == self.num_blocks, "blocks are lost or counted twice"
        assert held | free | self._kept.keys() == set(range(self.num_blocks)), "blocks are lost"
        published = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert published == self._published, "a block is findable under another name than its own"
        assert free.isdisjoint(published.values()), "a free block is still published"
        assert self._kept.keys() <= set(published.values()), "a block is kept without a name to find it by"
