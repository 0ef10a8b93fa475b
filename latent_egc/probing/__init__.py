"""Probing a frozen diffusion network: what its features know of an image's class, by block and timestep."""

from latent_egc.probing.denoisers import Denoiser, load_denoiser
from latent_egc.probing.probe import ANALYSES, probe
from latent_egc.probing.settings import ProbeSettings, parse_settings

__all__ = ["ANALYSES", "Denoiser", "ProbeSettings", "load_denoiser", "parse_settings", "probe"]
