"""Policies: made new, loaded, with LoRA, and saved."""

import copy
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import models
from pipeline.config import ModelConfig
from pipeline.models import add_lora, load_policy, new_policy, reference_mode, save_policy
from pipeline.rendering import TINY_CHAT_TEMPLATE, Renderer
from tests.tiny_policy import CORPUS, save_tiny_policy

SIZES = ModelConfig(hidden=32, layers=2, heads=2, vocabulary=400, max_length=128)
LORA = SIZES.model_copy(update={"lora_rank": 4})
QLORA = LORA.model_copy(update={"load_in_4bit": True})
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def trained(model):
    """A stand-in for training: every trainable weight moves."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    return save_tiny_policy(tmp_path / "tiny", max_length=256)


# ---- New ----


def test_a_new_policy_has_the_sizes_of_the_recipe():
    model, tokenizer = new_policy(SIZES, CORPUS, seed=0)
    assert len(tokenizer) == model.config.vocab_size == 400
    assert model.config.hidden_size == 32
    assert model.config.intermediate_size == 96
    assert model.config.num_hidden_layers == 2
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 128
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_new_policy_repeats_what_it_has_read_before_it_has_learned_anything():
    model, _ = new_policy(ModelConfig(vocabulary=400, layers=2), CORPUS, seed=0)
    chance = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(model.config.vocab_size, generator=chance)[:100] for _ in range(2)])
    ids = torch.cat([drawn, drawn], 1)
    with torch.no_grad():
        right = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert right[:, :99].float().mean() < 0.1
    assert right[:, 100:].float().mean() > 0.9


def test_two_tokens_tell_apart_what_one_does_not():
    model, _ = new_policy(ModelConfig(vocabulary=400, layers=2), CORPUS, seed=0)
    a, b, x, rest = 30, 40, 50, list(range(100, 120))
    ids = torch.tensor([[*rest, a, x, 70, *rest[::-1], b, x, 80, a, x]])  # after x came 70, and last of all 80
    with torch.no_grad():
        assert model(input_ids=ids).logits[0, -1].argmax() == 70
        ids[0, -2] = b
        assert model(input_ids=ids).logits[0, -1].argmax() == 80


@pytest.mark.parametrize(("head", "distance"), [(0, 1), (1, 2)])
def test_its_first_heads_attend_to_the_tokens_before(head, distance):
    model, _ = new_policy(ModelConfig(vocabulary=400, layers=2), CORPUS, seed=1)
    model.set_attn_implementation("eager")
    ids = torch.randint(model.config.vocab_size, (1, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[0][0, head]
    assert (attention.diagonal(-distance) > 0.98).all()


def test_a_word_is_known_again_with_a_space_before_it():
    model, tokenizer = new_policy(ModelConfig(vocabulary=400, layers=2), CORPUS, seed=0)
    places = tokenizer.get_vocab()
    pairs = [(places[word], places["Ġ" + word]) for word in places if "Ġ" + word in places]
    codes = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach()[:, 1:])
    without, spaced = (codes[list(ids)] for ids in zip(*pairs, strict=True))
    assert ((without * spaced).sum(1) > 0.2).all()
    assert (without @ spaced.T).fill_diagonal_(0).mean().abs() < 0.05


def test_a_value_is_cut_alike_on_a_page_and_in_an_action():
    _, tokenizer = new_policy(
        ModelConfig(), ["[SEP] dark wash [SEP] B0ABCDEF [SEP] click[dark wash] click[B0ABCDEF]"], 0
    )
    for value in ("dark wash", "B0ABCDEF"):
        cut = tokenizer.tokenize(value)
        page, action = tokenizer.tokenize(f"[SEP] {value} [SEP]"), tokenizer.tokenize(f"Action: click[{value}]")
        assert any(page[start : start + len(cut)] == cut for start in range(len(page)))
        assert any(action[start : start + len(cut)] == cut for start in range(len(action)))


def test_a_small_corpus_gives_a_smaller_vocabulary():
    model, tokenizer = new_policy(SIZES.model_copy(update={"vocabulary": 3000}), ["one word"], seed=0)
    assert len(tokenizer) == model.config.vocab_size < 400


def test_a_new_policy_renders_and_stops_at_the_end_of_its_turn():
    model, tokenizer = new_policy(SIZES, CORPUS, seed=0)
    assert tokenizer.chat_template == TINY_CHAT_TEMPLATE
    renderer = Renderer(tokenizer)
    rendered = renderer.render([{"role": "user", "content": "go"}], [{"role": "assistant", "content": "ünï → 漢字"}])
    assert renderer.end_token_ids == [model.generation_config.eos_token_id]
    assert tokenizer.decode([i for i, t in zip(rendered.ids, rendered.turn_index, strict=True) if t == 0]) == (
        "ünï → 漢字<|end|>"
    )


def test_the_same_arguments_give_the_same_policy_in_any_process(tmp_path):
    code = """if True:
        import sys, pathlib
        from pipeline.config import ModelConfig
        from pipeline.models import new_policy, save_policy
        from tests.tiny_policy import CORPUS
        sizes = ModelConfig(hidden=32, layers=2, heads=2, vocabulary=400, max_length=128)
        save_policy(*new_policy(sizes, CORPUS, seed=7), pathlib.Path(sys.argv[1]))
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, cwd=Path(__file__).parents[1])
    save_policy(*new_policy(SIZES, CORPUS, seed=7), tmp_path / "here")
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    other, _ = new_policy(SIZES, CORPUS, seed=8)
    assert not torch.equal(
        other.get_input_embeddings().weight, new_policy(SIZES, CORPUS, 7)[0].model.embed_tokens.weight
    )


