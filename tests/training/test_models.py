"""Students made from a teacher's layers, and the checks that both models have to pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, BertConfig, Qwen3Config, Qwen3ForCausalLM, T5Config

from kdkernels.training import models, tasks

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
