"""Put small wrong edits into the scripts, one at a time, and report which of them the tests notice.

    python benchmarks/mutants.py --workers 2 --output_dir /tmp/mutants
    python benchmarks/mutants.py --only clipping --output_dir /tmp/mutants

Each edit is made in a copy of the repository, and the test files named beside it are run there until one fails. The
same tests must pass first in a copy without an edit. Writes mutants.json, which also makes a stopped run continue, and
prints a table. Exits with 1 when an edit survives that has no reason to. 158 edits take over an hour.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 400  # s; an edit that makes the tests hang is noticed too
TRAINER = "train_sdxl_lora.py"
DATA = "sdxl_data.py"
SINGLE_FILE = "sdxl_single_file.py"
LORA = "sdxl_lora.py"
SPEED = "sdxl_speed.py"
MEMORY = "sdxl_memory.py"
EVALUATE = "evaluate.py"
SWEEP = "hpo_sweep.py"


@dataclass(frozen=True)
class Mutant:
    """An edit: in `file`, `old`, which occurs there once, becomes `new`. `tests` names files: tests/test_NAME.py."""

    name: str
    file: str
    tests: str
    old: str
    new: str
    reason: str = ""  # why it may survive


# fmt: off
MUTANTS = [
    # Arguments
    Mutant("alpha 1 by default", TRAINER, "arguments",
        '"lora_alpha": float(args.rank)', '"lora_alpha": 1.0'),
    Mutant("fractions up to 2", TRAINER, "arguments",
        "lambda x: 0 <= x <= 1,", "lambda x: 0 <= x <= 2,"),
    Mutant("old checkpoints are not in the way", TRAINER, "arguments train",
        "if not resume and not args.overwrite_output_dir and data.list_checkpoints(output_dir)", "if False"),
    Mutant("early flag errors only after the imports", TRAINER, "start",
        "    parse_args()\n    launcher_pid", "    launcher_pid"),
    # Models and LoRA
    Mutant("LoRA is not scaled", SPEED, "models",
        "alpha=self.scaling[name])", "alpha=1.0)"),
    Mutant("last encoder layer trained", TRAINER, "models",
        "        count -= 1\n", "        pass\n"),
    Mutant("adapters keep the base's precision", TRAINER, "models",
        "            parameter.data = parameter.data.float()", "            pass"),
    Mutant("int8 gradient without its scale", SPEED, "speed",
        "return grad @ (weight.to(grad.dtype) * scale.to(grad.dtype))", "return grad @ weight.to(grad.dtype)"),
    Mutant("another VAE is the same base model", TRAINER, "resume",
        "fingerprint_parts(unet, vae, *text_encoders)", "fingerprint_parts(unet, *text_encoders)"),
    Mutant("LoRA of text_encoder_2 not merged", LORA, "refiner",
        "            layer.merge(adapter_names=[adapter])\n", ""),
    Mutant("every layer name accepted", TRAINER, "models",
        '        if not any(name == target or name.endswith("." + target) for name in names):', "        if False:"),
    # Data of the run
    Mutant("any fraction may be damaged", TRAINER, "damage",
        "    if bad > limit * total:", "    if False:"),
    Mutant("the seed does not choose the samples", TRAINER, "index data_flags",
        "data.hash64(data.SUBSET, seed, ids)", "data.hash64(data.SUBSET, 0, ids)"),
    Mutant("pixels end above 1", TRAINER, "images",
        "pixels.float().div_(127.5)", "pixels.float().div_(127.0)"),
    Mutant("a signal does not stop the indexing", TRAINER, "signals",
        "return None if stop else data.cached_index_shard", "return data.cached_index_shard"),
    # Encoding
    Mutant("last hidden state", TRAINER, "conditioning",
        "output.hidden_states[-2]", "output.hidden_states[-1]"),
    Mutant("pooled from the last chunk", TRAINER, "conditioning",
        "output.text_embeds[::chunks]", "output.text_embeds[chunks - 1 :: chunks]"),
    Mutant("pooled embeddings never dropped", TRAINER, "conditioning",
        "torch.where(dropped[:, None], empty[1], pooled_prompt_embeds)", "pooled_prompt_embeds"),
    Mutant("no noise in the posterior", TRAINER, "loss",
        "(mean + std * vae_noise)", "mean"),
    Mutant("caches of another VAE are read", TRAINER, "speed",
        '[2, "latents", fingerprint_parts(models.vae),', '[2, "latents",'),
    Mutant("one chunk is enough", TRAINER, "conditioning",
        'if mode == "chunk" else 1\n', "if False else 1\n"),
    # Loss
    Mutant("highest timestep left out", TRAINER, "loss refiner",
        "timestep_band[1] + 1", "timestep_band[1]"),
    Mutant("noise offset differs in each pixel", TRAINER, "loss",
        "torch.randn((latent_shape[0], 1, 1), generator=generator)", "torch.randn(latent_shape, generator=generator)"),
    Mutant("v-prediction weighted as epsilon", TRAINER, "loss",
        "snr + 1 if prediction_type", "snr if prediction_type"),
    Mutant("kept captions dropped", TRAINER, "loss",
        'draws["caption_draws"] <', 'draws["caption_draws"] >'),
    Mutant("crop before size in the time ids", TRAINER, "conditioning",
        'batch["original_sizes"], batch["crop_top_lefts"], last]',
        'batch["crop_top_lefts"], batch["original_sizes"], last]'),
    Mutant("the target is always the noise", TRAINER, "loss",
        'target = noise if prediction_type == "epsilon" else', "target = noise if True else"),
    # Optimizer
    Mutant("text encoders learn at the UNet's rate", TRAINER, "models speed",
        "else text_encoder_lr_scale)", "else 1.0)"),
    Mutant("no weight decay", TRAINER, "optimizer",
        '"weight_decay": args.adam_weight_decay', '"weight_decay": 0.0'),
    Mutant("the schedule is a step ahead", TRAINER, "train",
        "run.lr_schedule(progress.step)", "run.lr_schedule(progress.step + 1)"),
    # Checkpoints
    Mutant("optimizer not restored", TRAINER, "checkpoints",
        "            part.load_state_dict(torch.load(", "            (torch.load("),
    Mutant("damaged checkpoints are loaded", TRAINER, "resume checkpoints",
        "    if found == text:", "    if True:"),
    Mutant("rows of the future stay", TRAINER, "checkpoints signals",
        "        if step < progress.step or (step == progress.step and not is_repeated):", "        if True:"),
    Mutant("alpha of rsLoRA as if it were LoRA", LORA, "checkpoints",
        "            alpha *= math.sqrt(rank)\n", "            pass\n"),
    Mutant("one checkpoint too many", TRAINER, "checkpoints",
        "others[: len(others) + 1 - keep]", "others[: len(others) - keep]"),
    Mutant("noise offset may differ on resume", TRAINER, "resume",
        "base_precision noise_offset\n    optimizer", "base_precision\n    optimizer"),
    Mutant("another global batch is accepted", TRAINER, "resume",
        'args.gradient_accumulation_steps * accelerator.num_processes\n    signature["dataset"]',
        'args.gradient_accumulation_steps\n    signature["dataset"]'),
    Mutant("two runs in one folder", TRAINER, "kill",
        "        except (BlockingIOError, PermissionError) as error:", "        except ZeroDivisionError as error:"),
    Mutant("the hub token is written", TRAINER, "train",
        'leave_out = ("config", "hub_token",', 'leave_out = ("config",'),
    Mutant("files are not flushed to the disk", TRAINER, "checkpoints disk_full kill",
        "    os.fsync(descriptor)\n", ""),
    Mutant("what a killed save leaves is never removed", TRAINER, "kill disk_full checkpoints",
        '    unfinished = Path(output_dir) / f".checkpoint-{step}.partial"',
        '    unfinished = Path(output_dir) / f"checkpoint-{step}.partial"'),
    # Validation
    Mutant("validation noise by row", TRAINER, "validation",
        "int(index.id_hashes[i] >> np.uint64(1))) for i in padded]", "int(i)) for i in padded]"),
    Mutant("validation with LoRA dropout", TRAINER, "validation",
        "            model.eval()\n", "            pass\n"),
    Mutant("padding is counted", TRAINER, "validation",
        "run.weight_dtype).double()[:size]", "run.weight_dtype).double()"),
    Mutant("replacements are counted", TRAINER, "validation skipped damage",
        'to_device(~torch.tensor(batch["replaced"][:size]), device)',
        "to_device(torch.ones(size, dtype=torch.bool), device)"),
    Mutant("all samples have one seed", TRAINER, "validation checkpoints",
        "generator = torch.Generator().manual_seed(seed)\n    options",
        "generator = torch.Generator().manual_seed(0)\n    options"),
    Mutant("the highest loss is the best", TRAINER, "validation train",
        'val_loss < best["val_loss"]', 'val_loss > best["val_loss"]'),
    # Train loop
    Mutant("no clipping", TRAINER, "train_step",
        "accelerator.clip_grad_norm_(parameters, args.max_grad_norm)", "accelerator.clip_grad_norm_(parameters, 1e9)"),
    Mutant("one dropout mask for all steps", TRAINER, "train_step models",
        'run.progress.seed, batch["positions"][0]))', "run.progress.seed, 0))"),
    Mutant("gradients are never cleared", TRAINER, "train train_step checkpoints",
        "    run.optimizer.zero_grad(set_to_none=True)\n", ""),
    Mutant("a signal to one rank is not shared", TRAINER, "signals",
        "torch.tensor([0.0, 0.0, float(bool(stop)), len(skipped)]", "torch.tensor([0.0, 0.0, 0.0, len(skipped)]"),
    Mutant("a lost loss is no reason to stop", TRAINER, "nonfinite",
        "    if not may_skip or progress.nonfinite_in_a_row >", "    if progress.nonfinite_in_a_row >"),
    Mutant("the logged loss is a sum of all", TRAINER, "train checkpoints",
        "    progress.loss_sum, progress.loss_count = 0.0, 0\n", ""),
    Mutant("checkpoints from the start", TRAINER, "checkpoints",
        " and step >= args.checkpointing_after_steps", ""),
    Mutant("an interrupted validation is forgotten", TRAINER, "signals",
        "    run.progress.validation_due = True\n", ""),
    # Plan
    Mutant("the counts of --class_csv are not used", DATA, "plan",
        "counts = csv_counts or dict(", "counts = dict("),
    Mutant("the cosine runs backwards", DATA, "plan",
        "progress = 0.5 - 0.5 *", "progress = 0.5 + 0.5 *"),
    Mutant("common classes stay common", DATA, "plan",
        "self.target(step) / self.arrival, 0.0)", "self.target(step), 0.0)"),
    Mutant("images without a label are always taken", DATA, "plan",
        "ratio / ratio.max(), UNLABELLED_ACCEPTANCE)", "ratio / ratio.max(), 1.0)"),
    Mutant("one of two labels for the whole run", DATA, "plan",
        "uniform(LABEL, self.seed, epoch, ids)", "uniform(LABEL, self.seed, 0, ids)"),
    Mutant("every epoch in the same order", DATA, "plan",
        "hash64(ORDER, self.seed, epoch,", "hash64(ORDER, self.seed, 0,"),
    Mutant("every epoch accepts the same images", DATA, "plan",
        "uniform(ACCEPT, self.seed, epoch, ids)", "uniform(ACCEPT, self.seed, 0, ids)"),
    Mutant("all buckets are equally likely", DATA, "plan",
        "        return accepted / accepted.sum()", "        return np.full(len(accepted), 1 / len(accepted))"),
    Mutant("saved cursors are a step behind", DATA, "checkpoints",
        "            rows, labels = self.plan.next_batch()\n"
        "            self.states[self.plan.step] = [tuple(cursor) for cursor in self.plan.cursors]\n",
        "            now = [tuple(cursor) for cursor in self.plan.cursors]\n"
        "            rows, labels = self.plan.next_batch()\n            self.states[self.plan.step] = now\n"),
    Mutant("a batch shares one noise", DATA, "train plan images",
        "int(labels[i]), step, first + i)", "int(labels[i]), step, first)"),
    # Index
    Mutant("duplicates are kept", DATA, "damage",
        '        if row["digest"] != first["digest"]:', "        if False:"),
    Mutant("a lost end of the archive is not reported", DATA, "damage",
        "    if zero_blocks < 2:", "    if False:"),
    Mutant(".JPG is no image", DATA, "index",
        "if folder else first, inner, extension[1:].lower()", "if folder else first, inner, extension[1:]"),
    Mutant("what fills the last block does not matter", DATA, "tars",
        """head, not filler.strip(b"\\0"))""", "head, True)"),
    Mutant("control characters are text", DATA, "tars folders",
        'value != "" and not NO_TEXT.search(value)', 'value != ""'),
    Mutant("a piece of JSON is a caption", DATA, "tars",
        "    if files and any(f'", "    if False and any(f'"),
    Mutant("a cut is beside nothing", DATA, "tars",
        '            report(f"shard cut short: inside {name}")\n            yield None\n',
        '            report(f"shard cut short: inside {name}")\n'),
    Mutant("a lost .json is not missed", DATA, "tars",
        "nearly_all_have_it = len(without_json) <= len(rows) / 8", "nearly_all_have_it = False"),
    Mutant("resource forks are samples", DATA, "tars",
        'if any(map(JUNK.match, name.split("/"))):', "if False:"),
    Mutant("all dots end the key", DATA, "tars",
        "        first, inner = stem, \"\"\n", "        pass\n"),
    Mutant("colours stay in their profile", DATA, "tars",
        'image = image if transform is None else', 'image = image if True else'),
    Mutant("a broken profile is damage", DATA, "tars",
        "too small,colour profile ignored,", "too small,"),
    Mutant("the instance prompt comes first", DATA, "folders",
        "if not captions and fields.instance_prompt:", "if fields.instance_prompt:"),
    Mutant("a caption file before metadata", DATA, "folders",
        "captions = captions or decode_captions(Path(file)", "captions = decode_captions(Path(file)"),
    Mutant("circles of links never end", DATA, "folders",
        "if real in above or (above and real in excluded):", "if above and real in excluded:"),
    Mutant("output in the folder is data", DATA, "folders",
        "if real in above or (above and real in excluded):", "if real in above:"),
    Mutant("repeats have no weight", DATA, "folders",
        "weights=weights * repeats[rows]", "weights=weights"),
    Mutant("é is not é", DATA, "folders",
        'unicodedata.normalize("NFC", os.path.normpath(path))', "os.path.normpath(path)"),
    Mutant("always the first caption", DATA, "captions",
        "int(uniform(CAPTION, seed, position) * len(captions))", "0"),
    Mutant("the cache has one caption", DATA, "captions",
        'self.embeddings.read(row["image_id"], caption_number)', 'self.embeddings.read(row["image_id"], 0)'),
    Mutant("tags in one order for all samples", DATA, "captions",
        "hash64(TAG_ORDER, seed, position, free)", "hash64(TAG_ORDER, seed, 0, free)"),
    Mutant("kept tags are dropped", DATA, "captions",
        "free = np.arange(self.kept, len(tags))", "free = np.arange(len(tags))"),
    Mutant("the trigger word is shuffled", TRAINER, "captions",
        'kept=args.keep_tags + len(tags.split(args.trigger_word or ""))', "kept=args.keep_tags"),
    Mutant("held-out images are trained on", TRAINER, "captions",
        "table.filter(pa.array(~sides)), table.filter", "table, table.filter"),
    Mutant("skipped.jsonl is written too late", TRAINER, "folders",
        "            list_skipped(args, damage)\n        raise", "            pass\n        raise"),
    Mutant("small images are damage", DATA, "captions",
        "hidden,too small,", "hidden,"),
    Mutant("labels differ by case", DATA, "index",
        "str(label).strip().casefold() for label in labels", "str(label).strip() for label in labels"),
    Mutant("width before height", DATA, "index images",
        "return (width, height) if is_turned else (height, width)", "return (width, height)"),
    Mutant("a changed shard is read on", DATA, "sources",
        "if expected is not None and self.stamp != expected:", "if False:"),
    Mutant("a download cut short is used", DATA, "sources",
        'if expected not in ("None", str(partial.stat().st_size)):', "if False:"),
    # Images and batches
    Mutant("one flip for all steps", DATA, "images data_flags",
        'uniform(FLIP, self.seed, hash_text(row["image_id"]), step)',
        'uniform(FLIP, self.seed, hash_text(row["image_id"]), 0)'),
    Mutant("one crop for all steps", DATA, "images data_flags",
        'uniform(CROP, self.seed, hash_text(row["image_id"]), step)',
        'uniform(CROP, self.seed, hash_text(row["image_id"]), 0)'),
    Mutant("panoramas are cropped anywhere", DATA, "images",
        "    if ratio > 2:\n", "    if ratio > 20:\n"),
    Mutant("left before top", DATA, "images",
        '"crop_top_lefts": (top, left)', '"crop_top_lefts": (left, top)'),
    Mutant("transparency over black", DATA, "images",
        'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")'),
    Mutant("a replacement of any class", DATA, "skipped images damage",
        "of_class[owners[self.index.label_codes == label]] = True", "of_class[owners] = True"),
    Mutant("scores above 10", DATA, "images refiner",
        "min(max(value / scale, 1.0), 10.0)", "max(value / scale, 1.0)"),
    Mutant("cached images are never mirrored", DATA, "speed",
        'self.latents.read(row["image_id"], self.images.is_flipped(row, step))', 'self.latents.read(row["image_id"])'),
    Mutant("a cache holds for any flags", DATA, "speed",
        "text = json.dumps([settings,", "text = json.dumps([None,"),
    # Evaluation
    Mutant("all prompts share one noise", EVALUATE, "evaluate pictures",
        "sdxl_data.torch_seed(sdxl_data.hash_text(prompt.id), seed)", "sdxl_data.torch_seed(0, seed)"),
    Mutant("pictures of another LoRA are taken over", EVALUATE, "evaluate pictures",
        "for file in (model.lora, model.refiner_lora)", "for file in (model.refiner_lora,)"),
    Mutant("--lora_scale is 1", EVALUATE, "evaluate pictures",
        "getattr(pipeline, part), name, self.args.lora_scale)", "getattr(pipeline, part), name, 1.0)"),
    Mutant("aesthetic counts tenfold", EVALUATE, "evaluate pictures",
        "weights[1] * aesthetic / 10", "weights[1] * aesthetic"),
    Mutant("differences are not paired", EVALUATE, "evaluate pictures",
        'paired = [float(of_base[row["prompt_id"], row["seed"]][metric])',
        "paired = [float(next(iter(of_base.values()))[metric])"),
    Mutant("images instead of prompts are resampled", EVALUATE, "evaluate pictures",
        "np.unique(np.asarray(groups), return_inverse=True)",
        "np.unique(np.arange(len(values)), return_inverse=True)"),
    Mutant("each training image is its own copy", EVALUATE, "evaluate pictures",
        "        if itself:\n", "        if False:\n"),
    Mutant("mirrored copies are missed", EVALUATE, "evaluate pictures",
        "np.stack([thumbnails, mirror_thumbnails(thumbnails)], axis=1)", "np.stack([thumbnails, thumbnails], axis=1)"),
    Mutant("the base denoises to the end", EVALUATE, "evaluate pictures",
        "denoising_end=args.denoising_start if self.refiner is not None else None", "denoising_end=None"),
    # Sweep
    Mutant("good trials are pruned", SWEEP, "study sweep",
        'sign = -1 if sweep.directions[0] == "maximize" else 1', "sign = 1"),
    Mutant("no warm-up before pruning", SWEEP, "study sweep",
        "optuna.pruners.MedianPruner(sweep.args.startup_trials, sweep.args.pruning_warmup)",
        "optuna.pruners.MedianPruner(sweep.args.startup_trials, 0)"),
    Mutant("killed trials are tried for ever", SWEEP, "sweep",
        "if killed and attempt < MAX_ATTEMPTS and", "if killed and"),
    Mutant("the worst trials are kept", SWEEP, "sweep study",
        "sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE",
        "sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE"),
    Mutant("conditions are not looked at", SWEEP, "sweep",
        "        return all(flags.get(name) == value for name, value in self.when)", "        return True"),
    Mutant("a study goes on with other flags", SWEEP, "sweep study",
        "        if value != stored[name]:", "        if False:"),
    # a LoRA to start from, LoRAs to merge
    Mutant("alphas of a LoRA file do not count", LORA, "lora_files",
        'alpha = file.alphas[keys["alpha"]]', "alpha = rank"),
    Mutant("rsLoRA in a LoRA's header is not read", LORA, "lora_files",
        'is_rslora = bool(file.settings.get(f"{part}.use_rslora"))', "is_rslora = False"),
    Mutant("alphas by layer in a LoRA's header are not read", LORA, "lora_files",
        "alpha = patterns.get(next(matching, None), file", "alpha = (file"),
    Mutant("LoRAs are merged at scale 1", LORA, "lora_files",
        "layer.scaling[adapter] *= scale", "layer.scaling[adapter] *= 1"),
    Mutant("the merged sum is rounded with each LoRA", LORA, "lora_files",
        "        base.float()\n", ""),
    Mutant("original names of resnets are unknown", LORA, "lora_files",
        "ORIGINAL_RESNET.get(match[5], match[5])", "match[5]"),
    Mutant("half a DoRA is read as LoRA", LORA, "lora_files",
        "    if 0 < count < len(layers):", "    if False:"),
    Mutant("magnitudes of convolutions get an axis too many", LORA, "init_lora",
        "tensor[:, None] if tensor.ndim == 1 else tensor.transpose(0, 1)", "tensor[:, None]"),
    Mutant("the weights of --init_lora are not loaded", TRAINER, "init_lora",
        "            sdxl_lora.load_lora(file, name, model)\n", "            pass\n"),
    Mutant("adapters in the unused last layer are trained", TRAINER, "init_lora",
        "    encoder.layers[-1].requires_grad_(False)\n", "    pass\n"),
    Mutant("flags may contradict --init_lora", TRAINER, "init_lora",
        "        if given not in (None, value):", "        if False:"),
    Mutant("another --init_lora on resume", TRAINER, "init_lora",
        "sdxl_lora.hash_file(sdxl_lora.find_lora(args.init_lora)) if args.init_lora else None", "None"),
    Mutant("another --merge_lora on resume", TRAINER, "init_lora",
        '"merge_lora": sdxl_lora.list_merges(args.merge_lora) or None', '"merge_lora": None'),
    Mutant("cached captions hold for any merged LoRA", TRAINER, "init_lora",
        "models.caption_chunks, *models.merged_loras]", "models.caption_chunks]"),
    Mutant("evaluation without the merged LoRAs", EVALUATE, "init_lora",
        "        sdxl_lora.merge_given_loras(self.args.merge_lora, parts)\n", ""),
    Mutant("pictures of other merged LoRAs are taken over", EVALUATE, "init_lora",
        "    newer += map(repr, sdxl_lora.list_merges(args.merge_lora))\n", ""),
    Mutant("a sweep scores without the merged LoRAs", SWEEP, "init_lora",
        '[*names.split(), "merge_lora", "cache_dir"]', '[*names.split(), "cache_dir"]'),
    Mutant("a DoRA is merged as if no LoRA came before", LORA, "lora_files",
        "            layer.merged_adapters.clear()", "            pass"),
    Mutant("magnitudes of columns are taken for those of rows", LORA, "lora_files",
        "if math.prod(found) != expected[kind] or not is_row:", "if math.prod(found) != expected[kind]:"),
    Mutant("a NaN is merged", LORA, "lora_files",
        "if not weight.isfinite().all():", "if False:"),
    Mutant("LoRAs in --output_dir are merged and overwritten", TRAINER, "init_lora",
        'args.init_lora or os.devnull), *named]:', 'args.init_lora or os.devnull)]:'),
    # evaluation: the side of the images, separate disks; space for a checkpoint
    Mutant("the main process lacks images of other disks", EVALUATE, "evaluate_disks",
        "        if 0 not in ranks and ranks[:1] == [state.process_index]:", "        if False:"),
    Mutant("LoRAs of another side are not told", EVALUATE, "evaluate_disks",
        "if trained not in (None, args.resolution):", "if False:"),
    Mutant("a full disk is noticed at the first checkpoint", TRAINER, "disk_full",
        "    if free < needed:", "    if False:"),
    # a base model in one file; what a run needs, asked first
    Mutant("the marker of v-prediction is not read", SINGLE_FILE, "checkpoint_files",
        'if "v_pred" in markers:', 'if "v_prediction" in markers:'),
    Mutant("the marker of zero SNR is not read", SINGLE_FILE, "checkpoint_files",
        'if "ztsnr" in markers:', 'if "zero_snr" in markers:'),
    Mutant("converted again for each process", SINGLE_FILE, "checkpoint_files",
        "        if folder.exists():\n            return\n", "        shutil.rmtree(folder, ignore_errors=True)\n"),
    Mutant("a killed conversion stands in the way", SINGLE_FILE, "checkpoint_files",
        "        shutil.rmtree(partial_folder, ignore_errors=True)  # left by a killed process\n", ""),
    Mutant("the date of a file does not matter", SINGLE_FILE, "checkpoint_files",
        "state.st_size, state.st_mtime_ns, read_header", "state.st_size, read_header"),
    Mutant("the second tokenizer pads like the first", SINGLE_FILE, "checkpoint_files",
        '"tokenizer_2": "!"}', '"tokenizer_2": "<|endoftext|>"}'),
    Mutant("all parts in the precision of a small tensor", SINGLE_FILE, "checkpoint_files",
        "return max(named or", "return min(named or"),
    Mutant("pickles are opened", SINGLE_FILE, "checkpoint_files",
        "    if path.suffix.lower() in PICKLES:\n", "    if False:\n"),
    Mutant("8-bit files are accepted", SINGLE_FILE, "checkpoint_files",
        'dtype.startswith(("F8", "F4"))', 'dtype.startswith(("F2", "F4"))'),
    Mutant("noise prediction with zero SNR", TRAINER, "checkpoint_files",
        'if config.get("prediction_type", "epsilon") == "epsilon":', "if False:"),
    Mutant("zero SNR sampled with leading timesteps", TRAINER, "checkpoint_files",
        '        config["timestep_spacing"] = "trailing"', '        config["timestep_spacing"] = "leading"'),
    Mutant("samples without guidance rescale", TRAINER, "checkpoint_files pictures",
        "return GUIDANCE_RESCALE if", "return 0.0 if"),
    Mutant("the encoded training set is uploaded", TRAINER, "services",
        "files = [LORA_FILE, sdxl_lora.KOHYA_FILE,", 'files = ["*.safetensors",'),
    Mutant("a refusing hub is heard at the end", TRAINER, "services",
        "        check_services(args, list(map(str, accelerator.log_with)))\n", ""),
    Mutant("restarts are not counted", TRAINER, "optimizer",
        '"num_cycles": num_cycles', '"num_cycles": 1'),
    # Any number of processes, memory, environment
    Mutant("DDP chooses its buckets after the first step", TRAINER, "kill",
        "for model in prepared if accelerator.num_processes > 1 else ():", "for model in ():"),
    Mutant("gradients of accumulation take no memory", MEMORY, "memory",
        "keeps_gradients = shapes.processes > 1 or args.gradient_accumulation_steps > 1", "keeps_gradients = False"),
    Mutant("the VAE takes no memory", MEMORY, "memory",
        "        frozen += weight_bytes(shapes.vae)\n", ""),
    Mutant("attention scores take no memory", MEMORY, "memory",
        'nullcontext() if backend == "math" else fused_attention()', "fused_attention()"),
    Mutant("sample images take no memory", MEMORY, "memory",
        "        samples=estimate_samples(args, shapes),\n", "        samples=0,\n"),
    Mutant("the device with the most memory counts", TRAINER, "memory",
        "return None if None in free else min(free)", "return None if None in free else max(free)"),
    Mutant("auto takes what does not fit", MEMORY, "memory",
        "        if need.fits(free):\n            break\n", "        break\n"),
    Mutant("a smaller batch without accumulation", MEMORY, "memory",
        '"gradient_accumulation_steps": images // batch_size', '"gradient_accumulation_steps": 1'),
    Mutant("emulated bf16 counts", TRAINER, "memory",
        "is_bf16_supported(including_emulation=False)", "is_bf16_supported()"),
    Mutant("accumulation of the launcher is not taken over", TRAINER, "environment",
        "    args.gradient_accumulation_steps = int(steps)\n", ""),
    Mutant("data may end early", TRAINER, "environment",
        "if progress.step < run.batches.last_step and not run.stopping:", "if False:"),
    Mutant("a closed terminal kills", DATA, "environment",
        '("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if', '("SIGTERM", "SIGINT", "SIGUSR1") if'),
    Mutant("nohup has no effect", DATA, "environment",
        "    STOP_SIGNALS.remove(signal.SIGHUP)", "    pass"),
    Mutant("later checkpoints stay", TRAINER, "environment",
        "        if later > step:\n", "        if False:\n"),
    Mutant("the checkpoint just written is pruned", TRAINER, "checkpoints",
        "list_checkpoints(output_dir) if path != final]", "list_checkpoints(output_dir)]"),
    Mutant("a finished run is finished again", TRAINER, "environment",
        "            if run_on_main(accelerator, lambda: is_finished(run)):", "            if False:"),
    Mutant("the launcher is not told the reason", TRAINER, "environment",
        "        Path(path).write_text(json.dumps(", "        str(json.dumps("),
    Mutant("other ranks do not know the reason", TRAINER, "environment",
        "find_other_error(args) or f", "f"),
    Mutant("a sweep without results ends with 0", SWEEP, "sweep",
        "\"no reason\")\n    return 1", "\"no reason\")\n    return 0"),
]
# fmt: on


def make_copy(folder):
    """Copies what git tracks, and new files, of the repository into `folder`."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, names.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target)


