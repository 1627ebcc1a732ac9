"""sdxl_lora.py: LoRA files of all usual formats are read, merged and refused for what they are."""

import re

import foreign_loras as foreign
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from foreign_loras import change_of, make_lora, select, weights
from harness import SDXL
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import sdxl_lora
import sdxl_single_file
from sdxl_data import InputError

EVERYWHERE = {
    "unet": f"{foreign.UNET_LAYERS}|{foreign.CONVOLUTIONS}",
    "text_encoder": foreign.ENCODER_LAYERS,
    "text_encoder_2": foreign.ENCODER_LAYERS,
}


@pytest.fixture(scope="module")
def layers():
    """{(model, module): weight} of the demo's model."""
    return weights(foreign.load_demo())


def merge(path, scale=None, dtype=torch.float32, **models):
    """The weights of the demo's model after --merge_lora."""
    models = foreign.load_demo(dtype) | models
    values = [str(path) if scale is None else f"{path}:{scale}"]
    sdxl_lora.merge_given_loras(values, models)
    return weights(models)


def assert_merged(found, layers, lora, scale=1.0, rslora=False):
    assert found.keys() == layers.keys() and lora
    for key, weight in layers.items():
        if key in lora:
            expected = weight + change_of(lora[key], weight, scale, rslora)
            assert torch.allclose(found[key], expected, rtol=1e-5, atol=2e-6), key
            assert not torch.allclose(found[key], weight, rtol=1e-3)
        else:
            assert torch.equal(found[key], weight), key


# Formats


