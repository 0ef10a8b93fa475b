"""Say what a pipeline holds, where it comes from, what was measured of it, and its licence.

example: latent-egc info runs/quickstart
"""

import argparse

from latent_egc.commands.arguments import add_pipeline_argument, load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pipeline."""
    add_pipeline_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Prints a line a fact."""
    from latent_egc.exchange.origin import find_origin

    pipeline = load_pipeline(options.pipeline, "cpu")
    origin = find_origin(options.pipeline)
    model, vae = pipeline.energy_model, pipeline.vae
    names = list(pipeline.id2label.values())
    autoencoder = "none, pixel space"
    if vae is not None:
        autoencoder = f"{type(vae).__name__}, {sum(p.numel() for p in vae.parameters()):,} parameters"
        autoencoder += f", of {pipeline.config.autoencoder}" if pipeline.config.autoencoder else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    config = model.config
    print(f"from          {origin.place}")
    print(f"energy model  {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"head          {config.head}" + (", Gaussian part" if config.gaussian_part else ""))
    print(f"autoencoder   {autoencoder}")
    print(f"images        {pipeline.image_size} x {pipeline.image_size} px")
    print(f"latents       {config.in_channels} x {config.sample_size} x {config.sample_size}")
    print(f"classes       {len(names)}: {shown}" if names else "classes       none")
    print(f"guidance      {pipeline.config.default_guidance_scale:g} by default")
    schedule = f"{config.num_train_timesteps} timesteps, {config.beta_schedule}"
    print(f"scheduler     {type(pipeline.scheduler).__name__}, {schedule}")
    for line in origin.measured or ["nothing that is written down there"]:
        print(f"measured      {line}")
    print(f"licence       {origin.license or 'not stated'}")
