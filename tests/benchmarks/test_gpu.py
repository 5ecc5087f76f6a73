"""The run of a lent GPU: steps in order, within the time, each on paper as soon as it has ended; and the table of goals."""

import json

import pytest

from benchmarks import gpu
from benchmarks.gpu import GOALS, STEPS, Step, last_json, main, run, run_all, table

SAYS = "import json; print('a table'); print(json.dumps({'machine': {'gpu': 'a card'}, 'is': 1}))"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Steps that stand in for benchmarks: a module each, for `python -m`."""
    folder = tmp_path_factory.mktemp("programs")
    for name, text in {"says": SAYS, "fails": "raise SystemExit('broken')", "sleeps":
                       "import subprocess; print('so far', flush=True); subprocess.run(['sleep', '20'])", "writes": "open('checkpoint', 'w').close()"}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def among_programs(programs, monkeypatch):
    monkeypatch.chdir(programs)
    (programs / "checkpoint").unlink(missing_ok=True)
    monkeypatch.setattr(gpu, "CHECKPOINT", programs / "checkpoint")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_gives_its_json_and_its_exit_code():
    line = run(Step("one", ("says",), 60), 60)
    assert (line["rc"], line["result"]["is"]) == (0, 1) and line["tail"].startswith("a table")
    line = run(Step("two", ("fails",), 60), 60)
    assert (line["rc"], line["result"]) == (1, None) and "broken" in line["tail"]


def test_a_step_past_its_limit_is_ended_and_what_it_printed_kept():
    line = run(Step("slow", ("sleeps",), 3), 60)
    assert (line["rc"], line["result"]) == (124, None) and "so far" in line["tail"] and line["seconds"] < 15  # its child too


def test_every_line_is_in_the_file_before_the_next_step(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    seen = []
    monkeypatch.setattr(gpu, "run", lambda step, left: seen.append(len(lines_of(out)) if out.exists() else 0)
                        or {"step": step.name, "rc": 0, "seconds": 1, "result": None, "tail": ""})
    assert run_all(STEPS[:3], out, 600) == [] and seen == [0, 1, 2]


def test_what_no_time_is_left_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 30)
    assert run_all(STEPS, tmp_path / "out.jsonl", 10) == [step.name for step in STEPS]


def test_files_are_written_before_the_first_step_that_reads_them(tmp_path):
    out = tmp_path / "out.jsonl"
    steps = [Step("a", ("says",), 60), Step("b", ("says",), 60, reads=True), Step("c", ("says",), 60, reads=True)]
    run_all(steps, out, 600, write=Step("write", ("writes",), 60))
    assert [line["step"] for line in lines_of(out)] == ["a", "write", "b", "c"]


def test_only_a_whole_object_at_the_end_is_a_result():
    assert last_json('x\n{"a": 1}\n') == {"a": 1}
    assert last_json("x") is last_json("{broken") is last_json("") is last_json('{"a": 1}\nTraceback') is None


def test_a_figure_that_is_not_there_is_never_written():
    assert table([]).count("not yet measured") == len(GOALS)
    broken = table([{"step": "decode", "rc": 124, "result": None}])
    assert broken.count("the step ended with 124") == 3
    late = {"step": "prefill", "rc": 1, "result": {"lengths": {}}}  # it printed, and yet went wrong
    assert "the step ended with 1" in table([late])


def one(value):
    return {"median": value, "min": value - 0.1, "max": value + 0.1}


RESULTS = {
    "decode": {"machine": {"gpu": "a card"}, "prompt": 512, "formats": {
        name: {"share": one(share), "bandwidth": one(4e12), "tokens_per_second": one(rate)}
        for name, share, rate in (("bf16", 0.86, 230), ("int8", 0.7, 300), ("int4", 0.55, 400))}},
    "long": {"prompt": 130000, "formats": {"bf16": {
        "share": one(0.5), "bandwidth": one(4e12), "tokens_per_second": one(90), "prompt_seconds": one(11)}}},
    "prefill": {"arithmetic": {"bfloat16": 8e14}, "lengths": {"8192": {
        "bf16": {"share": 0.7, "tokens_per_second": one(30000)}}}},
    "offline": {"formats": {"bf16": {"128": {"tokens_per_second": 8000, "share": 0.5},
                                     "256": {"tokens_per_second": 9500, "share": 0.4}}}},
    "offline-fp8": {"formats": {"fp8": {"256": {"tokens_per_second": 12000, "share": 0.4}}}},
    "compare": {"decode": {"ratios": {"bf16": {"transformers bf16": one(5), "transformers bf16, compiled": one(1.2)}}}},
    "serving": {"closed": {"cost": {"http": {"rate": one(0.96)}}}},
    "deterministic": {"deterministic": {"prefill of 512": one(1.3), "decode, 1 sequence": one(1.0)}},
    "loading": {"formats": {"bf16": {"total": one(4.5)}}},
    "trace": {"captures": {"no plan": {"cost": 1}, "one site": {"cost": 1.001}, "all resid_post": {"cost": 1.06}}},
}
EXPECTED = [
    "86% of 4.00 TB/s, 230 tokens/s | yes", "70% of 4.00 TB/s, 300 tokens/s | no", "55% of 4.00 TB/s, 400 tokens/s | yes",
    "5.00 × (4.90 to 5.10) | yes", "1.20 × (1.10 to 1.30) | yes", "50% of 4.00 TB/s, 90 tokens/s | no",
    "70% of 800 TFLOP/s, 30000 tokens/s | yes", "11.0 s for 130,000 tokens | yes",
    "9,500 tokens/s, 256 at once, 40% of what the hardware allows | yes",
    "12,000 tokens/s, 256 at once, 40% of what the hardware allows | no", "96.0% (86.0% to 106.0%) | yes",
    "prefill of 512: 1.30 × the time, decode, 1 sequence: 1.00 × the time | no", "4.5 s (4.4 to 4.6) | yes",
    "one site: 1.001 × a step, all resid_post: 1.060 × a step | no",
]


def test_the_table_says_what_was_reached_and_whether_it_is_enough(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    lines = [{"step": "decode", "rc": 124, "result": None}]  # an earlier run, which a later one replaces
    lines += [{"step": name, "rc": 0, "result": result} for name, result in RESULTS.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["--table", str(path)])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(GOALS) == len(EXPECTED)
    for row, expected in zip(rows, EXPECTED):
        assert row.endswith(f"{expected} |"), row
    assert "Measured on: a card." in printed


def test_an_unknown_step_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--out", "x", "--only", "decode,nothing"])
    assert "there is no step 'nothing'" in capsys.readouterr().err


def test_every_goal_has_a_step_and_every_step_ends_in_json():
    assert {goal.step for goal in GOALS} <= {step.name for step in STEPS}
    for step in STEPS:
        assert step.arguments[0] == "pytest" or step.arguments[-1] == "--json"
