"""Policies: a new tiny one, one from the Hub or a folder, and how a policy is saved.

Weights stay in float32 while they are trained (a step of 1e-6 vanishes in bfloat16), and autocast computes in bfloat16.
The frozen base of a LoRA policy needs no such master copy: on a GPU it keeps its checkpoint's precision, and with
`load_in_4bit` it is held in 4 bits (pipeline/qlora.py).
"""

import contextlib
import copy
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline import induction, qlora
from pipeline.config import ModelConfig
from pipeline.rendering import TINY_CHAT_TEMPLATE, TINY_ROLE_TOKENS, TINY_SPECIAL_TOKENS

ADAPTER = "adapter"
"""Folder of the LoRA adapter inside a saved policy."""

_PIECE = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+ ?|\s+"
"""What a token of a new tokenizer stays within. GPT-2's pieces, but that punctuation keeps the space that follows it: a
value is then written alike on a page (`[SEP] dark wash [SEP]`) and in an action (`click[dark wash]`)."""


def new_policy(config: ModelConfig, texts: Iterable[str], seed: int) -> tuple[Any, Any]:
    """A randomly initialised Llama with induction heads, and a byte-level BPE tokenizer trained on `texts`.

    The same arguments give the same tokenizer and the same weights. Nothing here can meet an unknown character: the 256
    bytes are tokens. All its weights are to be trained, whatever `config.lora_rank` (and `load_in_4bit`): LoRA on a
    random base would learn next to nothing, so it comes in with what `load_policy` loads.

    Args:
        config: the sizes.
        texts: what the tokenizer learns from, such as the experts' messages.
        seed: of the weights.

    Returns:
        The model (float32) and its tokenizer, chat template attached.

    Raises:
        ValueError: the sizes do not fit together.
    """
    if config.hidden % (2 * config.heads):
        raise ValueError(
            f"model.hidden {config.hidden} must be a multiple of twice model.heads ({config.heads}): each head's width "
            "is even, for rotary positions. Change one of the two."
        )
    tokenizer = _train_tokenizer(config, texts)
    sizes = new_sizes(config, len(tokenizer))
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(sizes, token, getattr(tokenizer, token))
    with _seeded(seed):
        model = LlamaForCausalLM(sizes)
    spellings = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    induction.install(model, [token.removeprefix("Ġ") for token in spellings], seed)  # Ġ: ByteLevel's space
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model, tokenizer


def new_sizes(config: ModelConfig, vocabulary: int) -> LlamaConfig:
    """The sizes of a new policy with so many tokens."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden,
        intermediate_size=3 * config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_length,
        # Untied reached 0.79 nats a held-out action token of ScienceWorld's gold paths where tied reached 0.86 (66
        # steps at 1e-3 on 164 trajectories, one seed). Only the policy's tokens meet the output layer: no time is lost.
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": induction.THETA},
    )


def read_sizes(path: str | Path, config: ModelConfig, revision: str | None = None) -> Any:
    """The configuration of a model of the Hub or a folder, without its weights.

    Raises:
        ValueError: there is none, or the model is too short for `config.max_length`.
    """
    try:
        sizes = AutoConfig.from_pretrained(path, revision=revision or "main").get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(_unloadable(path, error)) from error
    _check_length(sizes, path, config)
    return sizes


def load_policy(path: str | Path, config: ModelConfig, seed: int = 0, revision: str | None = None) -> tuple[Any, Any]:
    """A policy from the Hub or a folder, ready to be trained: with a fresh LoRA adapter where `config.lora_rank` > 0.

    Args:
        path: Hub id, or a folder as `save_policy` writes it.
        config: gives the LoRA adapter, whether its base is held in 4 bits, and the length that the model must bear.
        seed: of the adapter's weights.
        revision: commit, tag or branch on the Hub.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: there is no such model, it has no chat template, it is too short for `config.max_length`, or
            bitsandbytes is missing for 4 bits.
    """
    keep_precision = config.lora_rank > 0 and torch.cuda.is_available()
    in_4bit = qlora.loading() if config.load_in_4bit else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main")
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision or "main", dtype="auto" if keep_precision else torch.float32, **in_4bit
        )
    except (OSError, ValueError) as error:
        raise ValueError(_unloadable(path, error)) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {path} has no chat template; start from a chat model (its tokenizer_config.json or "
            "chat_template.jinja has one), or set model.path to a copy with a template added."
        )
    _check_length(model.config, path, config)
    qlora.compute_as_autocast(model, bf16=False)
    return add_lora(model, config, seed), tokenizer


def add_lora(model: Any, config: ModelConfig, seed: int) -> Any:
    """The model with a LoRA adapter on every linear layer but the output's, as `config` says; itself at rank 0.

    The adapter starts as the identity. The model's own weights are frozen, in place.
    """
    if not config.lora_rank:
        return model
    adapter = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with _seeded(seed):
        return get_peft_model(model, adapter)


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a policy as a folder that transformers and vLLM load; the folder appears whole or not at all.

    A LoRA policy is written with the adapter merged in, and the adapter itself in `adapter/`; one whose base is held
    in 4 bits, with what these stand for, in the precision that it was loaded in. In a run of several processes the
    first one writes and the others wait; all must call, for what is shared out is gathered.

    Args:
        model: a model of transformers, or one with a LoRA adapter; it is left as it was.
        tokenizer: with its chat template.
        folder: replaced when it exists.
    """
    state = PartialState()
    model = _whole(model)
    if state.is_main_process:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            merged = model
            if isinstance(model, PeftModel):
                model.save_pretrained(partial / ADAPTER)
                merged = _merged(model, partial / ADAPTER)
            merged.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    state.wait_for_everyone()


