"""Students made from a teacher's layers, and the checks that both models have to pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    MllamaTextConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
)

from kdkernels.training import models, tasks

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = tiny_models.one_thread

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def test_kept_layers_are_those_of_the_teacher_and_nothing_is_shared(tmp_path: Path) -> None:
    teacher = tiny_models.llama(4, seed=2)
    student = models.keep_layers(teacher, [0, 2, 3])
    assert teacher.config.num_hidden_layers == len(teacher.model.layers) == 4
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    kept = [teacher.model.layers[i].mlp.up_proj.weight for i in (0, 2, 3)]
    for layer, weight in zip(student.model.layers, kept, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, weight)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, student(IDS).logits)
    # Renumbered: with its key-value cache the student generates what it predicts without.
    generated = student.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    again = student.generate(
        IDS, max_new_tokens=4, do_sample=False, use_cache=False, eos_token_id=None
    )
    assert torch.equal(generated, again)


def test_all_layers_kept_is_the_teacher() -> None:
    teacher = tiny_models.llama(3, seed=2)
    assert torch.equal(models.keep_layers(teacher, [0, 1, 2])(IDS).logits, teacher(IDS).logits)


def test_properties_of_layers_follow_them() -> None:
    config = Qwen3Config(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=4,
    )
    student = models.keep_layers(Qwen3ForCausalLM(config), [1, 2])
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert student(IDS).logits.isfinite().all()


# ---- layers that depend on their number ---------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8, "num_key_value_heads": 2}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROUTED |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8}
WINDOWS = {"sliding_window": 4, "sliding_window_pattern": 3}
JAMBA = {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2}
JAMBA |= {"expert_layer_offset": 1, "num_experts": 4, "mamba_dt_rank": 4, "mamba_d_state": 4}
NEO = {"vocab_size": 32, "hidden_size": 16, "num_layers": 6, "num_heads": 2, "window_size": 4}

#: Model type -> options; its layers are told apart by lists, steps, first ones, periods, windows.
DEPENDENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe, dense by list": ("Qwen3Moe", GROUPED | EXPERTS | {"mlp_only_layers": [0, 3]}),
    "qwen3_moe, dense by step": ("Qwen3Moe", GROUPED | EXPERTS | {"decoder_sparse_step": 2}),
    "glm4_moe": ("Glm4Moe", GROUPED | ROUTED | {"first_k_dense_replace": 2}),
    "deepseek_v2": ("DeepseekV2", SIZES | LATENT | ROUTED | {"first_k_dense_replace": 2}),
    "deepseek_v3": ("DeepseekV3", SIZES | LATENT | ROUTED | {"first_k_dense_replace": 4}),
    "llama4_text": (
        "Llama4Text",
        GROUPED
        | {"num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2}
        | {"no_rope_layer_interval": 2, "attention_chunk_size": 4},
    ),
    "ernie4_5_moe": ("Ernie4_5_Moe", GROUPED | ERNIE | {"moe_layer_start_index": 2}),
    "minicpm3": ("MiniCPM3", SIZES | LATENT),
    "jamba": ("Jamba", SIZES | JAMBA | {"num_key_value_heads": 1, "use_mamba_kernels": False}),
    "bamba": ("Bamba", GROUPED | MAMBA | {"attn_layer_indices": [1, 3]}),
    "recurrent_gemma": ("RecurrentGemma", GROUPED | {"lru_width": 16, "attention_window_size": 4}),
    "gpt_neo": ("GPTNeo", NEO | {"attention_types": [[["global", "local"], 3]]}),
    "gemma3_text": ("Gemma3Text", GROUPED | WINDOWS),
    "cohere2": ("Cohere2", GROUPED | WINDOWS),
    "qwen2, a window beyond the probe": (
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 3},
    ),
    "smollm3": ("SmolLM3", GROUPED | {"no_rope_layer_interval": 3}),
    "tied embeddings": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "longformer": ("Longformer", SIZES | {"attention_window": [8, 4, 8, 4, 8, 16]}),
}


def untrained(config: PretrainedConfig, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A model whose layers differ as much as those of a trained one, norms and biases included."""
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **models.without_cache(model)).logits