def test_a_new_policy_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    add_lora(new_policy(SIZES, CORPUS, seed=0)[0], LORA, seed=0)
    assert torch.rand(1) == expected


def test_a_new_policy_trains_all_its_weights_even_with_lora():
    model, _ = new_policy(LORA, CORPUS, seed=0)
    assert all(weight.requires_grad and "lora" not in name for name, weight in model.named_parameters())


def test_pieces_of_text_are_put_together_again():
    text = "  two  spaces,no space ; tab\tline\n\nünï 漢字 1.50$ [SEP] click[x-large]"
    _, tokenizer = new_policy(SIZES, CORPUS, seed=0)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"model.hidden 32 must be a multiple of twice model.heads \(3\)"):
        new_policy(SIZES.model_copy(update={"heads": 3}), CORPUS, seed=0)


# ---- Load ----


def test_a_missing_model_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"No model at .*/nothing: it is no folder here, .*; set model.path"):
        load_policy(tmp_path / "nothing", SIZES)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model that transformers can load .*; point model.path at a whole"):
        load_policy(tmp_path, SIZES)


def test_a_model_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"tokenizer of .* has no chat template; start from a chat model"):
        load_policy(folder, SIZES)


def test_a_model_too_short_for_the_recipe_is_refused(folder):
    with pytest.raises(ValueError, match=r"model.max_length 2048 is more than the 256 positions .*max_length=256"):
        load_policy(folder, ModelConfig())


def test_weights_are_loaded_in_float32(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    model, _ = load_policy(folder, SIZES)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


# ---- LoRA ----


def test_lora_is_on_every_linear_layer_but_the_output(folder):
    model, _ = load_policy(folder, LORA)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2  # two matrices, seven linear layers, two blocks
    assert not any("lm_head" in name for name in trainable)


@pytest.mark.parametrize("config", [LORA, QLORA], ids=["lora", "qlora"])
def test_reference_mode_is_the_base_model(config, folder):
    base = load_policy(folder, config.model_copy(update={"lora_rank": 0}))[0].eval()
    model = trained(load_policy(folder, config)[0])
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, base(IDS).logits)
        with reference_mode(model):
            assert torch.equal(model(IDS).logits, base(IDS).logits)
        with reference_mode(base):
            assert torch.equal(base(IDS).logits, base(IDS).logits)
        assert not torch.allclose(model(IDS).logits, base(IDS).logits)


