"""The training loop: one energy network, one loss, on any number of processes.

Everything random is a function of (seed, sample number), the learning rate of the step; so a resumed run is the run
that was never interrupted.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from latent_egc.atomic import CheckpointError, replace_folder
from latent_egc.config import Config, ConfigError, TrainingConfig
from latent_egc.data.autoencoders import encode_moments, latent_shape, latents_from_moments, load_autoencoder
from latent_egc.data.latent_cache import CachedViews, open_cache
from latent_egc.data.sources import ImageTable, load_splits
from latent_egc.data.stream import BatchSchedule, TrainingSamples
from latent_egc.data.views import PixelViews
from latent_egc.models import EnergyModel
from latent_egc.objective import CompiledForward, EGCLosses, EGCObjective
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.schedulers import default_scheduler
from latent_egc.training.checkpoints import (
    CheckpointRecord,
    MetricsLog,
    checkpoint_folders,
    prepare_run_folder,
    prune_checkpoints,
    read_metrics,
    read_record,
    write_record,
)
from latent_egc.training.figures import sample_rows, save_curves, save_grid
from latent_egc.training.validation import evaluate, validation_latents
from latent_egc.training.warm_start import load_initial_weights

TAKES_PARAMETERS_APART = (
    "it takes parameters apart and gathers them around one forward and one backward pass; the energy's input gradient "
    "is a backward pass inside the forward, after which they are in parts again"
)
# How Accelerate can launch what this loop cannot run -> why.
REFUSED_LAUNCHES = {
    DistributedType.FSDP: TAKES_PARAMETERS_APART,
    DistributedType.MEGATRON_LM: TAKES_PARAMETERS_APART,
    DistributedType.DEEPSPEED: (
        "its engine steps the optimiser inside the backward pass, before a loss that is not finite can be caught"
    ),
}


class NonFiniteLossError(FloatingPointError):
    """Training stopped before a loss that is not finite could reach the weights."""


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of optimiser step `step` (from 0): linear warm-up, then constant or a cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_model(config: Config, vae: ModelMixin | None) -> EnergyModel:
    """The freshly initialised energy network, checked against the latents that the autoencoder makes.

    Raises:
        ConfigError: `model` contradicts itself, the autoencoder or the image size.
    """
    channels, size, _ = latent_shape(vae, config.data.image_size)
    model = config.model.build()
    if model.config.in_channels != channels:
        raise ConfigError(
            f"model.in_channels must be {channels}, the channels of the latents, got {model.config.in_channels}"
        )
    if model.config.sample_size != size:
        raise ConfigError(
            f"model.sample_size must be {size}: data.image_size={config.data.image_size} through the autoencoder, "
            f"got {model.config.sample_size}"
        )
    return model


def build_data(config: Config, vae: ModelMixin | None) -> tuple[Any, ImageTable | Any, list[str], str]:
    """Training views, validation rows, class names, and a sentence on where they come from."""
    seed = config.training.seed
    if config.data.latent_cache is not None:
        cache = open_cache(config, vae)
        source = f"the latent cache {config.data.latent_cache} ({len(cache.train)} + {len(cache.validation)} images)"
        return CachedViews(cache.train, seed, config.data.label_fraction), cache.validation, cache.class_names, source
    splits = load_splits(config.data, config.model.arguments["num_classes"])
    encoder = "as they are" if vae is None else f"encoded by {type(vae).__name__} at every step"
    source = f"pixels of {config.data.dataset} ({len(splits.train)} + {len(splits.validation)} images), {encoder}"
    return PixelViews(splits.train, config.data, seed), splits.validation, splits.class_names, source


def build_pipeline(config: Config, model: EnergyModel, vae: ModelMixin | None, class_names: list[str]) -> EGCPipeline:
    """The pipeline that a run saves and draws its grids with."""
    return EGCPipeline(
        energy_model=model,
        vae=vae,
        scheduler=default_scheduler(model),
        id2label=dict(enumerate(class_names)),
        default_guidance_scale=config.sampling.guidance_scale,
    )


def describe(config: Config) -> str:
    """The resolved configuration with the network's size and a rough estimate of the training step's memory.

    The activations are estimated as four times the outputs of all layers: the forward pass, its input gradient and what
    the second backward keeps of both, and the clean batch.
    """
    vae = load_autoencoder(config.autoencoder)
    with torch.device("meta"):
        model = build_model(config, vae)
    num_parameters = sum(p.numel() for p in model.parameters())
    sizes: list[int] = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    batch_size, shape = config.training.train_batch_size, latent_shape(vae, config.data.image_size)
    model(torch.empty(batch_size, *shape, device="meta"), torch.zeros(batch_size, dtype=torch.long, device="meta"))
    bytes_per_activation = 2 if config.training.mixed_precision == "bf16" else 4
    # float32 weights, gradients, two Adam moments and the average
    state, activations = 20 * num_parameters, 4 * bytes_per_activation * sum(sizes)
    return (
        yaml.safe_dump(config.to_dict(), sort_keys=False)
        + f"# {type(model).__name__}: {num_parameters:,} parameters\n"
        + f"# memory per device, estimated: {state / 2**30:.2f} GiB weights, gradients, optimiser and average; "
        + f"{activations / 2**30:.2f} GiB activations at train_batch_size {batch_size}\n"
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second one acts as usual."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Run:
    """What one training run holds between its steps: networks, optimiser, validation data, and what it writes."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        training = config.training
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.output_dir)
        self.vae = load_autoencoder(config.autoencoder)
        set_seed(training.seed)
        self.model = build_model(config, self.vae)
        if config.model.init_from is not None:
            load_initial_weights(self.model, config.model.init_from)
        self.views, validation_rows, self.class_names, self.data_source = build_data(config, self.vae)

        # Nothing is written, and no earlier run is touched, before everything above has been found usable.
        checkpoint = None
        if accelerator.is_main_process:
            checkpoint = prepare_run_folder(config)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process and training.resume == "auto":
            checkpoint = (checkpoint_folders(self.folder) or [None])[-1]

        if self.vae is not None:
            self.vae.to(accelerator.device)
        objective = EGCObjective(self.model, config.objective.classification_weight, config.objective.label_smoothing)
        if training.activation_checkpointing:
            self.model.enable_gradient_checkpointing()
        if training.compile:
            objective.forward = CompiledForward(objective)
        self.objective = accelerator.prepare(objective)
        # Placed already, with the parameters; a sharded optimiser has no whole state to be placed.
        self.optimizer = accelerator.prepare_optimizer(self._make_optimizer(), device_placement=False)
        self.ema = EMAModel(self.model.parameters(), decay=training.ema_decay)
        self.ema.to(accelerator.device)
        accelerator.register_for_checkpointing(self.ema)
        self.pipeline = build_pipeline(config, self.model, self.vae, self.class_names)
        self.validation = validation_latents(config, self.vae, validation_rows, accelerator)
        self.global_step = 0
        if checkpoint is not None:
            self._load(checkpoint)
        if accelerator.is_main_process:
            self.metrics = MetricsLog(self.folder / "metrics.jsonl", self.global_step)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; where asked for, and where there are several processes, each keeps a part of its state."""
        training, parameters = self.config.training, self.model.parameters()
        options = {
            "lr": training.learning_rate,
            "betas": training.adam_betas,
            "weight_decay": training.weight_decay,
        }
        if training.shard_optimizer and self.accelerator.num_processes > 1:
            return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, **options)
        return torch.optim.AdamW(parameters, **options)

    def _load(self, checkpoint: Path) -> None:
        self.global_step = read_record(checkpoint).global_step
        try:
            self.accelerator.load_state(str(checkpoint / "state"))
        except Exception as error:  # torch, safetensors and pickle have no common error for a damaged file
            raise CheckpointError(
                f"checkpoint {checkpoint} is damaged: {error}; delete that folder to resume from the one before it"
            ) from error

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The model with its averaged weights, in eval mode."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            self.ema.restore(self.model.parameters())

    def latents(self, batch: dict[str, torch.Tensor], view: str, posterior_noise: str) -> torch.Tensor:
        """Scaled latents of one of a batch's two views."""
        moments = batch[view]
        if isinstance(self.views, PixelViews):
            moments = encode_moments(self.vae, moments)
        noise = batch[posterior_noise] if self.config.autoencoder.sample_posterior else None
        return latents_from_moments(self.vae, moments, noise)

    def losses(self, batch: dict[str, torch.Tensor]) -> EGCLosses:
        """The objective on one micro-batch."""
        labelled = self.model.config.num_classes is not None
        return self.objective(
            self.latents(batch, "view", "posterior_noise"),
            batch["class_labels"] if labelled else None,
            self.latents(batch, "clean_view", "clean_posterior_noise") if labelled else None,
            noise=batch["noise"],
            timesteps=batch["timesteps"],
            label_dropped=batch["label_dropped"],
        )

    def log(self, values: dict[str, float]) -> None:
        """To the trackers and to metrics.jsonl."""
        self.accelerator.log(values, step=self.global_step)
        if self.accelerator.is_main_process:
            self.metrics.add(self.global_step, values)

    def evaluate(self) -> dict[str, float]:
        """Validates the averaged weights and logs the result."""
        with self.ema_weights():
            batch_size = self.config.training.train_batch_size
            results = evaluate(self.model, *self.validation, self.accelerator, batch_size)
        self.log(results)
        self.accelerator.print(f"step {self.global_step}: " + "  ".join(f"{k} {v:.4f}" for k, v in results.items()))
        return results

    def sample(self) -> None:
        """Writes a grid of samples of the averaged weights, from the same noise every time."""
        if self.accelerator.is_main_process:
            sampling = self.config.sampling
            class_ids = list(range(len(self.class_names)))[: sampling.max_classes] or None
            with self.ema_weights():
                images = sample_rows(
                    self.pipeline,
                    class_ids,
                    sampling.images_per_class,
                    sampling.num_inference_steps,
                    batch_size=sampling.batch_size,
                )
            names = None if class_ids is None else [self.class_names[i] for i in class_ids]
            guidance = "unguided" if class_ids is None else f"guidance {sampling.guidance_scale:g}"
            title = f"step {self.global_step}, {guidance}, {sampling.num_inference_steps} steps"
            save_grid(images, self.folder / "samples" / f"step-{self.global_step:08d}.png", names, title)
        self.accelerator.wait_for_everyone()

    def save_checkpoint(self, results: dict[str, float] | None) -> None:
        """Writes a checkpoint, whole or not at all, and deletes those that are no longer kept."""
        accelerator = self.accelerator
        score = None
        if results is not None:
            score = results.get("validation_accuracy", -results["validation_denoising_loss"])
        folder = self.folder / "checkpoints" / f"step-{self.global_step:08d}"
        if isinstance(self.optimizer.optimizer, ZeroRedundancyOptimizer):
            self.optimizer.optimizer.consolidate_state_dict(to=0)  # the main process writes the whole state

        def write(unfinished: Path) -> None:
            accelerator.save_state(str(unfinished / "state"))
            with self.ema_weights():
                self.pipeline.save_pretrained(unfinished / "pipeline")
            write_record(unfinished, CheckpointRecord(self.global_step, score))

        if accelerator.is_main_process:
            replace_folder(folder, write)
            prune_checkpoints(self.folder, self.config.training.keep_checkpoints)
        accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Writes what a finished run leaves behind: its pipeline and its curves."""
        if self.accelerator.is_main_process:
            with self.ema_weights():
                replace_folder(self.folder / "pipeline", self.pipeline.save_pretrained)
            save_curves(read_metrics(self.metrics.path), self.folder / "curves.png")
        self.accelerator.wait_for_everyone()


def train(config: Config) -> Path:
    """Trains an energy network as the configuration says, on every process that the launcher started.

    Args:
        config: a whole run.

    Returns:
        The run's folder. Stopped by SIGTERM or Ctrl-C it holds a checkpoint of the last whole step.

    Raises:
        ConfigError: something in the configuration cannot be used; nothing was written.
        NonFiniteLossError: a loss or gradient is not finite; checkpoints stay as they are.
        CheckpointError: a checkpoint could not be written or read.
    """
    training = config.training
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        log_with=list(training.trackers) or None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    if accelerator.distributed_type in REFUSED_LAUNCHES:
        raise ConfigError(
            f"this run was launched with {accelerator.distributed_type.value}: "
            f"{REFUSED_LAUNCHES[accelerator.distributed_type]}. Launch it with plain multi-process data parallelism; "
            "training.shard_optimizer=true and training.activation_checkpointing=true save memory"
        )
    run = Run(config, accelerator)
    accelerator.init_trackers("latent-egc")
    parameters = sum(p.numel() for p in run.model.parameters())
    accelerator.print(
        f"{type(run.model).__name__}, {parameters / 1e6:.2f} M parameters, {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}; training reads {run.data_source}"
    )
    if run.global_step:
        accelerator.print(f"resumed at step {run.global_step}")
    try:
        with stop_signals() as stops:
            _train_steps(run, stops)
    finally:
        accelerator.end_training()
    return run.folder


def _train_steps(run: Run, stops: list[int]) -> None:
    config, training, accelerator = run.config, run.config.training, run.accelerator
    shape = latent_shape(run.vae, config.data.image_size)
    num_timesteps = run.model.config.num_train_timesteps
    samples = TrainingSamples(run.views, training.seed, shape, num_timesteps, config.objective.label_drop)
    schedule = BatchSchedule(
        run.global_step,
        training.max_steps,
        training.train_batch_size,
        training.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    workers = config.data.num_workers
    batches = iter(DataLoader(samples, batch_sampler=schedule, num_workers=workers, persistent_workers=workers > 0))
    progress = tqdm(
        initial=run.global_step, total=training.max_steps, desc="train", disable=not accelerator.is_main_process
    )
    num_skipped, last_log = 0, time.perf_counter()
    run.objective.train()
    while run.global_step < training.max_steps:
        learning_rate = learning_rate_at(run.global_step, training)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        # loss, denoising_loss, classification_loss, images skipped, processes asked to stop: means over all processes
        totals = torch.zeros(5, device=accelerator.device)
        for _ in range(training.gradient_accumulation_steps):
            batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in next(batches).items()}
            with accelerator.accumulate(run.objective):
                losses = run.losses(batch)
                accelerator.backward(losses.loss)
                if accelerator.sync_gradients:
                    limit = math.inf if training.max_grad_norm is None else training.max_grad_norm
                    grad_norm = accelerator.clip_grad_norm_(run.objective.parameters(), limit)
            totals[:3] += torch.stack(losses).detach() / training.gradient_accumulation_steps
            totals[3] += batch["num_skipped"].sum()
        totals[4] = len(stops)
        *means, skipped, stop = accelerator.reduce(totals, "mean").tolist()
        if not all(map(math.isfinite, [*means, float(grad_norm)])):
            kept = checkpoint_folders(run.folder)
            raise NonFiniteLossError(
                f"not finite at step {run.global_step}: loss {means[0]}, denoising {means[1]}, classification "
                f"{means[2]}, gradient norm {float(grad_norm)}; it did not touch the weights, the last checkpoint "
                f"is {kept[-1] if kept else 'none'}; a lower training.learning_rate or training.max_grad_norm may help"
            )
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.ema.step(run.model.parameters())
        run.global_step += 1
        num_skipped += round(skipped * accelerator.num_processes)
        progress.update()
        progress.set_postfix(denoising=f"{means[1]:.4f}", classification=f"{means[2]:.3f}", refresh=False)

        step, last = run.global_step, run.global_step == training.max_steps
        if step % training.log_every == 0 or last:
            now = time.perf_counter()
            names = ("loss", "denoising_loss", "classification_loss")
            values = dict(zip(names, means, strict=True)) | {
                "grad_norm": float(grad_norm),
                "learning_rate": learning_rate,
            }
            run.log(values | {"seconds_since_last_log": now - last_log, "num_skipped_images": num_skipped})
            last_log = now
        if stop and not last:
            run.save_checkpoint(None)
            accelerator.print(f"stopped at step {step}, checkpoint saved; training.resume=auto goes on from here")
            progress.close()
            return
        checkpoint_due = step % training.checkpoint_every == 0 or last
        # A checkpoint is always evaluated, so that the best one is known.
        results = run.evaluate() if checkpoint_due or step % training.evaluate_every == 0 else None
        if step % training.sample_every == 0 or last:
            run.sample()
        if checkpoint_due:
            run.save_checkpoint(results)
    progress.close()
    run.finish()
