"""The metrics page, read back by Prometheus' own parser."""

from prometheus_client.parser import text_string_to_metric_families

from sana.serving.engine import EngineStats
from sana.serving.metrics import COUNTERS, GAUGES, Metrics


def test_every_number_of_the_engine_is_shown_under_its_name():
    numbers = {name: index + 1 for index, name in enumerate((*GAUGES, *COUNTERS))}
    metrics = Metrics(lambda: EngineStats(**numbers))
    metrics.answered("/a", 200, 0.2)
    metrics.answered("/a", 429, 3.0)
    page, kind = metrics.page()
    assert kind.startswith("text/plain")
    samples = {
        (sample.name, sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }
    assert all(samples[f"sana_{name}", None] == numbers[name] for name in GAUGES)
    assert all(samples[f"sana_{name}_total", None] == numbers[name] for name in COUNTERS)
    assert samples["sana_requests_total", "429"] == 1 and samples["sana_request_seconds_count", None] == 2
    assert set(numbers) == set(EngineStats.__dataclass_fields__)
