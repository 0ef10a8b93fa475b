"""A run that is there is not trained again, and not taken for another one."""

from pathlib import Path

from latent_egc.config import Config, ConfigError
from latent_egc.training.build import resolve
from latent_egc.training.run_folder import MAY_CHANGE, differences

# What a finished run's numbers do not depend on.
WITHOUT_EFFECT = MAY_CHANGE - {"init_from", "max_steps", "num_validation_images"} | {"latent_cache"}


def is_trained(config: Config) -> bool:
    """Whether `output_dir` holds the finished run of a configuration.

    Raises:
        ConfigError: it holds that of another one.
    """
    run = Path(config.output_dir)
    if not (run / "pipeline").exists():
        return False
    for section, key, was, asked in differences(run, resolve(config)):
        if key not in WITHOUT_EFFECT:
            raise ConfigError(
                f"{run} holds a run of {section}.{key}={was!r}, asked for is {asked!r}; choose another folder, or "
                "delete that one"
            )
    return True
