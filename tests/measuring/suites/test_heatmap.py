"""The suite heatmap."""

import sklearn.metrics
from tiny_studies import measure

from latent_egc.measuring.probe_context import Place
from latent_egc.measuring.suites import heatmap


def test_heat_map_holds_every_cells_accuracy(probe_context):
    probe = probe_context("heatmap.pooling=1")
    result = measure(heatmap, probe)
    (table,) = result.tables
    assert [row[0] for row in table.rows] == list(probe.denoiser.blocks)
    chosen, held_out = None, -1.0
    for column, t in enumerate((0, 90)):
        for row in table.rows:
            score, predicted = probe.probe(Place(row[0], t, 1))
            assert row[1 + column].value == sklearn.metrics.accuracy_score(probe.labels, predicted)
            if score.held_out > held_out:
                chosen, held_out = Place(row[0], t, 1), score.held_out
    assert list(result.metrics) == [f"linear probe at {chosen}"]
    assert result.metrics[f"linear probe at {chosen}"].value == probe.score(chosen).accuracy
    assert result.figures[0].png[1:4] == b"PNG"
