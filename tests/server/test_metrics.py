"""server.metrics, read by prometheus_client's parser."""

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import metrics as module
from server.metrics import Counter, Gauge, Histogram, Metrics, Stopwatch
from server.supervisor import Supervisor
from tests.server.scripted import spec

SNAPSHOT = Supervisor(spec()).snapshot() | {
    "state": "ready", "running": 3, "waiting": 2, "cache_usage": 0.25, "prompt_tokens": 70,
    "cached_tokens": 48, "generated_tokens": 11, "num_steps": 5, "num_engines": 2, "heartbeat_age": 0.5}


def families(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(family):
    """Sample name and labels, without those that all have, to value."""
    return {(sample.name, *(text for label, text in sample.labels.items() if label != "model_name")):
            sample.value for sample in family.samples}


def rendered(*metrics):
    lines = [line for metric in metrics for line in metric.lines({"model_name": "m"})]
    return families("\n".join(lines) + "\n")


def test_a_parser_reads_all_of_it():
    metrics = Metrics("llama3_1_8b_instruct")
    metrics.successes.inc(finished_reason="stop")
    metrics.failures.inc(reason="lost")
    metrics.responses.inc(method="GET", route="/health", status="200")
    metrics.connections.add(2)
    metrics.first_token.observe(0.3)
    text = metrics.render(SNAPSHOT)
    assert text.endswith("\n") and "\n\n" not in text
    read = families(text)
    types = {name.removeprefix("llama:"): family.type for name, family in read.items()}
    assert types == {
        **dict.fromkeys(["request_success", "request_failure", "http_responses", "prefix_cache_queries",
                         "prefix_cache_hits", "prompt_tokens", "generation_tokens", "engine_steps",
                         "engine_starts"], "counter"),
        **dict.fromkeys(["http_connections", "num_requests_running", "num_requests_waiting",
                         "kv_cache_usage_perc", "engine_heartbeat_age_seconds", "engine_state"], "gauge"),
        **dict.fromkeys(["time_to_first_token_seconds", "request_time_per_output_token_seconds",
                         "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prompt_tokens",
                         "request_generation_tokens"], "histogram")}
    assert all(family.documentation for family in read.values())
    assert all(sample.labels["model_name"] == "llama3_1_8b_instruct"
               for family in read.values() for sample in family.samples)
    single = {name.removeprefix("llama:"): family.samples[0].value
              for name, family in read.items() if len(family.samples) == 1}
    assert single == {
        "request_success": 1, "request_failure": 1, "http_responses": 1, "http_connections": 2,
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries": 70, "prefix_cache_hits": 48, "prompt_tokens": 70, "generation_tokens": 11,
        "engine_steps": 5, "engine_starts": 2, "engine_heartbeat_age_seconds": 0.5}
    assert {sample.labels["state"]: sample.value for sample in read["llama:engine_state"].samples} == {
        "loading": 0, "ready": 1, "draining": 0, "lost": 0, "failed": 0}


def test_counters_and_gauges_have_a_value_for_each_combination_of_labels():
    counter, gauge = Counter("a_total", "A.", ["x", "y"]), Gauge("b", "B.")
    counter.inc(x="1", y="2")
    counter.inc(2.5, y="2", x="1")
    counter.inc(x="2", y="1")
    gauge.add()
    gauge.add(-3)
    read = rendered(counter, gauge)
    assert values(read["a"]) == {("a_total", "1", "2"): 3.5, ("a_total", "2", "1"): 1}
    assert values(read["b"]) == {("b",): -2}


def test_a_metric_without_labels_is_there_from_the_beginning():
    read = rendered(Counter("a_total", "A."), Gauge("b", "B."), Histogram("c", "C.", [1]),
                    Counter("d_total", "D.", ["x"]))
    assert values(read["a"]) == {("a_total",): 0}
    assert values(read["b"]) == {("b",): 0}
    assert values(read["c"]) == {
        ("c_bucket", "1"): 0, ("c_bucket", "+Inf"): 0, ("c_sum",): 0, ("c_count",): 0}
    assert values(read["d"]) == {}


def test_a_histogram_counts_up_to_each_bound():
    histogram = Histogram("h", "H.", (0.1, 1, 10))
    for value in (0.05, 0.1, 0.2, 1, 5, 100, 1000):  # a bound belongs to what is below it
        histogram.observe(value)
    assert values(rendered(histogram)["h"]) == {
        ("h_bucket", "0.1"): 2, ("h_bucket", "1"): 4, ("h_bucket", "10"): 5, ("h_bucket", "+Inf"): 7,
        ("h_sum",): pytest.approx(1106.35), ("h_count",): 7}


def test_what_labels_and_help_contain_is_escaped():
    odd = 'a"b\\c\nd{e}=,\\n ü'
    counter = Counter("a_total", 'One "line"\nand \\ another.', ["x"])
    counter.inc(x=odd)
    read = rendered(counter)["a"]
    assert values(read) == {("a_total", odd): 1}
    assert read.documentation == 'One "line"\nand \\ another.'


def test_misuse_is_an_error():
    counter = Counter("a_total", "A.", ["x"])
    for labels in ({}, {"y": "1"}, {"x": "1", "y": "1"}):
        with pytest.raises(ValueError, match=r"^a_total has the labels \('x',\), not"):
            counter.inc(**labels)
    with pytest.raises(ValueError, match="^a_total is a counter and cannot shrink by 1$"):
        counter.inc(-1, x="1")


def test_nothing_is_lost_between_threads():
    counter, histogram = Counter("a_total", "A.", ["x"]), Histogram("h", "H.", (1,))

    def work():
        for number in range(2000):
            counter.inc(x=str(number % 2))
            histogram.observe(number % 4)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        got = values(rendered(histogram)["h"])  # one moment's: the parts of it agree
        assert got["h_bucket", "+Inf"] == got["h_count",]
    read = rendered(counter, histogram)
    assert values(read["a"]) == {("a_total", "0"): 8000, ("a_total", "1"): 8000}
    assert values(read["h"]) == {("h_bucket", "1"): 8000, ("h_bucket", "+Inf"): 16000, ("h_sum",): 24000,
                                 ("h_count",): 16000}


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def sums(metrics):
    read = families(metrics.render(SNAPSHOT))
    return {name.removeprefix("llama:"): (values(family)[f"{name}_count",], values(family)[f"{name}_sum",])
            for name, family in read.items() if family.type == "histogram"}


def test_the_times_of_a_request(clock):
    metrics = Metrics("m")
    watch = Stopwatch(metrics)
    for now, num_tokens in ((103, 0), (104, 1), (105, 1), (110, 2)):
        clock.now = now
        watch.progress(num_tokens, began=101.0)
    clock.now = 150
    assert (watch.elapsed, watch.queued, watch.first_token, watch.num_tokens) == (50, 1, 4, 4)
    watch.succeed("length", num_prompt_tokens=9)
    assert sums(metrics) == {
        "request_queue_time_seconds": (1, 1), "time_to_first_token_seconds": (1, 4),
        "request_time_per_output_token_seconds": (1, 2), "e2e_request_latency_seconds": (1, 10),
        "request_prompt_tokens": (1, 9), "request_generation_tokens": (1, 4)}
    read = families(metrics.render(SNAPSHOT))
    assert values(read["llama:request_success"]) == {("llama:request_success_total", "length"): 1}


def test_a_request_of_one_token_has_no_time_per_token(clock):
    metrics = Metrics("m")
    watch = Stopwatch(metrics)
    clock.now += 2
    watch.progress(1, began=clock.now - 3)  # in a step that was under way when it arrived
    watch.succeed("stop", num_prompt_tokens=1)
    assert sums(metrics)["request_time_per_output_token_seconds"] == (0, 0)
    assert sums(metrics)["request_queue_time_seconds"] == (1, 0)
    assert sums(metrics)["time_to_first_token_seconds"] == (1, 2)


@pytest.mark.parametrize(("progress", "entered"), [
    ([], []), ([0], ["request_queue_time_seconds"]),
    ([0, 1], ["request_queue_time_seconds", "time_to_first_token_seconds"])])
def test_a_request_that_fails_enters_what_it_came_to(progress, entered):
    metrics = Metrics("m")
    watch = Stopwatch(metrics)
    for num_tokens in progress:
        watch.progress(num_tokens, 0.0)
    watch.fail("cancelled")
    assert sorted(name for name, (count, _) in sums(metrics).items() if count) == entered
    read = families(metrics.render(SNAPSHOT))
    assert values(read["llama:request_failure"]) == {("llama:request_failure_total", "cancelled"): 1}
    assert values(read["llama:request_success"]) == {}