@pytest.mark.parametrize("original_names", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5, -1])
def test_a_file_of_kohyas_scripts_is_merged(layers, tmp_path, original_names, scale):
    lora = make_lora(select(layers, **EVERYWHERE), ranks=(2, 2, 3, 1), alphas=(1.0, 1.0, 2.0, 0.5))
    file = foreign.write_kohya(tmp_path / "a.safetensors", lora, original_names)
    assert_merged(merge(file, scale), layers, lora, scale or 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alphas_are_read_in_every_precision(layers, tmp_path, dtype):
    lora = make_lora(select(layers, unet="attn2"), alphas=(1.0, 0.3))
    file = sdxl_lora.read_lora_file(foreign.write_kohya(tmp_path / "a.safetensors", lora, dtype=dtype))
    expected = {round(float(torch.tensor(value).to(dtype)), 6) for value in (1.0, 0.3)}
    assert {round(value, 6) for value in file.alphas.values()} == expected


@pytest.mark.parametrize(
    "names, prefix",
    [
        (("lora_A.weight", "lora_B.weight"), "{part}."),
        (("lora.down.weight", "lora.up.weight"), "{part}."),
        (("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), "{part}."),
        (("lora_A.weight", "lora_B.weight"), "diffusion_model."),
        (("lora_A.weight", "lora_B.weight"), ""),
    ],
)
def test_files_of_diffusers_peft_and_others_are_merged(layers, tmp_path, names, prefix):
    lora = make_lora(select(layers, unet="attn1"), ranks=(2, 3), alphas=(None,))  # no alpha: a scale of 1
    assert_merged(merge(foreign.write_diffusers(tmp_path / "a.safetensors", lora, names, prefix)), layers, lora)


def test_a_file_of_diffusers_first_versions_is_merged(layers, tmp_path):
    lora = make_lora(select(layers, unet=r"attn\d"), alphas=(None,))
    tensors = {}
    for (_, name), values in lora.items():
        attention, _, matrix = name.removesuffix(".0").rpartition(".")
        for kind in ("down", "up"):
            tensors[f"unet.{attention}.processor.{matrix}_lora.{kind}.weight"] = values[kind]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    assert_merged(merge(tmp_path / "a.safetensors"), layers, lora)


def test_text_encoders_with_and_without_text_model_are_merged(layers, tmp_path):
    lora = make_lora(select(layers, text_encoder="self_attn", text_encoder_2="self_attn"), alphas=(None,))
    for prefix in ("{part}.", "{part}.text_model."):
        file = foreign.write_diffusers(tmp_path / "a.safetensors", lora, prefix=prefix)
        assert_merged(merge(file), layers, lora)


def test_rank_and_alpha_of_the_header_count(layers, tmp_path):
    lora = make_lora(select(layers, unet="attn1"), ranks=(4,))
    (_, first), (_, second), *_ = lora
    settings = {"unet.r": 4, "unet.lora_alpha": 6.0, "unet.use_rslora": True, "unet.alpha_pattern": {second: 1.0}}
    file = foreign.write_diffusers(tmp_path / "a.safetensors", lora, settings=settings)
    for key, values in lora.items():
        values["alpha"] = torch.tensor(1.0 if key == ("unet", second) else 6.0)
    assert_merged(merge(file), layers, lora, rslora=True)


@pytest.mark.parametrize("write", [foreign.write_kohya, foreign.write_diffusers])
def test_dora_is_merged(layers, tmp_path, write):
    chosen = select(layers, unet=r"attn1|resnets.*conv\d", text_encoder_2="self_attn")
    lora = make_lora(chosen, alphas=(2.0,), dora=True)
    if write is foreign.write_diffusers:  # PEFT keeps a convolution's magnitudes as (1, out, 1, 1)
        for values in lora.values():
            if values["down"].ndim == 4:
                values["magnitude"] = values["magnitude"].reshape(1, -1, 1, 1)
    file = write(tmp_path / "a.safetensors", lora)
    for values in lora.values():
        values["magnitude"] = values["magnitude"].flatten()
    assert_merged(merge(file), layers, lora)


def test_a_file_of_peft_is_merged_with_its_configuration(layers, tmp_path):
    lora = make_lora(select(layers, unet="attn1"), ranks=(2,), alphas=(8.0,))
    names = ("lora_A.weight", "lora_B.weight")
    file = foreign.write_diffusers(tmp_path / "adapter_model.safetensors", lora, names, "base_model.model.")
    with pytest.raises(InputError, match="does not give its alpha; put PEFT's adapter_config.json beside it"):
        merge(file)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8, "use_rslora": false}')
    assert_merged(merge(file), layers, lora)
    assert_merged(merge(tmp_path), layers, lora)  # the folder


def test_a_file_that_diffusers_writes_of_one_model_keeps_its_alpha(layers, tmp_path):
    unet = foreign.load_demo()["unet"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k"]))
    unet.save_lora_adapter(tmp_path / "out", adapter_name="default", safe_serialization=True)
    unet.fuse_lora()
    unet.unload_lora()
    found = merge(tmp_path / "out")
    theirs = weights({"unet": unet})
    assert all(torch.allclose(found[key], weight, rtol=1e-5, atol=1e-6) for key, weight in theirs.items())
    assert sum(not torch.equal(found[key], weight) for key, weight in layers.items()) > 10


def test_a_file_of_diffusers_training_script_is_merged(layers, tmp_path):
    """What train_text_to_image_lora_sdxl.py does at its end."""
    models = foreign.load_demo()
    states = {}
    for part, targets in (
        ("unet", ["to_q", "to_out.0"]),
        ("text_encoder", ["q_proj"]),
        ("text_encoder_2", ["q_proj"]),
    ):
        models[part].add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))
        states[part] = convert_state_dict_to_diffusers(get_peft_model_state_dict(models[part]))
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, states["unet"], states["text_encoder"], states["text_encoder_2"]
    )
    expected = StableDiffusionXLPipeline.from_pretrained(SDXL, dtype=torch.float32, add_watermarker=False)
    expected.load_lora_weights(tmp_path)
    expected.fuse_lora()
    expected.unload_lora_weights()
    theirs = weights({part: getattr(expected, part) for part in states})
    found = merge(tmp_path)
    assert all(torch.allclose(found[key], weight, rtol=1e-5, atol=1e-6) for key, weight in theirs.items())
    assert sum(not torch.equal(found[key], weight) for key, weight in layers.items()) > 10


