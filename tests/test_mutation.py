"""tests.mutation is run by hand; here only that its faults can be made, and that it tells caught from not."""

from tests.mutation import FAULTS, TESTS, mutated, run_tests


def test_every_fault_is_still_where_it_says():
    for fault in FAULTS:
        source = mutated(fault)
        if fault.file.endswith(".py"):
            compile(source, fault.file, "exec")
        assert fault.file in TESTS
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)


def test_a_fault_is_caught_and_the_right_code_is_not():
    [fault] = [fault for fault in FAULTS if fault.what == "a reference is not dropped"]
    tests = ("engine/test_scheduler.py",)
    right, wrong = run_tests(tests), run_tests(tests, fault.file, mutated(fault))
    assert right.is_sound and not right.failed, right.output
    assert wrong.is_sound and wrong.failed, wrong.output
