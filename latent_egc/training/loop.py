"""The training loop: one energy network, one loss, on any number of processes.

Everything random is a function of (seed, sample number), the learning rate of the step; so a resumed run is the run
that was never interrupted.
"""

import dataclasses
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from latent_egc.atomic import replace_file, replace_folder
from latent_egc.config import Config, ConfigError, TrainingConfig
from latent_egc.data.autoencoders import has_posterior, latent_shape, latents_from_moments, load_autoencoder
from latent_egc.data.mixing import augmented
from latent_egc.data.stream import BatchSchedule, TrainingSamples, collate, num_loader_workers, timestep_sampling
from latent_egc.data.views import Views
from latent_egc.models import EnergyModel
from latent_egc.objective import CompiledForward, EGCObjective
from latent_egc.training.build import Data, build_data, build_model, build_pipeline, resolve
from latent_egc.training.checkpoints import (
    CheckpointRecord,
    MetricsLog,
    load_checkpoint,
    read_metrics,
    save_checkpoint,
)
from latent_egc.training.figures import save_curves, save_samples
from latent_egc.training.gradient_check import check_gradients
from latent_egc.training.run_folder import prepare_run_folder
from latent_egc.training.sharding import averaged_weights, copy_without_weights, shard_parameters
from latent_egc.training.step import LateNumbers, take_step
from latent_egc.training.validation import validate, validation_latents
from latent_egc.training.warm_start import load_initial_weights

# How Accelerate can launch what this loop cannot run -> why.
REFUSED_LAUNCHES = {
    DistributedType.FSDP: "its averaged weights come back wrong, and it casts the noise, which is the target, to bf16",
    DistributedType.MEGATRON_LM: "it trains networks that are made of its own layers",
    DistributedType.DEEPSPEED: (
        "its engine steps the optimiser inside the backward pass, before a loss that is not finite can be caught"
    ),
}


