"""The suite guidance, and the instrument that it shares with generation and solvers."""

import numpy as np
import pytest
import torch
from tiny_studies import Brightness, measure, scipy_frechet

from latent_egc.config import ConfigError
from latent_egc.measuring.results import Metric
from latent_egc.measuring.sample_quality import Quality, sample_images
from latent_egc.measuring.suites import guidance

FAST = ["guidance.num_samples=9", "guidance.num_inference_steps=1", "guidance.guidance_scales=[1,3]"]
INTERVALS = "guidance.guidance_intervals=[[0,1],[0.3,0.8]]"


def quality(agreement, precision, recall):
    return Quality(1.0, precision, recall, Metric(agreement, percent=True))


def test_the_rule():
    """The largest F-score of those whose agreement is at least 90 % of the judge's accuracy, else the most faithful."""
    found = [quality(0.5, 0.9, 0.9), quality(0.73, 0.6, 0.6), quality(0.8, 0.9, 0.3), quality(0.75, 0.6, 0.6)]
    assert found[2].f_score == pytest.approx(0.45)
    assert guidance.chosen(found, judge_accuracy=0.8) == 1
    assert guidance.chosen(found, judge_accuracy=0.85) == 2  # of 0.765, which one setting alone reaches
    assert guidance.chosen(found, judge_accuracy=1.0) == 2
    assert quality(0.5, 0.0, 0.0).f_score == 0


def test_suite_by_hand(evaluation_context, extractor, tmp_path, capsys):
    """Every interval with every scale, then selection; each row is what its own samples give."""
    torch.jit.script(Brightness(as_logits=True)).save(tmp_path / "judge.pt")
    instruments = [f"guidance.features=[{extractor}]", f"guidance.judge={tmp_path / 'judge.pt'}"]
    context = evaluation_context(*instruments, *FAST, INTERVALS, "guidance.num_candidates=2")
    result = measure(guidance, context)
    (table,) = result.tables
    assert [row[:3] for row in table.rows] == [
        [1.0, "everywhere", 1],
        [3.0, "everywhere", 1],
        [1.0, "0.3 to 0.8", 1],
        [3.0, "0.3 to 0.8", 1],
        *([1.0, f"everywhere, best of 2 by {by}", 2] for by in ("classifier", "density", "both")),
    ]
    assert result.num_samples == 9 * 7
    labels = np.arange(9) % 3
    samples = sample_images(context, 9, labels, num_inference_steps=1, guidance_scale=3.0)
    agreement = (Brightness(as_logits=True)(samples / 255).argmax(1).numpy() == labels).mean()
    assert table.rows[1][3].value == pytest.approx(agreement)
    train = context.splits.train
    real = Brightness()(context.pixel_values(train, range(len(train))) / 2 + 0.5).numpy()
    assert table.rows[1][7] == pytest.approx(scipy_frechet(real, Brightness()(samples / 255).numpy()), rel=1e-3)
    chosen = [row for row in table.rows if row[-1] == "yes"]
    assert len(chosen) == 1
    assert chosen[0][2] == 1
    assert result.metrics["chosen guidance scale"].value == chosen[0][0]
    assert f"register_to_config(default_guidance_scale={chosen[0][0]:g})" in result.notes[0]
    assert result.notes[0] in capsys.readouterr().out
    assert [figure.name for figure in result.figures] == ["curves", "samples"]
    assert not any(figure.shows_data for figure in result.figures)
    agreement, precision, _ = result.figures[0].curves
    assert agreement.series["0.3 to 0.8"] == ([1.0, 3.0], [row[3] for row in table.rows[2:4]])
    assert precision.series["everywhere"] == ([1.0, 3.0], [row[4].value for row in table.rows[:2]])


def test_a_stopped_suite_goes_on_behind_the_last_setting(run, extractor, monkeypatch):
    """What was sampled is not sampled again."""
    drawn, fails = [], True

    def counted(pipeline, *labels, **arguments):
        if fails and len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(arguments["guidance_scale"])
        return call(pipeline, *labels, **arguments)

    from latent_egc import EGCPipeline

    call = EGCPipeline.__call__
    monkeypatch.setattr(EGCPipeline, "__call__", counted)
    settings = [*FAST, "guidance.guidance_scales=[1,2,3]", "guidance.guidance_intervals=[[0,1]]"]
    settings += [f"guidance.features=[{extractor}]", "guidance.num_candidates=1"]
    with pytest.raises(KeyboardInterrupt):
        run(["guidance"], *settings)
    fails = False
    report = run(["guidance"], *settings)
    assert drawn == [1.0, 2.0, 3.0]
    assert report.content["suites"]["guidance"]["num_samples"] == 27


def test_suite_errors(evaluation_context, extractor):
    features = f"guidance.features=[{extractor}]"
    for settings, message in (
        ([], "guidance.features must name at least one extractor"),
        ([features, "guidance.guidance_scales=[]"], "guidance.guidance_scales must not be empty"),
        ([features, "guidance.guidance_scales=[1,0]"], "guidance: guidance_scale=0 would ignore class_labels"),
        ([features, "guidance.guidance_intervals=[[0.5,0.2]]"], "guidance: guidance_interval must be two shares"),
        ([features, "guidance.classifier_free_scale=2"], r"guidance: classifier_free_scale=2\.0 needs"),
    ):
        with pytest.raises(ConfigError, match=message):
            measure(guidance, evaluation_context(*settings))
    with pytest.raises(ConfigError, match="--suite guidance needs classes"):
        measure(guidance, evaluation_context(features, num_classes=None, energy_channels=3))
