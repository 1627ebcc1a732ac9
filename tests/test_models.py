import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.loaders.peft import PeftAdapterMixin
from harness import SDXL
from peft import LoraConfig

import sdxl_data
import sdxl_speed
import train_sdxl_lora as trainer


class Stack(torch.nn.Module, PeftAdapterMixin):
    """A small residual network of Linears that takes adapters as a UNet does."""

    def __init__(self, width=64):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        for layer in (self.to_q, self.to_k, self.to_v):
            x = x + F.gelu(layer(x))
        return x


TARGETS = ["to_q", "to_k", "to_v"]
CONFIG = {"r": 4, "lora_alpha": 8}


def pair(seed, **config):
    """The same frozen Stack with the same random adapters, once by the trainer and once by stock PEFT."""
    torch.manual_seed(seed)
    base = Stack().requires_grad_(False)
    base.load_state_dict({k: v.bfloat16().float() for k, v in base.state_dict().items()})  # the same in both dtypes
    ours, stock = copy.deepcopy(base), copy.deepcopy(base)
    trainer.add_adapter(ours, "--lora_target_modules", TARGETS, **CONFIG, **config)
    stock.add_adapter(LoraConfig(target_modules=TARGETS, **CONFIG, **config))
    for name, parameter in adapters(ours).items():
        parameter.data.normal_(std=0.2)
        stock.get_parameter(name).data.copy_(parameter)
    return ours, stock


def adapters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def cast_frozen(model, dtype):
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def gradients(model, x, weights):
    (model(x).float() * weights).sum().backward()
    return torch.cat([p.grad.float().flatten() for p in adapters(model).values()])


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 64, generator=generator).bfloat16().float(), torch.randn(32, 64, generator=generator)


@pytest.fixture(scope="module")
def args(parse):
    return parse("--rank", 4)


@pytest.fixture
def change(args):
    """A copy of the flags with some of them changed."""
    return lambda **flags: type(args)(**vars(args) | flags)


def load(args, dtype=torch.float32):
    return trainer.load_models(args, dtype, "cpu")


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_adapters_compute_in_fp32_what_stock_peft_does(config):
    """DoRA to the bit; the others sum in the product's kernel, no further from float64 than PEFT."""
    ours, stock = pair(0, **config)
    x, weights = batch(1)
    kind = sdxl_speed.CastLinear if "use_dora" in config else sdxl_speed.FusedLora
    assert any(isinstance(m, kind) for m in ours.modules())
    found, theirs = ([model(x), gradients(model, x, weights)] for model in (ours, stock))
    if "use_dora" in config:
        assert all(map(torch.equal, found, theirs))
        return
    exact = copy.deepcopy(stock).double()
    truth = [exact(x.double()), gradients(exact, x.double(), weights.double())]
    for a, b, c in zip(found, theirs, truth):
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-9 and (b - c).norm() > 0


