"""A pipeline whose folder loads with latent_egc installed and without it, and whose components make it again."""

import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from latent_egc.models.weights import check_files

from .code_files import add_code_files


def _in_package() -> bool:
    """Whether this is latent_egc's own file, not a copy of it from a repository."""
    return __name__.split(".")[0] == "latent_egc"


class SelfContainedPipeline(DiffusionPipeline):
    """Saving puts the code beside the weights; loading uses this package's classes where they are installed."""

    # A folder names its own code files, for use without this package. Where the package is installed its
    # classes are used instead, and no code from the folder is run: two methods rewrite the names, strings only. The
    # pipeline's own is rewritten in the private one because loading from the Hub reads model_index.json through it
    # before anything is downloaded; the energy network's must stay until then, or the Hub's listing would not fit it.

    @classmethod
    def _dict_from_json_file(cls, json_file: str, **options: Any) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file, **options)  # older versions of diffusers have one
        if _in_package() and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return config

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """See `ConfigMixin.load_config`."""
        loaded = super().load_config(*arguments, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        module, class_name = config.get("energy_model") or (None, None)
        if _in_package() and module is not None and "." not in module:
            config["energy_model"] = [f"latent_egc.models.{module}", class_name]
        return loaded

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> "SelfContainedPipeline":
        """See `DiffusionPipeline.from_pretrained`. Raises ValueError, naming them, on tensors that nothing asks for."""
        pipeline = super().from_pretrained(*arguments, **options)
        if pipeline.vae is not None and options.get("vae") is None:  # the energy network looks at its own
            check_files(pipeline.vae)
        return pipeline

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **options: Any) -> None:
        """See `ConfigMixin.save_config`; saving and pushing a pipeline end with it. Adds the code files."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)
        network = getattr(self.energy_model, "_orig_mod", self.energy_model)  # what torch.compile wraps
        add_code_files(Path(save_directory), type(self), type(network))

    # diffusers' ways to build a pipeline of another's components know these by exact types and forget their names.

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> "SelfContainedPipeline":
        """See `DiffusionPipeline.from_pipe`."""
        shared = {name: part for name, part in pipeline.components.items() if name in ("energy_model", "vae")}
        return super().from_pipe(pipeline, **(shared | options))

    @property
    def components(self) -> dict[str, Any]:
        """All that a pipeline of this class needs to be this one: components, names and scale."""
        return super().components | super().parameters

    @property
    def parameters(self) -> dict[str, Any]:
        """Nothing: `components` has the names and the scale."""
        return {}