def train(config: Config, objective_class: type[EGCObjective] = EGCObjective, data: Data | None = None) -> Path:
    """Trains an energy network as the configuration says, on every process that the launcher started.

    Args:
        config: a whole run.
        objective_class: what the loss is: `EGCObjective`, or a class with its constructor, forward and result.
        data: to train and validate on; None: what `config.data` says.

    Returns:
        The run's folder. Stopped by SIGTERM or Ctrl-C it holds a checkpoint of the last whole step.

    Raises:
        ConfigError: something in the configuration cannot be used; nothing was written.
        NonFiniteLossError: a loss or gradient is not finite; checkpoints stay as they are.
        GradientError: the run's gradients are wrong on this machine; no step was taken.
        CheckpointError: a checkpoint, or another of the run's files, could not be written or read.
    """
    config = resolve(config)
    training, folder = config.training, Path(config.output_dir)
    accelerator = start_accelerator(training, folder)
    vae = load_autoencoder(config.autoencoder, accelerator.device)
    shape = latent_shape(vae, config.data.image_size)
    set_seed(training.seed)
    model = build_model(config.model, shape)
    if config.model["init_from"] is not None:
        load_initial_weights(model, config.model["init_from"])
    data = data or build_data(config.data, vae, config.model["num_classes"], training.seed)
    objective = build_objective(model, config, objective_class).to(accelerator.device)
    if training.checks_gradients:
        inputs, _ = next(micro_batches(config, data.train, vae, 0, accelerator))
        gradient_error = check_gradients(objective, inputs, accelerator)
    pipeline = build_pipeline(copy_without_weights(model), vae, data.class_names, config.sampling)
    objective, optimizer, average = prepare(objective, training, accelerator)

    # Nothing is written, and no earlier run is touched, before everything above has been found usable.
    lock = prepare_run_folder(config, vae, accelerator)
    validation = validation_latents(data.validation, vae, training.num_validation_images, shape, accelerator)
    step = load_checkpoint(folder, accelerator.unwrap_model(objective), optimizer, average)
    metrics = MetricsLog(folder / "metrics.jsonl", step, accelerator)
    accelerator.print(
        f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters, {accelerator.num_processes} "
        f"process(es) on {accelerator.device.type}; training reads {data.source}"
        + (f"\nresumed at step {step}" if step else "")
    )
    if training.checks_gradients:
        metrics.add(step, {"gradient_error": gradient_error})
    batches = micro_batches(config, data.train, vae, step, accelerator)
    late = LateNumbers(step, folder, accelerator.num_processes)
    num_skipped, last_log = 0, time.perf_counter()
    with closing(batches), running(accelerator, lock, step, training.max_steps) as (progress, should_stop):
        while step < training.max_steps:
            learning_rate = learning_rate_at(step, training)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            late.add(take_step(objective, optimizer, average, batches, training, accelerator, should_stop))
            step += 1
            last, stopped = step == training.max_steps, False
            every = (training.log_every, training.validate_every, training.sample_every, training.checkpoint_every)
            due = [last or step % steps == 0 for steps in every]
            log_due, validation_due, samples_due, checkpoint_due = due
            for result in late.read(leave=0 if any(due) else 1):
                num_skipped, stopped = num_skipped + result.num_skipped, stopped or (result.stop and not last)
                progress.set_postfix(result.values, refresh=False)
            progress.update()

            if log_due:
                now = time.perf_counter()
                times = {"seconds_since_last_log": now - last_log, "num_skipped_images": num_skipped}
                metrics.add(step, result.values | {"learning_rate": learning_rate} | times)
                last_log = now
            score = None
            # A checkpoint is always validated, so that the best one is known; but not when there is no time left.
            if (checkpoint_due or validation_due) and not stopped:
                with averaged_weights(pipeline.energy_model, average):
                    found = validate(pipeline.energy_model, *validation, accelerator, training.train_batch_size)
                metrics.add(step, found)
                accelerator.print(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
                score = found.get("validation_accuracy", -found["validation_denoising_loss"])
            if samples_due and not stopped:
                draw = partial(save_samples, pipeline, config.sampling, step)
                with averaged_weights(pipeline.energy_model, average):
                    if accelerator.is_main_process:
                        replace_file(folder / "samples" / f"step-{step:08d}.png", draw)
                accelerator.wait_for_everyone()
            if checkpoint_due or stopped:
                parts = (accelerator, objective, optimizer, average, pipeline)
                save_checkpoint(folder, CheckpointRecord(step, score), *parts, training.keep_checkpoints)
            if stopped:
                accelerator.print(f"stopped at step {step}, checkpoint saved; training.resume=auto goes on from here")
                return folder
        with averaged_weights(pipeline.energy_model, average):
            if accelerator.is_main_process:
                replace_folder(folder / "pipeline", pipeline.save_pretrained)
                replace_file(folder / "curves.png", partial(save_curves, read_metrics(metrics.path)))
        accelerator.wait_for_everyone()
    return folder


def start_accelerator(training: TrainingConfig, folder: Path) -> Accelerator:
    """Accelerate as the launcher started it. Raises ConfigError for a launch that this loop cannot run."""
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        # Accelerate would take a plain number from the environment, if one is there.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=training.gradient_accumulation_steps),
        log_with=list(training.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=f"{folder}/logs"),
    )
    launched = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"the launcher started {launched} processes (WORLD_SIZE), but Accelerate would train in "
            f"{accelerator.num_processes}, each of them a whole run. On a CPU set ACCELERATE_USE_CPU=true in the "
            "environment; elsewhere unset WORLD_SIZE or launch with `accelerate launch` or `torchrun`"
        )
    if accelerator.distributed_type in REFUSED_LAUNCHES:
        raise ConfigError(
            f"this run was launched with {accelerator.distributed_type.value}: "
            f"{REFUSED_LAUNCHES[accelerator.distributed_type]}. Launch it with plain multi-process data parallelism; "
            "training.shard=parameters and training.activation_checkpointing=true save memory"
        )
    return accelerator


def build_objective(model: EnergyModel, config: Config, objective_class: type[EGCObjective]) -> EGCObjective:
    """The objective as every process runs it (recomputing, compiled), before it is prepared for several."""
    options = dataclasses.asdict(config.objective)
    for key in ("clean_fraction", "timestep_log_normal"):
        del options[key]  # what the loader does
    objective = objective_class(model, **options)
    if config.training.activation_checkpointing:
        model.enable_gradient_checkpointing()
    if config.training.compile:
        objective.forward = CompiledForward(objective)
    return objective


