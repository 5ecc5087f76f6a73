"""llama.engine.blocks by itself: names, references, what stays, what goes first, what lies side by side."""

import itertools
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llama.engine.blocks import BlockPool, block_digest, root_digest

SIZE = 4


def chain(ids, salt="", edits=""):
    """The names of the full blocks of `ids`."""
    names = [root_digest(salt, edits)]
    for first in range(0, len(ids) - len(ids) % SIZE, SIZE):
        names.append(block_digest(names[-1], array("q", ids[first:first + SIZE])))
    return names[1:]


def hold_published(pool, names):
    """New blocks that bear these names, held once."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names):
        pool.publish(block, name)
    return blocks


def num_runs(table):
    """Groups of neighbouring blocks."""
    return 1 + sum(after != before + 1 for before, after in itertools.pairwise(table))


# ---- names -------------------------------------------------------------------------------------------------


def test_a_block_is_named_by_everything_before_it():
    assert chain([1, 2, 3, 4, 5, 6, 7, 8])[0] == chain([1, 2, 3, 4, 9, 9, 9, 9])[0]
    assert chain([1, 2, 3, 4, 5, 6, 7, 8])[1] != chain([0, 2, 3, 4, 5, 6, 7, 8])[1]
    assert chain([1, 2, 3, 4, 5, 6, 7, 8])[1] != chain([5, 6, 7, 8])[0]


def test_salts_and_edits_never_share_a_name():
    roots = [("", ""), ("a", ""), ("", "a"), ("a", "a"), ("aa", ""), ("', '", ""), ("", "', '")]
    names = [chain([1, 2, 3, 4], *root)[0] for root in roots]
    assert len(set(names)) == len(roots)


def test_ids_beyond_32_bits_do_not_wrap():
    assert chain([2**32, 0, 0, 0]) != chain([0, 0, 0, 0])


# ---- prefixes ----------------------------------------------------------------------------------------------


def test_the_longest_published_prefix_is_found():
    pool = BlockPool(8, SIZE)
    names = chain(range(16))
    blocks = hold_published(pool, names[:3])
    assert pool.match(names) == blocks
    assert pool.match([names[0], names[2]]) == blocks[:1] + blocks[2:]  # the chain is the caller's affair
    assert pool.match([names[3], *names]) == []


def test_what_is_published_twice_stays_with_the_first():
    pool = BlockPool(8, SIZE)
    names = chain(range(4))
    first, second = hold_published(pool, names), hold_published(pool, names)
    assert pool.match(names) == first
    pool.release(second)
    assert pool.num_available == 7 and pool.match(names) == first
    pool.check([first])


def test_a_block_keeps_its_first_name():
    pool = BlockPool(2, SIZE)
    names = chain(range(8))
    [block] = hold_published(pool, names[:1])
    pool.publish(block, names[1])
    assert pool.match(names[1:]) == []
    pool.check([[block]])


def test_released_blocks_are_found_until_their_room_is_needed():
    pool = BlockPool(4, SIZE)
    names = chain(range(12))
    blocks = hold_published(pool, names)
    pool.release(blocks)
    assert pool.num_available == 4 and pool.num_held == 0
    assert pool.match(names) == blocks and pool.num_kept(blocks) == 3
    pool.hold(blocks)
    assert pool.num_available == 1 and pool.num_kept(blocks) == 0
    pool.release(blocks)
    pool.allocate(4)
    assert pool.match(names) == []
    pool.check([range(4)])


def test_a_block_without_a_name_is_free_at_once():
    pool = BlockPool(4, SIZE)
    pool.release(pool.allocate(4))
    pool.check([])
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


# ---- eviction ----------------------------------------------------------------------------------------------


def test_leaves_go_before_what_they_hang_on():
    pool = BlockPool(4, SIZE)
    names = chain(range(16))
    pool.release(hold_published(pool, names))
    for left in (3, 2, 1, 0):
        pool.allocate(1)
        assert len(pool.match(names)) == left


def test_the_least_recently_used_goes_first():
    pool = BlockPool(6, SIZE)
    old, new, used = (chain([first] * 8) for first in (1, 2, 3))
    for names in (used, old, new):
        pool.release(hold_published(pool, names))
    again = pool.match(used)
    pool.hold(again)
    pool.release(again)
    for expected in ([1, 2, 2], [0, 2, 2], [0, 1, 2], [0, 0, 2], [0, 0, 1]):
        pool.allocate(1)
        assert [len(pool.match(names)) for names in (old, new, used)] == expected


def test_a_shared_beginning_outlives_its_leaves():
    pool = BlockPool(4, SIZE)
    trunk, leaves = chain(range(8)), [chain([*range(8), *leaf])[2:] for leaf in ([0] * 4, [1] * 4)]
    first = hold_published(pool, trunk + leaves[0])
    pool.hold(first[:2])
    second = first[:2] + hold_published(pool, leaves[1])
    pool.release(second)
    pool.release(first)
    pool.allocate(2)
    assert pool.match(trunk) == first[:2]
    assert pool.match(leaves[0]) == pool.match(leaves[1]) == []


def test_held_blocks_are_never_evicted():
    pool = BlockPool(4, SIZE)
    held, kept = chain([1] * 8), chain([2] * 8)
    blocks = hold_published(pool, held)
    pool.release(hold_published(pool, kept))
    assert set(pool.allocate(2)).isdisjoint(blocks)
    assert pool.match(held) == blocks
    with pytest.raises(AssertionError, match="1 blocks asked for, 0 available"):
        pool.allocate(1)


# ---- references --------------------------------------------------------------------------------------------


def test_shared_means_more_than_one_holder():
    pool = BlockPool(2, SIZE)
    [block] = pool.allocate(1)
    assert not pool.is_shared(block)
    pool.hold([block])
    assert pool.is_shared(block)
    pool.release([block])
    assert not pool.is_shared(block) and pool.num_held == 1


def test_releasing_more_often_than_holding_is_noticed():
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often than held"):
        pool.release(blocks)


def test_the_check_notices_lost_and_doubled_blocks():
    pool = BlockPool(4, SIZE)
    table = pool.allocate(2)
    pool.check([table])
    for wrong in ([], [table, table], [table[:1]], [[*table, *table]], [[*table, 3]]):
        with pytest.raises(AssertionError):
            pool.check(wrong)


# ---- neighbours --------------------------------------------------------------------------------------------


def test_a_sequence_growing_alone_is_one_run():
    pool = BlockPool(64, SIZE)
    table = pool.allocate(3)
    while pool.num_available:
        table += pool.allocate(1, table[-1])
    assert table == list(range(64))


def test_sequences_growing_together_are_mostly_contiguous():
    pool = BlockPool(64, SIZE)
    tables = [pool.allocate(2), pool.allocate(2)]
    for step in range(40):
        tables[step % 2] += pool.allocate(1, tables[step % 2][-1])
    assert max(map(num_runs, tables)) == 1
    tables += [pool.allocate(2)]
    for step in range(12):
        tables[step % 3] += pool.allocate(1, tables[step % 3][-1])
    assert max(map(num_runs, tables)) <= 2


def test_evicted_neighbours_are_one_run_again():
    pool = BlockPool(64, SIZE)
    pool.release(hold_published(pool, chain(range(64 * SIZE))))
    assert num_runs(pool.allocate(16)) == 1


def test_a_prompt_whose_neighbour_is_taken_goes_where_most_room_is():
    pool = BlockPool(16, SIZE)
    blocks = pool.allocate(16)
    pool.release([blocks[3]])
    pool.release(blocks[8:14])
    assert pool.allocate(3, after=blocks[2])[0] == blocks[3]  # beside it as far as that goes
    assert set(pool.allocate(2, after=blocks[5])) <= set(blocks[8:14])


# ---- everything at once ------------------------------------------------------------------------------------


class Pool(RuleBasedStateMachine):
    """Any order of allocate, hold, publish and release against plain counting."""

    @initialize(num_blocks=st.integers(1, 12))
    def begin(self, num_blocks):
        self.pool, self.tables, self.names = BlockPool(num_blocks, SIZE), [], itertools.count()

    @rule(count=st.integers(1, 4), grow=st.booleans())
    def allocate(self, count, grow):
        if count > self.pool.num_available:
            return
        table = self.tables.pop() if grow and self.tables else []
        self.tables.append(table + self.pool.allocate(count, table[-1] if table else None))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99), length=st.integers(0, 9))
    def share(self, which, length):
        shared = self.tables[which % len(self.tables)][:length]
        self.pool.hold(shared)
        self.tables.append(list(shared))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def publish(self, which):
        for block in self.tables[which % len(self.tables)]:
            self.pool.publish(block, b"%d" % next(self.names))

    @rule(which=st.integers(0, 99))
    def find(self, which):
        found = self.pool.match([b"%d" % which])
        self.pool.hold(found)
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 99))
    def release(self, which):
        self.pool.release(self.tables.pop(which % len(self.tables)))

    def teardown(self):
        if hasattr(self, "pool"):
            held = {block for table in self.tables for block in table}
            self.pool.check(self.tables)
            assert self.pool.num_held == len(held)
            for table in self.tables:
                self.pool.release(table)
            assert self.pool.num_available == self.pool.num_blocks
            self.pool.check([])


Pool.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
test_the_pool_in_any_order = Pool.TestCase
