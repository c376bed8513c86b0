"""The text that Prometheus reads."""

from cabochon.serve.metrics import Counter, Gauge, Histogram, Metrics


def test_a_histogram_counts_from_below() -> None:
    histogram = Histogram("Seconds.", (0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 3.0):
        histogram.observe(value)
    assert histogram.lines("x") == [
        "# HELP x Seconds.",
        "# TYPE x histogram",
        'x_bucket{le="0.1"} 2',
        'x_bucket{le="1.0"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 3.65",
        "x_count 4",
    ]


def test_labels_are_escaped() -> None:
    counter = Counter("Requests.")
    counter.add(route='a"b\\c\nd', status="200")
    counter.add(2, status="200", route='a"b\\c\nd')
    assert counter.lines("x")[2:] == ['x{route="a\\"b\\\\c\\nd",status="200"} 3']


def test_large_counts_keep_every_digit() -> None:
    counter = Counter("Tokens.")
    counter.add(12_345_678_901)
    assert counter.lines("x")[2] == "x 12345678901"


def test_gauges_are_looked_up() -> None:
    metrics = Metrics()
    metrics.gauges["requests_running"] = Gauge("Running.", lambda: 7)
    assert "cabochon_requests_running 7\n" in metrics.text()