@pytest.mark.parametrize("pattern, hits", [(r".*attn1\.to_q", "to_q"), ("to_k", "to_k"), ("q", None)])
def test_alphas_by_layer_are_matched_as_peft_does(layers, tmp_path, pattern, hits):
    lora = make_lora(select(layers, unet="attn1"), ranks=(2,), alphas=(None,))
    settings = {"unet.r": 2, "unet.lora_alpha": 2.0, "unet.alpha_pattern": {pattern: 8.0, "to_q": 1.0}}
    file = foreign.write_diffusers(tmp_path / "a.safetensors", lora, settings=settings)
    for (_, name), values in lora.items():
        expected = 8.0 if hits and name.endswith(hits) else 1.0 if name.endswith("to_q") else 2.0
        values["alpha"] = torch.tensor(expected)
    assert_merged(merge(file), layers, lora)


def test_a_dora_after_another_lora_starts_from_the_sum(layers, tmp_path):
    first = make_lora(select(layers, unet="attn|conv1"), seed=1)
    second = make_lora(select(layers, unet="attn|conv1"), dora=True, seed=2)
    files = [foreign.write_kohya(tmp_path / f"{n}.safetensors", lora) for n, lora in enumerate((first, second))]
    models = foreign.load_demo()
    sdxl_lora.merge_given_loras([str(file) for file in files], models)
    for key, weight in weights(models).items():
        if key in first:
            summed = layers[key] + change_of(first[key], layers[key])
            expected = summed + change_of(second[key], summed)
            assert torch.allclose(weight, expected, rtol=1e-5, atol=2e-6), key


def test_several_are_merged_and_rounded_once(layers, tmp_path):
    first, second = (make_lora(select(layers, unet=pattern), seed=n) for n, pattern in enumerate(("attn", "attn2|ff")))
    files = [foreign.write_kohya(tmp_path / f"{n}.safetensors", lora) for n, lora in enumerate((first, second))]
    models = foreign.load_demo(torch.bfloat16)
    before = {key: weight.clone() for key, weight in weights(models).items()}
    merged = sdxl_lora.merge_given_loras([str(files[0]), f"{files[1]}:0.5"], models)
    assert merged == [[sdxl_lora.hash_file(files[0]), 1.0], [sdxl_lora.hash_file(files[1]), 0.5]]
    for key, weight in weights(models).items():
        total = before[key].float()
        for lora, scale in ((first, 1), (second, 0.5)):
            total = total + (change_of(lora[key], weight, scale) if key in lora else 0)
        assert weight.dtype == torch.bfloat16
        assert (weight == total.bfloat16()).float().mean() > 0.999, key  # the sum in another order is a bit off
    parameters = dict(models["unet"].named_parameters())
    assert parameters.keys() == dict(foreign.load_demo()["unet"].named_parameters()).keys()
    assert not hasattr(models["unet"], "peft_config")


def test_merging_does_what_diffusers_pipeline_does(layers, tmp_path):
    file = foreign.write_kohya(tmp_path / "a.safetensors", make_lora(select(layers, unet="attn|ff"), alphas=(1.0,)))
    pipeline = StableDiffusionXLPipeline.from_pretrained(SDXL, dtype=torch.float32, add_watermarker=False)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    theirs = weights({"unet": pipeline.unet})
    found = merge(file, 0.7)
    assert all(torch.allclose(found[key], weight, rtol=1e-5, atol=1e-6) for key, weight in theirs.items())


def test_a_model_without_weights_is_only_checked(layers, tmp_path):
    fitting = foreign.write_kohya(tmp_path / "a.safetensors", make_lora(select(layers, unet="attn")))
    wide = {key: weight[:, :7] for key, weight in select(layers, unet="attn").items()}
    other = foreign.write_kohya(tmp_path / "b.safetensors", make_lora(wide))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL / "unet"))
    merge(fitting, unet=unet)
    assert next(unet.parameters()).is_meta and not hasattr(unet, "peft_config")
    with pytest.raises(
        InputError, match="--merge_lora: .*b.safetensors does not fit this unet: .* is 2 × 7, the layer is 96 × "
    ):
        merge(other, unet=unet)


