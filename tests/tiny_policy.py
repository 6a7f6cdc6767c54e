"""A tiny randomly initialised Llama with a byte-level BPE tokenizer, saved as a checkpoint folder.

Every part that loads a checkpoint (rendering, training, engines) can be tested on it in a second, without a network.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "You are in the kitchen. You see a table, a cupboard, a stove, a sink and a door to the hallway.",
    "Your task is to boil water. First, focus on the thermometer. Then, move the substance to the red box.",
    "Thought: I need to find the thermometer first.\nAction: open the cupboard door",
    "go to kitchen. pick up the metal pot. pour water into the pot. activate the stove. look around.",
    "No known action matches that input. Nothing happens. You take the mug 1 from the countertop 2.",
    "search[red shoes size 9] click[buy now] Instruction: find me a long lasting cotton shirt under 40 dollars",
]


def save_tiny_policy(
    folder: Path,
    *,
    vocab_size: int = 512,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    max_length: int = 512,
    sharpness: float = 1.0,
    seed: int = 0,
) -> Path:
    """Write a checkpoint into `folder` and return the folder.

    The same arguments give the same bytes. The end token is `<|im_end|>`, the chat template is ChatML.

    Args:
        folder: where to write; made when missing.
        vocab_size: rows of the embedding; the tokenizer uses no more (it may use fewer: the corpus is small).
        hidden_size: width; vLLM's CPU attention wants `hidden_size / heads` to be 32, 64 or a larger multiple of 16.
        layers: transformer blocks.
        heads: attention heads, all with their own keys and values.
        max_length: positions.
        sharpness: factor on the output layer's weights; above 1 the policy is peaked as a trained one is.
        seed: of the weights.
    """
    tokenizer = _tokenizer(vocab_size)
    tokenizer.model_max_length = max_length
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
    )