def test_the_seed_sets_the_adapter(folder):
    one, same, other = (load_policy(folder, LORA, seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# ---- In 4 bits ----


def test_the_layers_with_an_adapter_are_in_4_bits_and_no_others(folder):
    model, _ = load_policy(folder, QLORA)
    small = {name for name, weight in model.named_parameters() if weight.dtype == torch.uint8}
    assert small == {name for name, _ in model.named_parameters() if name.endswith("_proj.base_layer.weight")}
    assert len(small) == 2 * 7
    assert {weight.dtype for name, weight in model.named_parameters() if name not in small} == {torch.float32}
    assert model.num_parameters() == load_policy(folder, LORA)[0].num_parameters()


def test_a_base_in_4_bits_is_close_to_the_base(folder):
    rounded, base = (load_policy(folder, config)[0].eval() for config in (QLORA, LORA))
    with torch.no_grad():
        difference = (rounded(IDS).logits.log_softmax(-1) - base(IDS).logits.log_softmax(-1)).abs().max()
    assert 1e-3 < difference < 0.2


def test_a_base_in_4_bits_computes_by_the_kernel_of_training_on_every_cpu(folder, monkeypatch):
    """On a CPU with AVX512-BF16, bitsandbytes would take another one for inference, of other rounding."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layers = [module for module in load_policy(folder, QLORA)[0].modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * 7
    assert {(layer.support_avx512bf16_for_cpu, layer.compute_dtype) for layer in layers} == {(False, torch.float32)}


def test_4_bits_without_bitsandbytes_are_refused_with_what_installs_it(folder, monkeypatch):
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (pin,) = extras["optional-dependencies"]["qlora"]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=rf"load_in_4bit needs bitsandbytes, .*: python -m pip install {pin}$"):
        load_policy(folder, QLORA)


# ---- Save ----


@pytest.mark.parametrize("config", [SIZES, LORA, QLORA], ids=["full", "lora", "qlora"])
def test_a_saved_policy_is_the_policy(config, folder, tmp_path):
    model, tokenizer = load_policy(folder, config)
    trained(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_policy(model, tokenizer, tmp_path / "policy")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert type(saved).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(
            saved(IDS).logits.log_softmax(-1), model(IDS).logits.log_softmax(-1), rtol=1e-4, atol=1e-5
        )
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == tokenizer.chat_template
    assert (tmp_path / "policy/adapter/adapter_model.safetensors").exists() == (config.lora_rank > 0)
    written = json.loads((tmp_path / "policy/config.json").read_text())
    assert written["use_cache"] is True
    assert "quantization_config" not in written


def test_what_a_saved_policy_in_4_bits_must_not_be_would_be_seen(folder):
    """peft by itself quantises again what it has merged."""
    model = trained(load_policy(folder, QLORA)[0])
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit linear"):
        again = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        difference = (again(IDS).logits.log_softmax(-1) - model(IDS).logits.log_softmax(-1)).abs().max()
    assert difference > 1e-2


def test_saving_replaces_the_folder_whole(folder, tmp_path):
    model, tokenizer = load_policy(folder, SIZES)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/stale").write_text("from before")
    save_policy(model, tokenizer, tmp_path / "policy")
    assert not (tmp_path / "policy/stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "tiny"]


def test_a_failed_save_leaves_what_was_there(folder, tmp_path, monkeypatch):
    model, tokenizer = load_policy(folder, SIZES)
    save_policy(model, tokenizer, tmp_path / "policy")
    monkeypatch.setattr(models, "_replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_policy(trained(model), tokenizer, tmp_path / "policy")
    load_policy(tmp_path / "policy", SIZES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "tiny"]