@pytest.mark.parametrize("layers", [[1, 3], [0, 2, 5], [3, 4, 5]])
@pytest.mark.parametrize("name", DEPENDENT)
def test_the_folder_of_a_layer_student_loads_the_teacher_without_the_others(
    name: str, layers: list[int], tmp_path: Path
) -> None:
    kind, options = DEPENDENT[name]
    loader = AutoModelForMaskedLM if kind == "Longformer" else AutoModelForCausalLM
    teacher = untrained(getattr(transformers, f"{kind}Config")(**options), loader)
    models.keep_layers(teacher, layers).save_pretrained(tmp_path)
    loaded, loading = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = torch.arange(3, 31)[None]
    with models.without_layers(teacher, layers):
        want = logits(teacher, ids)
    torch.testing.assert_close(logits(loaded.eval(), ids), want, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "diffllama": (
        "DiffLlama",
        GROUPED | {"num_key_value_heads": 2},
        "lambda_init of its layer 0 is 0.2",
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 6, "n_positions": 64}
        | {"scale_attn_by_inverse_layer_idx": True},
        "scaling of its layer 0 is",
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        GROUPED | ERNIE | {"moe_layer_interval": 2},
        "would be random, the teacher has none there",
    ),
    "modernbert-decoder": (
        "ModernBertDecoder",
        SIZES | {"cls_token_id": 3, "sep_token_id": 4, "sliding_window": 8},
        "attn_norm.weight would be lost, the student has none there",
    ),
    "xlm": (
        "XLM",
        {"vocab_size": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 6, "is_decoder": True},
        "would be lost",
    ),
    "quantised": ("Llama", GROUPED, "its weights are quantised"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_configuration_says_is_refused(name: str) -> None:
    kind, options, message = REFUSED[name]
    teacher = untrained(getattr(transformers, f"{kind}Config")(**options))
    if name == "quantised":
        teacher.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="would be another model when it is loaded: ") as error:
        models.keep_layers(teacher, [3, 4, 5])
    assert str(error.value).startswith("student_layers: 3,4,5 of ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_looking_at_a_model_leaves_its_attention_as_it_was() -> None:
    config = transformers.BigBirdConfig(**SIZES | {"block_size": 4})
    teacher = untrained(config, AutoModelForMaskedLM)
    for _ in range(2):  # a probe of few tokens turns block-sparse attention into the full one
        student = models.keep_layers(teacher, [1, 3])
        assert teacher.bert.attention_type == student.bert.attention_type == "block_sparse"


def test_layers_that_share_their_weights_are_refused() -> None:
    config = AlbertConfig(**SIZES | {"embedding_size": 8})
    with pytest.raises(ValueError, match="AlbertForMaskedLM has no list of 6 layers"):
        models.keep_layers(AutoModelForMaskedLM.from_config(config), [0, 1])


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "patch_size": 14}
VISION |= {"num_attention_heads": 2, "image_size": 28}
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", GROUPED | WINDOWS, VISION, {"mm_tokens_per_image": 4}),
    "llava": ("Llava", GROUPED | {"model_type": "llama"}, VISION | {"model_type": "clip"}, {}),
    "mistral3": (
        "Mistral3",
        GROUPED | {"model_type": "mistral"},
        VISION | {"model_type": "pixtral", "head_dim": 8},
        {"vision_feature_layer": -1},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        SIZES
        | {"num_key_value_heads": 1}
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        {"depth": 6, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
        | {"out_hidden_size": 16},
        {},
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_of_a_vision_language_model_the_text_model_is_shortened(name: str, tmp_path: Path) -> None:
    kind, text, vision, options = WRAPPERS[name]
    tokens = {"image_token_id": 29, "video_token_id": 28, "image_token_index": 29}
    tokens |= {"boi_token_index": 27, "eoi_token_index": 26}
    tokens |= {"vision_start_token_id": 25, "vision_end_token_id": 24}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, **tokens, **options
    )
    loader = getattr(transformers, f"{kind}ForConditionalGeneration")
    torch.manual_seed(0)
    teacher = loader(config).eval()
    student = models.keep_layers(teacher, [1, 4])
    assert models.parameter_count(student) < models.parameter_count(teacher)
    student.save_pretrained(tmp_path)
    loaded, loading = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert loaded.config.get_text_config().num_hidden_layers == 2
    seeing = [n for n in teacher.state_dict() if "vis" in n]
    assert seeing and all(
        torch.equal(teacher.get_parameter(n), loaded.get_parameter(n)) for n in seeing
    )
    with models.without_layers(teacher, [1, 4]):
        want = logits(teacher, IDS)
    torch.testing.assert_close(logits(loaded.eval(), IDS), want, rtol=1e-4, atol=1e-5)
    assert models.vocab_size(teacher) == 32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_student_in_half_precision_is_what_its_folder_loads(dtype: str, tmp_path: Path) -> None:
    config = transformers.Glm4MoeConfig(**GROUPED | ROUTED | {"first_k_dense_replace": 2})
    student = models.in_dtype(models.keep_layers(untrained(config), [1, 3]), dtype)
    assert {str(p.dtype) for p in student.parameters()} == {f"torch.{dtype}"}
    # Rounded, positions would be others; the router's corrections stay wide in any file.
    buffers = dict(student.named_buffers())
    assert buffers["model.rotary_emb.inv_freq"].dtype == torch.float32
    assert buffers["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval(), IDS), logits(student, IDS))


def test_a_folder_that_no_auto_class_loads_is_refused() -> None:
    with pytest.raises(ValueError, match="AutoModelForCausalLM does not load such a folder"):
        tasks.check_can_be_loaded(tasks.CAUSAL_LM, MllamaTextConfig(), "student")
    tasks.check_can_be_loaded(tasks.CAUSAL_LM, tiny_models.llama(1, seed=1).config, "student")


POSITIONS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "XLMRoberta": {"pad_token_id": 5},
    "Camembert": {},
    "MPNet": {},
    "Longformer": {"attention_window": 8},
    "Esm": {"mask_token_id": 3},
    "Data2VecText": {},
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 24},
    "GPT2": {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64},
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_are_as_many_as_fit(kind: str) -> None:
    options = SIZES | {"num_hidden_layers": 1, "pad_token_id": 1} | POSITIONS[kind]
    loader = AutoModelForCausalLM if kind in ("OPT", "GPT2") else AutoModelForMaskedLM
    model = untrained(getattr(transformers, f"{kind}Config")(**options), loader)
    most = models.positions(model)
    assert most is not None
    unused = 0 if kind in ("Bert", "OPT", "GPT2") else 1 + options["pad_token_id"]
    assert most == 64 - unused
    model(input_ids=torch.full((1, most), 7))
    if kind != "Longformer":  # it pads to its windows
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 7))