def run_tests(folder, names, workers=0, timeout=TIMEOUT):
    """(passed, the first failure or "", seconds) of the test files tests/test_NAME.py of the copy in `folder`."""
    files = [f"tests/test_{name}.py" for name in names.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *files]
    command += ["-n", str(workers), "-m", "not slow and not sagemaker and not gpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.monotonic()
    try:
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False, "the tests hang", timeout
    seconds = round(time.monotonic() - started)
    if result.returncode == 0:
        return True, "", seconds
    failure = re.search(r"^(?:FAILED|ERROR) tests/test_(\S+)", result.stdout, re.MULTILINE)
    return False, failure[1] if failure else result.stdout[-300:] + result.stderr[-300:], seconds


def apply(mutant, folder):
    """Makes the edit in the copy. Errors: SystemExit when the text to replace is not there exactly once."""
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: found {text.count(mutant.old)} times in {mutant.file}, expected once: {mutant.old}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def try_mutant(mutant, folders):
    """What the tests say of one edit, as a row of mutants.json; `folders` holds the copies that are free."""
    folder = folders.get()
    original = (folder / mutant.file).read_bytes()
    try:
        apply(mutant, folder)
        passed, failure, seconds = run_tests(folder, mutant.tests)
    finally:
        (folder / mutant.file).write_bytes(original)
        folders.put(folder)
    row = {**asdict(mutant), "survived": passed, "killed_by": failure, "seconds": seconds}
    print(f"{'SURVIVED' if passed else 'killed'}: {mutant.name} ({seconds} s) {failure}", flush=True)
    return row


def print_table(rows):
    print("\n| edit | file | result |\n|---|---|---|")
    for row in rows:
        result = f"killed by {row['killed_by']}"
        if row["survived"]:
            result = f"**survived**: {row['reason'] or 'no reason known'}"
        print(f"| {row['name']} | {row['file']} | {result} |")
    survived = sum(row["survived"] for row in rows)
    print(f"\n{len(rows)} edits: {len(rows) - survived} killed, {survived} survived")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("mutants"), help="for mutants.json")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="edits tried at the same time")
    parser.add_argument("--only", metavar="TEXT", help="only edits whose name contains TEXT")
    parser.add_argument("--check", action="store_true", help="only check that every edit still applies")
    args = parser.parse_args()

    chosen = [mutant for mutant in MUTANTS if args.only is None or args.only in mutant.name]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    journal = args.output_dir / "mutants.json"
    rows = {row["name"]: row for row in json.loads(journal.read_text())} if journal.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = Queue()
        for number in range(args.workers):
            folder = Path(scratch) / str(number)
            make_copy(folder)
            folders.put(folder)
        for mutant in chosen:
            text = (folder / mutant.file).read_bytes()
            apply(mutant, folder)
            (folder / mutant.file).write_bytes(text)
        if args.check:
            return

        # A finished edit is tried again when it has changed, and when it survived.
        waiting = [m for m in chosen if asdict(m).items() - rows.get(m.name, {}).items() or rows[m.name]["survived"]]
        needed = sorted({name for mutant in waiting for name in mutant.tests.split()})
        if needed:
            passed, failure, seconds = run_tests(folder, " ".join(needed), args.workers, timeout=3600)
            if not passed:
                sys.exit(f"without an edit the tests fail: {failure}")
            print(f"without an edit: {len(needed)} test files pass in {seconds} s", flush=True)
        with ThreadPoolExecutor(args.workers) as pool:
            for row in pool.map(lambda mutant: try_mutant(mutant, folders), waiting):
                rows[row["name"]] = row
                journal.write_text(json.dumps(list(rows.values()), indent=1))
    rows = [rows[mutant.name] for mutant in chosen]
    print_table(rows)
    sys.exit(any(row["survived"] and not row["reason"] for row in rows))


if __name__ == "__main__":
    main()
