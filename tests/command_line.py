"""The command line, as its tests call it."""

from latent_egc.commands import main


def fails(capsys, arguments: list, *parts: str) -> None:
    """Asserts exit status 2, nothing on stdout, and one line on stderr, `error: ...`, that holds all `parts`."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.err.rstrip().endswith(line)
    assert "Traceback" not in captured.err
    for part in parts:
        assert str(part) in line