def prepare(
    objective: EGCObjective, training: TrainingConfig, accelerator: Accelerator
) -> tuple[nn.Module, AcceleratedOptimizer, EMAModel]:
    """The objective for all processes, its optimiser, and the average of the weights, sharded as `training.shard` says.

    One process keeps everything, and shards nothing.
    """
    model, shard = objective.energy_model, training.shard if accelerator.num_processes > 1 else "none"
    objective = shard_parameters(objective, accelerator) if shard == "parameters" else accelerator.prepare(objective)
    options = {"lr": training.learning_rate, "betas": training.adam_betas, "weight_decay": training.weight_decay}
    options["fused"] = True  # can leave a step out on the device, see `take_step`
    if shard == "optimizer":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    # Placed already, with the parameters; a sharded optimiser has no whole state to be placed.
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    average = EMAModel(model.parameters(), decay=training.ema_decay)
    average.to(accelerator.device)
    return objective, optimizer, average


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of optimiser step `step` (from 0): linear warm-up, then constant or a cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def micro_batches(
    config: Config, views: Views, vae: ModelMixin | None, first_step: int, accelerator: Accelerator
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """This process's micro-batches from a step on: the objective's inputs, and how many corrupt images were skipped."""
    training, workers = config.training, num_loader_workers(config.data, config.data.latent_cache is None)
    num_timesteps, num_classes = config.model["num_train_timesteps"], config.model["num_classes"]
    shape = latent_shape(vae, config.data.image_size)
    shares = config.objective.label_drop, 0.0 if num_classes is None else config.objective.clean_fraction
    posterior = config.autoencoder.sample_posterior and has_posterior(vae)
    samples = TrainingSamples(
        views, training.seed, shape, num_timesteps, *shares, posterior, timestep_sampling(config), config.data
    )
    sizes = (training.max_steps, training.train_batch_size, training.gradient_accumulation_steps)
    schedule = BatchSchedule(first_step, *sizes, accelerator.process_index, accelerator.num_processes)
    ended = multiprocessing.Event()
    options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": collate}
    options |= {"worker_init_fn": partial(leave_signals_to_the_loop, ended)}
    options |= {"pin_memory": accelerator.device.type == "cuda"}
    # Held by a name, so that it is shut down after `ended` is set, not before.
    loaded = iter(DataLoader(samples, batch_sampler=schedule, **options))
    try:
        for batch in loaded:
            batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
            inputs = objective_inputs(batch, views, vae, num_classes is not None)
            if num_classes is not None:
                masks = batch.get("clean_erasing"), batch.get("clean_mixing")
                inputs |= augmented(inputs["clean_latents"], inputs["clean_labels"], num_classes, *masks)
            yield inputs, batch["num_skipped"].sum()
    finally:
        ended.set()


def leave_signals_to_the_loop(ended: Event, worker: int) -> None:
    """Lets a loader's worker outlive a signal to all processes, as the batches of the last step come from it.

    Args:
        ended: set once no batch is needed any more. From then on SIGTERM is the loader's, for a worker that does not
            end by itself; were it ignored, the process that started the worker would wait for it for ever.
        worker: its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ended.is_set() else None)


def objective_inputs(
    batch: dict[str, torch.Tensor], views: Views, vae: ModelMixin | None, labelled: bool
) -> dict[str, torch.Tensor]:
    """The arguments of `EGCObjective.forward` for one micro-batch of `TrainingSamples`, on the batch's device.

    Latents are samples of the autoencoder's posterior where the batch has noise for it, else its means; `labelled`: the
    model has classes.
    """

    def latents(view: str, posterior_noise: str) -> torch.Tensor:
        return latents_from_moments(vae, views.moments(vae, batch[view]), batch.get(posterior_noise))

    inputs = {"latents": latents("view", "posterior_noise")}
    inputs |= {key: batch[key] for key in ("noise", "timesteps", "timestep_weights", "label_dropped") if key in batch}
    if labelled:
        clean_latents = latents("clean_view", "clean_posterior_noise")
        inputs |= {key: batch[key] for key in ("class_labels", "clean_labels")} | {"clean_latents": clean_latents}
    return inputs


@contextmanager
def running(
    accelerator: Accelerator, lock: AbstractContextManager[Any], step: int, max_steps: int
) -> Iterator[tuple[tqdm, Callable[[], bool]]]:
    """A progress bar under the run's lock, and whether to stop: SIGTERM or SIGINT came, or the launcher is no more.

    A second SIGINT acts as usual. A second SIGTERM does not: a cluster sends it to launcher and process, and the
    launcher sends it on.
    """
    received: list[int] = []
    # Without a launcher the parent may be a shell, which a run under nohup outlives.
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ
    parent = os.getppid()

    def should_stop() -> bool:
        return bool(received) or (is_launched and os.getppid() != parent)

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in previous:
        signal.signal(number, note)
    try:
        disable = not accelerator.is_main_process
        with lock, tqdm(initial=step, total=max_steps, desc="train", disable=disable) as progress:
            yield progress, should_stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        accelerator.end_training()
