"""Answers diffusers' calls to the Hub from a local folder, handing out only the files that were asked for."""

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers.pipelines.pipeline_utils
import diffusers.utils.dynamic_modules_utils


def serve(folder: str | Path, downloaded: str | Path, setattr=setattr) -> None:
    """Every repository is `folder`; what a download asks for is copied to `downloaded` first."""
    folder, downloaded = Path(folder), Path(downloaded)
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]

    def fetch(name: str) -> str:
        (downloaded / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, downloaded / name)
        return str(downloaded / name)

    def snapshot_download(repository: str, *, allow_patterns, ignore_patterns, **options) -> str:
        for name in names:
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                fetch(name)
        return str(downloaded)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names], sha="0" * 40)
    for module in (diffusers.pipelines.pipeline_utils, diffusers.utils.dynamic_modules_utils):
        setattr(module, "model_info", lambda *arguments, **options: info)
        setattr(module, "hf_hub_download", lambda repository, filename, **options: fetch(filename))
    setattr(diffusers.pipelines.pipeline_utils, "snapshot_download", snapshot_download)
