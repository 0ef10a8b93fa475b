"""Is everything right and fast on this machine's GPU? Gradients, speed, memory, sharding and a short training run.

    make gpu-check                                                  into gpu_check.json, at most 9 minutes
    python -m latent_egc.measuring.gpu_check --render gpu_check.json    its tables, in Markdown

Every part runs in a process of its own: one that fails, hangs or spoils the device leaves the others alone. The file is
written anew after every row, so whatever ends the command keeps what was measured.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from latent_egc.atomic import replace_text
from latent_egc.measuring.gpu_tables import render, wrong_gradients

# Functions of gpu_parts.py -> the most seconds each may take. What needs the compiler comes last.
PARTS = {
    "parity": 120,
    "sharding": 90,
    "transformer_speed": 120,
    "memory": 110,
    "unet_speed": 100,
    "compiled_speed": 100,
    "training": 180,
    "compiled_parity": 240,
}
SMALLEST_REST = 5.0  # seconds; with less left of the budget no part is begun
LONGEST_EXIT = 15.0  # seconds that a process may take to end after its last row

Rows = Callable[[], Iterable[dict[str, Any]]]


def rows_of_part(name: str, device: str, tiny: bool) -> Iterable[dict[str, Any]]:
    """The rows of a function of gpu_parts.py."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch

    from latent_egc.measuring import gpu_parts

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in everything that is compared
    return getattr(gpu_parts, name)(torch.device(device), tiny)


def run_parts(
    parts: Mapping[str, tuple[Rows, float]], minutes: float, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs one part after the other, each in a process of its own.

    Args:
        parts: name -> what yields its rows, and the most seconds that it may take; picklable.
        minutes: of all parts together; what is not begun by then is left out, and said to be.
        write: given all results after every row.

    Returns:
        Name -> {"rows", "seconds"}, with "failure" where a part did not come to its end.
    """
    start, results = time.monotonic(), {}
    for name, (rows, most) in parts.items():
        begun = time.monotonic()
        left = start + 60 * minutes - begun
        part = results[name] = {"rows": [], "seconds": 0.0}
        if left < SMALLEST_REST:
            part["failure"] = f"not begun: the {minutes:g} minutes were used up"
        else:
            for row in _from_process(rows, begun + min(left, most)):
                if "part_failure" in row:
                    part["failure"] = row["part_failure"]
                else:
                    part["rows"].append(row)
                part["seconds"] = time.monotonic() - begun
                write(results)
            part["seconds"] = time.monotonic() - begun
        write(results)
    return results


def _from_process(rows: Rows, deadline: float) -> Iterable[dict[str, Any]]:
    """The rows as they come from a fresh process, and {"part_failure"} where it does not end well or in time."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(rows, sender))
    begun = time.monotonic()
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            yield receiver.recv()
        yield {"part_failure": f"stopped after {time.monotonic() - begun:.0f} s, its limit"}
    except EOFError:
        process.join(LONGEST_EXIT)
        if process.exitcode not in (0, None):  # None: it hangs, but has said all
            yield {"part_failure": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send(rows: Rows, sender: Connection) -> None:
    """In the process: sends the rows, and an exception as a last one."""
    with sender:
        try:
            for row in rows():
                sender.send(row)
        except Exception as error:
            traceback.print_exc()
            sender.send({"part_failure": f"{type(error).__name__}: {error}"})


def describe_machine(device: str) -> dict[str, Any]:
    """Names and versions, found without touching the device from this process."""
    settings = {"device": device, "torch": version("torch"), "python": sys.version.split()[0]}
    settings["driver"] = None
    if device.startswith("cuda"):
        visible, index = os.environ.get("CUDA_VISIBLE_DEVICES"), int(device.partition(":")[2] or 0)
        number = visible.split(",")[index] if visible else str(index)
        query = "--query-gpu=name,driver_version,memory.total"
        command = ["nvidia-smi", f"--id={number}", query, "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
            settings["device"], settings["driver"], settings["memory"] = output.splitlines()[0].split(", ")
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Ends with status 1 where a gradient is wrong, or a part did not come to its end."""
    parser = argparse.ArgumentParser(prog="python -m latent_egc.measuring.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="file of the results (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no part after these (default %(default)g)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these (default: all)")
    parser.add_argument("--device", default="cuda", help="torch's name of the device (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of seconds, on a CPU: networks of no use")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print the tables of such a file, measure nothing")
    options = parser.parse_args(arguments)
    if options.render is not None:
        print(render(json.loads(options.render.read_text())))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the running part ends, too
    result: dict[str, Any] = {"machine": describe_machine(options.device)}

    def write(parts: dict[str, Any]) -> None:
        replace_text(options.output, json.dumps(result | {"parts": parts}, indent=1))

    write({})  # now, not after minutes
    parts = {name: (partial(rows_of_part, name, options.device, options.tiny), PARTS[name]) for name in options.parts}
    result["parts"] = run_parts(parts, options.minutes, write)
    print(render(result))
    if wrong_gradients(result) or any("failure" in part for part in result["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
