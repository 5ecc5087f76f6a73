"""llama.engine.runs against a set of blocks and a search through it."""

from hypothesis import given
from hypothesis import strategies as st

from llama.engine.runs import FreeRuns


def runs_of(blocks):
    """Neighbours grouped, as (first, behind the last)."""
    firsts = [block for block in sorted(blocks) if block - 1 not in blocks]
    ends = [block + 1 for block in sorted(blocks) if block + 1 not in blocks]
    return list(zip(firsts, ends))


@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 99)), max_size=60))
def test_any_order_of_taking_and_giving_back(num_blocks, moves):
    free, blocks = FreeRuns(num_blocks), set(range(num_blocks))
    for is_taken, which in moves:
        taken = sorted(set(range(num_blocks)) - blocks)
        if is_taken and blocks:
            block = sorted(blocks)[which % len(blocks)]
            [first] = [first for first, end in runs_of(blocks) if first <= block < end]
            free.take(first, block)
            blocks.remove(block)
        elif not is_taken and taken:
            block = taken[which % len(taken)]
            free.add(block)
            blocks.add(block)
        assert len(free) == len(blocks) and sorted(free) == sorted(blocks)
        begins = [block for block in range(num_blocks + 1) if free.begins_with(block)]
        assert begins == [first for first, _ in runs_of(blocks)]
        if blocks:
            first, end = free.longest()
            assert (first, end) in runs_of(blocks)
            assert (end - first, -first) == max((end - first, -first) for first, end in runs_of(blocks))


def test_a_pool_of_no_blocks_has_no_runs():
    assert len(FreeRuns(0)) == 0 and not FreeRuns(0).begins_with(0)
