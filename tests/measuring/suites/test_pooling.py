"""The suite pooling."""

from tiny_studies import measure

from latent_egc.measuring.probe_context import Place
from latent_egc.measuring.suites import pooling


def test_pooling_curve(probe_context):
    result = measure(pooling, probe_context("block=mid.0", "timestep=90"))
    probe = probe_context()
    expected = {p: probe.probe(Place("mid.0", 90, p))[0].accuracy for p in (1, 2)}
    assert {row[0]: row[2].value for row in result.tables[0].rows} == expected
    assert {row[0]: row[1] for row in result.tables[0].rows} == {1: 16, 2: 64}
    # A transformer's maps are 2 x 2 here, and so is the middle of this U-Net: p = 4 would be 2 again.
    wide = probe_context("poolings=[1,2,4]", "block=mid.0", "timestep=90")
    assert [row[0] for row in measure(pooling, wide).tables[0].rows] == [1, 2]