def _merged(model: Any, adapter: Path) -> Any:
    """A LoRA policy as a model without an adapter."""
    return qlora.merged(model, adapter) if qlora.is_in_4bit(model) else copy.deepcopy(model).merge_and_unload()


def _whole(model: Any) -> Any:
    """A model whose weights are shared out, as one on the first process's CPU; any other as it is."""
    weights = _gathered(model)
    if not weights:
        return model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(base.config))
        whole.generation_config = base.generation_config
        whole = get_peft_model(whole, model.peft_config["default"]) if isinstance(model, PeftModel) else whole
    whole.load_state_dict(weights, assign=True)
    (whole.get_base_model() if isinstance(model, PeftModel) else whole).tie_weights()
    return whole


def _gathered(model: Any) -> dict[str, torch.Tensor]:
    """The weights that FSDP or DeepSpeed has shared out, on the first process; none elsewhere, or if none are."""
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast("dict[str, torch.Tensor]", get_model_state_dict(model, options=options))
    if not any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return {}
    import deepspeed

    found = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([weight]):
            if PartialState().is_main_process:
                found[name] = weight.detach().to("cpu", copy=True)
    return found


@contextlib.contextmanager
def reference_mode(model: Any) -> Iterator[None]:
    """Within it a LoRA policy is its own reference: the base model, adapter off.

    A policy without an adapter is left alone; it is its own reference only before it is trained.
    """
    with model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
        yield


def _train_tokenizer(config: ModelConfig, texts: Iterable[str]) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[*TINY_SPECIAL_TOKENS.values(), *TINY_ROLE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **TINY_SPECIAL_TOKENS,
        additional_special_tokens=TINY_ROLE_TOKENS,
        chat_template=TINY_CHAT_TEMPLATE,
        model_max_length=config.max_length,
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator at `seed`, and afterwards where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _check_length(sizes: Any, path: str | Path, config: ModelConfig) -> None:
    longest = getattr(sizes, "max_position_embeddings", None)
    if longest is not None and longest < config.max_length:
        raise ValueError(
            f"model.max_length {config.max_length} is more than the {longest} positions of {path}; set "
            f"model.max_length={longest} or less."
        )


def _unloadable(path: str | Path, error: Exception) -> str:
    """Why a model could not be loaded, as one sentence."""
    if Path(path).is_dir():
        first = str(error).strip().splitlines()[0]
        return f"{path} holds no model that transformers can load ({first}); point model.path at a whole checkpoint."
    return (
        f"No model at {path!s}: it is no folder here, and the Hub gave none of that name (or could not be reached); "
        "set model.path to a folder or Hub id, or leave it empty for a new tiny model."
    )


def _replace(new: Path, folder: Path) -> None:
    """Put one folder in another's place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