def test_a_model_that_needs_more_than_tokens_is_named() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 16}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 32, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
    )
    with pytest.raises(ValueError, match=r"teacher: 'clip' \(CLIPModel\): it cannot be run on tok"):
        models.check_takes_tokens(transformers.CLIPModel(config), "teacher")


def test_no_limit_is_none() -> None:
    config = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    assert models.positions(config) is models.positions(untrained(config)) is None


# ---- choosing -----------------------------------------------------------------------------------


def test_greedy_pruning_drops_a_layer_that_does_nothing() -> None:
    model = tiny_models.llama(4, seed=2)
    with torch.no_grad():
        for projection in (
            model.model.layers[2].mlp.down_proj,
            model.model.layers[2].self_attn.o_proj,
        ):
            projection.weight.zero_()
    text = model.generate(IDS, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert models.choose_layers(model, text, keep=3, report=lambda _: None) == [0, 1, 3]
    assert len(model.model.layers) == model.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("text", "layers"), [("0", [0]), ("0,3-5,7", [0, 3, 4, 5, 7]), (" 1 , 2", [1, 2])]
)
def test_layer_lists(text: str, layers: list[int]) -> None:
    assert models.parse_layers(text, 8) == layers


@pytest.mark.parametrize("text", ["", "a", "1,1", "3-1", "-1", "2,1", "8"])
def test_bad_layer_lists(text: str) -> None:
    with pytest.raises(ValueError, match="student_layers"):
        models.parse_layers(text, 8)


def test_only_decoders_are_causal() -> None:
    tasks.check_config(tasks.CAUSAL_LM, tiny_models.llama(1, seed=1).config, "teacher")
    tasks.check_config(tasks.CAUSAL_LM, BertConfig(is_decoder=True), "teacher")
    for config in (BertConfig(), T5Config()):
        with pytest.raises(ValueError, match=f"teacher: '{config.model_type}'"):
            tasks.check_config(tasks.CAUSAL_LM, config, "teacher")


def test_tokenizers_are_compared_token_by_token() -> None:
    ours, longer = tiny_models.tokenizer(), tiny_models.tokenizer([*tiny_models.WORDS, "more"])
    assert models.tokenizer_difference(ours, tiny_models.tokenizer()) is None
    assert "'more' is id missing in the student's" in str(models.tokenizer_difference(ours, longer))
    assert models.tokenizer_difference(ours, longer, common=len(ours)) is None