def test_the_names_of_sdxls_own_layers():
    """Names from files of kohya's scripts for the real base."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sdxl_single_file.SDXL_CONFIGS["unet"])
    known = sdxl_lora.list_layers("unet", unet)
    pairs = {
        "input_blocks_4_1_transformer_blocks_0_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "middle_block_1_transformer_blocks_9_attn2_to_k": "mid_block.attentions.0.transformer_blocks.9.attn2.to_k",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_0_1_transformer_blocks_3_ff_net_2": "up_blocks.0.attentions.0.transformer_blocks.3.ff.net.2",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        "label_emb_0_2": "add_embedding.linear_2",
        "down_blocks_1_attentions_0_proj_out": "down_blocks.1.attentions.0.proj_out",
    }  # fmt: skip
    assert {name: known[name][0] for name in pairs} == pairs
    assert len({name for name, _ in known.values()}) * 2 == len(known)  # each has two names, and no two share one


# What is refused


ATTENTION = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def tensors(**named):
    return lambda path: safetensors.torch.save_file(
        {key.replace("__", "."): torch.ones(*shape) for key, shape in named.items()}, path
    )


def pair_of(layer, down=(2, 96), up=(96, 2), **more):
    return tensors(**{f"{layer}__lora_down__weight": down, f"{layer}__lora_up__weight": up} | more)


def odd_values(alpha=1.0, up=1.0):
    values = {"lora_down.weight": torch.ones(2, 96), "lora_up.weight": torch.full((96, 2), up)}
    values["alpha"] = torch.tensor(alpha)
    named = {f"lora_unet_{ATTENTION}.{name}": tensor for name, tensor in values.items()}
    return lambda path: safetensors.torch.save_file(named, path)


@pytest.mark.parametrize(
    "write, found",
    [
        (tensors(lora_unet_x__hada_w1_a=(2, 2)), "holds lora_unet_x.hada_w1_a; expected a LoRA or DoRA of SDXL"),
        (tensors(lora_unet_x__lokr_w1=(2, 2)), "holds lora_unet_x.lokr_w1;"),
        (pair_of("lora_te_text_model_encoder"), "holds lora_te_text_model_encoder.lora_down.weight;"),
        (tensors(**{"x__lora_A__weight": (2, 2)}), "holds only x.lora_A.weight of a layer; expected both matrices"),
        (tensors(), "holds no tensors"),
        (
            pair_of("lora_unet_down_blocks_7_attentions"),
            "does not fit this unet, which has no layer down_blocks_7_attentions; is it",
        ),
        (
            pair_of(f"lora_unet_{ATTENTION}", down=(2, 90)),
            f"does not fit this unet: lora_unet_{ATTENTION}.lora_down.weight is 2 × 90, the layer is 96 × 96",
        ),
        (
            pair_of(f"lora_unet_{ATTENTION}", up=(90, 2)),
            f"does not fit this unet: lora_unet_{ATTENTION}.lora_up.weight is 90 × 2, the layer is 96 × 96",
        ),
        (
            pair_of(f"lora_unet_{ATTENTION}", **{f"lora_unet_{ATTENTION}__dora_scale": (1, 90)}),
            f"does not fit this unet: lora_unet_{ATTENTION}.dora_scale is 1 × 90, the layer is 96 × 96",
        ),
        (lambda path: path.write_bytes(b"nothing"), "is damaged or incomplete"),
        (
            pair_of(f"lora_unet_{ATTENTION}", **{f"lora_unet_{ATTENTION}__dora_scale": (1, 96)}),
            f"does not fit this unet: lora_unet_{ATTENTION}.dora_scale is 1 × 96, the layer is 96 × 96",
        ),
        (pair_of(f"lora_unet_{ATTENTION}", **{f"lora_unet_{ATTENTION}__alpha": (2,)}), "holds"),
        (odd_values(alpha=0.0), f"holds lora_unet_{ATTENTION}.alpha = 0.0 (F32); expected one number above 0"),
        (
            odd_values(alpha=float("nan")),
            f"holds lora_unet_{ATTENTION}.alpha = nan (F32); expected one number above 0",
        ),
        (odd_values(up=float("inf")), f"lora_unet_{ATTENTION}.lora_up.weight has a NaN or infinite value"),
    ],
)
def test_a_file_that_cannot_be_merged_is_named(tmp_path, write, found):
    write(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=rf"--merge_lora: .*a.safetensors:? {re.escape(found)}"):
        merge(tmp_path / "a.safetensors")


def test_a_layer_with_two_adapters_and_half_a_dora_are_refused(layers, tmp_path):
    lora = make_lora(select(layers, unet="attn1"))
    file = foreign.write_kohya(tmp_path / "a.safetensors", lora)
    both = safetensors.torch.load_file(file)
    both |= safetensors.torch.load_file(foreign.write_kohya(tmp_path / "b.safetensors", lora, original_names=True))
    safetensors.torch.save_file(both, file)
    with pytest.raises(InputError, match="--merge_lora: .*a.safetensors has two adapters for one layer"):
        merge(file)
    half = make_lora(select(layers, unet="attn1"), dora=True)
    del next(iter(half.values()))["magnitude"]
    with pytest.raises(InputError, match=f"{len(half) - 1} of {len(half)} layers are DoRA; expected all or none"):
        merge(foreign.write_kohya(file, half))


def test_missing_files_pickles_and_useless_scales_are_refused(layers, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"pickle")
    (tmp_path / "a.md").write_text("text")
    file = foreign.write_kohya(tmp_path / "a.safetensors", make_lora(select(layers, unet="attn1")))
    for value, found in (
        (tmp_path / "b.safetensors", "no LoRA file .*b.safetensors; give a .safetensors file, a run or a checkpoint"),
        (f"{tmp_path / 'b.safetensors'}:0.5", "no LoRA file .*b.safetensors; give"),
        (tmp_path, "no LoRA file .*pytorch_lora_weights.safetensors"),
        (tmp_path / "a.pt", ".*a.pt is a pickle, which can run any code"),
        (tmp_path / "a.md", ".*a.md is no .safetensors file; give one, a run or a checkpoint"),
        ("", "the path is empty"),
        (f"{file}:0", "the scale of .* is 0.0; expected a finite number other than 0"),
        (f"{file}:nan", "the scale of .* is nan"),
        (f"{file}:1,5", "no LoRA file"),
    ):
        with pytest.raises(InputError, match=f"--merge_lora: {found}"):
            sdxl_lora.read_merges([str(value)])


def test_a_scale_is_told_from_a_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style:2").write_text("")
    for text, expected in (
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a:b.safetensors:-1", ("a:b.safetensors", -1.0)),
        ("a:b.safetensors", ("a:b.safetensors", 1.0)),
        ("style:2", ("style:2", 1.0)),
    ):
        assert sdxl_lora.parse_merge(text) == expected


@pytest.mark.parametrize("settings", ["null", "[1]", '{"unet.lora_alpha": null}', '{"unet.target_modules": 5}'])
def test_odd_headers_count_for_nothing(layers, tmp_path, settings):
    lora = make_lora(select(layers, unet="attn1"), alphas=(None,))
    file = foreign.write_diffusers(tmp_path / "a.safetensors", lora)
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"lora_adapter_metadata": settings})
    assert_merged(merge(file), layers, lora)


def test_adapters_of_a_model_that_is_not_there_are_refused(layers, tmp_path):
    file = foreign.write_kohya(tmp_path / "a.safetensors", make_lora(select(layers, text_encoder="self_attn")))
    with pytest.raises(InputError, match="--merge_lora: .* has adapters of text_encoder, which are not used here"):
        sdxl_lora.merge_given_loras([str(file)], {"unet": None})
