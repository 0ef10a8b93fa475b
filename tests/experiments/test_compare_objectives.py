"""The comparison's script: equal units, a line a run, and a second call that trains nothing."""

import runpy
import sys

from tiny import ROOT


def test_forms_are_trained_at_equal_units_once(tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "experiments" / "compare_objectives.py"))
    main, forms = script["main"], script["FORMS"]
    kept = {name: forms["embedding"][name] for name in ("all, drop 0.1", "dropped, drop 0.5, clean 0.5")}
    monkeypatch.setitem(forms, "embedding", kept)
    tiny = ["model.block_out_channels=[8, 16]", "model.norm_num_groups=4", "training.train_batch_size=4"]
    tiny += ["training.warmup_steps=1", "training.num_validation_images=8", "training.trackers=[]"]
    tiny += ["data.latent_cache=null"]
    config = str(ROOT / "configs" / "digits.yaml")
    arguments = ["compare_objectives.py", config, str(tmp_path), "--forms", "embedding", "--steps", "4", *tiny]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" | ")[:4] for line in table] == [
        ["| all, drop 0.1", "0", "12", "3"],
        ["| dropped, drop 0.5, clean 0.5", "0", "7.5", "5"],
    ]
    monkeypatch.setitem(main.__globals__, "train", None)
    main()
    assert capsys.readouterr().out.splitlines()[-2:] == table