def test_bf16_gradients_are_as_good_as_with_autocast():
    errors = {"ours": 0.0, "autocast": 0.0}
    for seed in range(8):
        ours, stock = pair(seed)
        x, weights = batch(100 + seed)
        truth = gradients(copy.deepcopy(stock), x, weights)
        cast_frozen(ours, torch.bfloat16)
        errors["ours"] += ((gradients(ours, x.bfloat16(), weights) - truth).norm() / truth.norm()).item()
        cast_frozen(stock, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(stock, x.bfloat16(), weights)
        errors["autocast"] += ((found - truth).norm() / truth.norm()).item()
    assert 0 < errors["ours"] <= 1.2 * errors["autocast"]


def test_activations_stay_in_the_base_dtype_and_gradients_in_fp32():
    ours, _ = pair(0)
    cast_frozen(ours, torch.bfloat16)
    seen = []
    for module in ours.modules():
        module.register_forward_hook(lambda m, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    x, weights = batch(0)
    gradients(ours, x.bfloat16(), weights)
    assert set(seen) == {torch.bfloat16}
    assert {p.grad.dtype for p in adapters(ours).values()} == {torch.float32}


def test_a_fresh_adapter_changes_nothing_and_one_seed_gives_one_adapter(args):
    torch.manual_seed(0)
    base = Stack().requires_grad_(False)
    x, _ = batch(0)
    before = base(x)
    trainer.add_adapter(base, "--lora_target_modules", TARGETS, **CONFIG)
    assert torch.equal(base(x), before)
    first, again, other = (
        torch.cat([p.flatten() for p in adapters(trainer.add_adapters(args, load(args), seed)["unet"]).values()])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_fp32_whatever_the_base_is(change, dtype):
    flags = change(train_text_encoder=True, vae_precision="bf16")
    models = load(flags, dtype)
    trained = trainer.add_adapters(flags, models, 0)
    assert list(trained) == ["unet", "text_encoder", "text_encoder_2"]
    for model in trained.values():
        assert {p.dtype for p in adapters(model).values()} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
        assert all("lora" in name for name in adapters(model))
    assert models.vae.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in models.vae.parameters())


def test_only_the_unet_is_adapted_unless_the_encoders_are_asked_for(change):
    models = load(change())
    assert list(trainer.add_adapters(change(), models, 0)) == ["unet"]
    assert not any(p.requires_grad for encoder in models.text_encoders for p in encoder.parameters())


@pytest.mark.parametrize("targets", [["to_x"], ["to_q", "to_x"], ["to_x", "to_q"]])
def test_an_unknown_target_is_an_error_that_names_the_flag_and_the_target(change, targets):
    with pytest.raises(sdxl_data.InputError, match="--lora_target_modules: .*to_x"):
        trainer.add_adapters(change(lora_target_modules=targets), load(change()), 0)


def test_a_part_of_a_name_is_no_target(change):
    with pytest.raises(sdxl_data.InputError, match="--lora_target_modules: .*o_q"):
        trainer.add_adapters(change(lora_target_modules=["o_q"]), load(change()), 0)


@pytest.mark.parametrize("target", ["norm1", "attn1"])
def test_a_target_that_cannot_take_an_adapter_is_an_error_that_names_the_flag(change, target):
    with pytest.raises(sdxl_data.InputError, match="--lora_target_modules"):
        trainer.add_adapters(change(lora_target_modules=[target]), load(change()), 0)


def test_every_default_target_of_the_unet_has_an_adapter(change):
    models = load(change())
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    wanted = {name for name, _ in models.unet.named_modules() if name.endswith(targets)}
    unet = trainer.add_adapters(change(), models, 0)["unet"]
    found = {name.partition(".lora_")[0] for name in adapters(unet)}
    assert found == wanted and len(found) > 8


def test_the_last_layer_of_text_encoder_alone_has_no_adapter(change):
    flags = change(train_text_encoder=True)
    trained = trainer.add_adapters(flags, load(flags), 0)
    for name, adapted_layers in (("text_encoder", -1), ("text_encoder_2", 0)):
        layers = trained[name].config.num_hidden_layers
        found = {int(key.split("layers.")[1].split(".")[0]) for key in adapters(trained[name])}
        assert found == set(range(layers + adapted_layers))
        kinds = {key.split("self_attn.")[1].split(".")[0] for key in adapters(trained[name])}
        assert kinds == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_rank_alpha_and_rslora_make_the_scale(change):
    flags = {"rank": 3, "lora_alpha": 6, "train_text_encoder": True}
    flags |= {"text_encoder_rank": 2, "text_encoder_alpha": 3}
    for rslora in (False, True):
        asked = change(use_rslora=rslora, **flags)
        for name, model in trainer.add_adapters(asked, load(asked), 0).items():
            rank, alpha = (3, 6) if name == "unet" else (2, 3)
            layers = [m for m in model.modules() if hasattr(m, "lora_A")]
            assert {tuple(m.scaling.values()) for m in layers} == {(alpha / (math.sqrt(rank) if rslora else rank),)}
            assert {m.lora_A["default"].weight.shape[0] for m in layers} == {rank}


def test_every_trainable_parameter_is_in_exactly_one_group_with_its_learning_rate(change):
    flags = change(train_text_encoder=True)
    models = load(flags)
    groups = trainer.make_parameter_groups(trainer.add_adapters(flags, models, 0), 1e-3, 0.25)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    expected = {id(p): 1e-3 for p in adapters(models.unet).values()}
    expected |= {id(p): 0.25e-3 for encoder in models.text_encoders for p in adapters(encoder).values()}
    assert rates == expected
    assert not any(p.requires_grad for p in models.vae.parameters())


@pytest.mark.parametrize("encoders", [False, True])
def test_gradient_checkpointing_reaches_every_trained_model_and_changes_no_gradient(change, encoders):
    found = []
    for checkpointing in (False, True):
        speed = {"attention_backend": "sdpa", "compile": False, "train_batch_size": 1, "resolution": 64}
        speed["gradient_checkpointing"] = "full" if checkpointing else "none"
        flags = change(train_text_encoder=encoders, **speed)
        models = load(flags)
        trainer.set_speed(flags, trainer.add_adapters(flags, models, 0), flags.gradient_checkpointing)
        assert models.unet.is_gradient_checkpointing == checkpointing
        assert {encoder.is_gradient_checkpointing for encoder in models.text_encoders} == {checkpointing and encoders}
        added = {"text_embeds": torch.ones(1, 96), "time_ids": torch.full((1, 6), 64.0)}
        models.unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 160), added_cond_kwargs=added).sample.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in adapters(models.unet).values()]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5) and found[0].abs().max() > 0


