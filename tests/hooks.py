"""Changes of the trainer for `setup` of harness.run_trainer, used by more than one test file."""

import os
import signal

import numpy as np


def rank_of(module):
    return int(os.environ.get("RANK", 0))


def die_in_micro_step(number, module):
    """kill -9 itself in the middle of an update: after `number` micro-steps."""
    original, calls = module.train_step, []

    def train_step(run, batch):
        calls.append(1)
        if len(calls) > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(run, batch)

    module.train_step = train_step


def keep_own_pictures(path, module):
    original = module.generate_image

    def generate_image(*args, **kwargs):
        images = original(*args, **kwargs)
        np.save(path, images)
        return images

    module.generate_image = generate_image


def note_samples(folder, module):
    """Writes (step, key) of every sample trained on, one file per rank."""
    original = module.train_step

    def train_step(run, batch):
        with open(f"{folder}/rank-{run.accelerator.process_index}.txt", "a") as file:
            for key, crop in zip(batch["keys"], batch["crop_top_lefts"].tolist()):
                file.write(f"{run.progress.step} {key} {crop}\n")
        return original(run, batch)

    module.train_step = train_step


def samples_by_step(folder):
    steps = {}
    for path in folder.glob("rank-*.txt"):
        for line in path.read_text().splitlines():
            step, sample = line.split(" ", 1)
            steps.setdefault(int(step), []).append(sample)
    return {step: sorted(samples) for step, samples in steps.items()}


def lose_a_number(steps, rank, module):
    """The loss of one rank is NaN in the given steps, of global batches of 4."""
    original = module.diffusion_loss

    def diffusion_loss(models, batch, *args, **kwargs):
        losses = original(models, batch, *args, **kwargs)
        mine = module.torch.distributed.get_rank() if module.torch.distributed.is_initialized() else 0
        reached = batch["positions"][0] // 4 in steps
        return losses * float("nan") if reached and mine == rank else losses

    module.diffusion_loss = diffusion_loss