@pytest.mark.parametrize("asked, expected", [(None, "epsilon"), ("v_prediction", "v_prediction")])
def test_the_noise_scheduler_is_ddpm_with_the_betas_of_the_snapshot(change, asked, expected):
    models = load(change(prediction_type=asked))
    assert type(models.noise_scheduler) is DDPMScheduler
    assert torch.allclose(models.noise_scheduler.betas, torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    assert models.noise_scheduler.config.prediction_type == expected
    assert type(models.sampling_scheduler) is EulerDiscreteScheduler
    assert models.sampling_scheduler.config.prediction_type == expected


def broken_snapshot(tmp_path, part, empty):
    snapshot = tmp_path / "snapshot"
    shutil.copytree(SDXL, snapshot)
    if empty:
        shutil.rmtree(snapshot / part)
        (snapshot / part).mkdir()
    else:
        weights = next((snapshot / part).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:1000])
    return str(snapshot)


@pytest.mark.parametrize(
    "part, empty",
    [
        ("unet", True),
        ("vae", False),
        ("unet", False),
        ("text_encoder_2", True),
        ("text_encoder", False),
        ("scheduler", True),
        ("tokenizer", True),
    ],
)
def test_a_part_that_does_not_load_is_an_error_that_names_the_flag_and_the_part(change, tmp_path, part, empty):
    snapshot = broken_snapshot(tmp_path, part, empty)
    with pytest.raises(sdxl_data.InputError, match=rf"(?s)--pretrained_model_name_or_path.*{part}"):
        load(change(pretrained_model_name_or_path=snapshot))


def test_another_vae_is_loaded_from_its_own_folder(change, tmp_path):
    shutil.copytree(SDXL / "vae", tmp_path / "vae")
    config = tmp_path / "vae/config.json"
    config.write_text(config.read_text().replace('"force_upcast": true', '"force_upcast": false'))
    models = load(change(pretrained_vae_model_name_or_path=str(tmp_path / "vae")))
    assert models.vae.config.force_upcast is False


def test_another_vae_that_does_not_load_is_an_error_that_names_its_flag(change):
    with pytest.raises(sdxl_data.InputError, match="--pretrained_vae_model_name_or_path"):
        load(change(pretrained_vae_model_name_or_path="./nowhere"))


def test_revision_variant_and_cache_dir_are_asked_for_with_every_part(change, monkeypatch):
    asked = {}

    def watch(args, loader, subfolder, *flag, **options):
        def load(path, **given):
            asked[subfolder] = given
            return loader(path, **{name: value for name, value in given.items() if name != "variant"})

        return load_part(args, load, subfolder, *flag, **options)

    load_part = trainer.load_part
    monkeypatch.setattr(trainer, "load_part", watch)
    load(change(revision="v1", variant="fp16", cache_dir="downloads"))
    assert {"tokenizer", "tokenizer_2", "scheduler", "unet", "vae", "text_encoder", "text_encoder_2"} == set(asked)
    assert {(given["revision"], given["cache_dir"]) for given in asked.values()} == {("v1", "downloads")}
    weights = ("unet", "vae", "text_encoder", "text_encoder_2")
    assert {asked[name]["variant"] for name in weights} == {"fp16"}


def test_lora_dropout_is_on_every_adapter(change):
    flags = change(lora_dropout=0.25, train_text_encoder=True)
    for model in trainer.add_adapters(flags, load(flags), 0).values():
        dropouts = [layer.lora_dropout["default"] for layer in model.modules() if hasattr(layer, "lora_dropout")]
        assert dropouts and {getattr(dropout, "p", 0) for dropout in dropouts} == {0.25}
