"""`--dry-run`, on any stage: what a recipe takes of GPUs and time, before anything is loaded.

python -m pipeline train llama2-7b-lora --dry-run --gpus 8 --gpu h100
bash run_all.sh llama2-7b-lora --dry-run

Nothing is written and no weight is read; of the model its config.json alone. Memory is counted (pipeline/memory.py),
time is estimated (pipeline/speed.py). The trajectories are those in the run's folder where they are: real lengths, by
our renderer and the policy's tokenizer. Else they are `EXPECTED`, and memory is that of the longest that may come.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from envs.alfworld import SIZES
from pipeline import arms, runs, speed
from pipeline.config import Config, TrainingConfig
from pipeline.records import Pair, Trajectory, read_jsonl
from pipeline.speed import Gpu

if TYPE_CHECKING:
    from pipeline.memory import Parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What an environment's trajectories are like, before there are any."""

    tasks: tuple[int, int, int]
    """Train, seen and unseen, of the published lists."""
    turns: float
    tokens: float
    """Of an expert's trajectory, instruction and task included."""
    reply: float
    """Tokens of one turn of the policy."""


EXPECTED = {
    "sciworld": Expected(tasks=(1483, 194, 241), turns=15.2, tokens=1315, reply=26),
    "alfworld": Expected(tasks=(3321, 140, 134), turns=16.5, tokens=1013, reply=25),
    "webshop": Expected(tasks=(1824, 200, 200), turns=4.2, tokens=884, reply=23),
}
"""Means of 47, 23 and 60 experts that the environments made themselves, at 3.5 characters a token."""
USABLE = 0.92
"""Share of a GPU's memory that training may come to; CUDA itself and fragments take the rest."""
LOSERS = 1.5
"""How much longer than an expert's the policy's own trajectories are taken to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one environment gives to learn from and to play, for one seed."""

    experts: int
    expert_tokens: int
    """Of all experts together."""
    trained_share: float
    """The policy's share of the tokens."""
    longest: int
    """Tokens of the longest expert."""
    pairs: int
    pair_tokens: int
    longest_pair: tuple[int, int]
    """Tokens of its chosen and rejected trajectory."""
    read: Literal["", "experts", "pairs"]
    """What was found in the run's folder; the rest is expected."""
    evaluated: int
    """Tasks of the splits that are evaluated."""
    turns: float
    reply: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every stage takes."""
    parser.add_argument("--dry-run", action="store_true", help="print memory, speed and hours, and do nothing")
    parser.add_argument("--gpus", type=_positive, help="with --dry-run: how many (default: what DMPO_LAUNCH starts)")
    parser.add_argument("--gpu", choices=speed.GPUS, help="with --dry-run: which (default: h100)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(config: Config, gpus: int | None = None, gpu: str | None = None) -> None:
    """Print the estimate.

    Args:
        config: the recipe.
        gpus: how many GPUs; None: as many as `DMPO_LAUNCH` starts processes, else one.
        gpu: a name of `speed.GPUS`; None: h100.

    Raises:
        ValueError: the model's configuration cannot be had, or the model cannot be counted without weights.
    """
    if not runs.is_main_process():
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 120
    gpus = gpus or launched(os.environ.get("DMPO_LAUNCH", "")) or int(os.environ.get("WORLD_SIZE", "1"))
    for part in report(config, speed.GPUS[gpu or "h100"], gpus):
        console.print(part, highlight=False)


def launched(command: str) -> int | None:
    """The processes that a launch command starts; None where it does not say.

    >>> launched("accelerate launch --num_processes 8")
    8

    Raises:
        ValueError: its configuration file cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node", type=int)
    parser.add_argument("--config_file", "--config-file", type=Path)
    known, _ = parser.parse_known_args(shlex.split(command))
    if known.num_processes or not known.config_file:
        processes: int | None = known.num_processes
        return processes
    try:
        found = yaml.safe_load(known.config_file.read_text("utf-8"))["num_processes"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"DMPO_LAUNCH names {known.config_file}, which says no num_processes ({type(error).__name__}); mend the "
            "file, or give --gpus."
        ) from None
    return int(found)


def report(config: Config, gpu: Gpu, gpus: int) -> list[Any]:
    """The estimate, as what `rich` prints: sentences and tables."""
    from pipeline import memory, models

    sizes = (
        models.read_sizes(config.model.path, config.model, config.model.revision)
        if config.model.path
        else models.new_sizes(config.model, config.model.vocabulary)
    )
    works = {env: work(config, env) for env in config.env.names}
    base = config.model.model_copy(update={"lora_rank": 0, "load_in_4bit": False})
    sft = memory.build(sizes, config.model if config.model.path else base)  # a new policy is made without an adapter
    policy = memory.build(sizes, config.model)
    counts = memory.count(policy)
    name = config.model.path or "a new model"
    adapter = f" ({'QLoRA' if config.model.load_in_4bit else 'LoRA'} of rank {config.model.lora_rank})"
    trained = f"{counts.trained:,} trained{adapter if counts.base_bytes else ''}"
    served = memory.count(memory.build(sizes, base))
    return [
        f"{name}: {counts.total:,} parameters, {trained}; {gpus} x {gpu.name}. Nothing was loaded.",
        _memory_table(config, sft, policy, works, gpu, gpus),
        _serving(config, sizes, served, gpu),
        _hours_table(config, sizes, memory.count(sft), counts, served, works, gpu, gpus),
        *(f"{env}: {_longest(one)}" for env, one in works.items()),
        _assumptions() + (" Nor is the time that dequantising takes counted." if config.model.load_in_4bit else ""),
    ]


def work(config: Config, env: str) -> Work:
    """What an environment gives, from the run's folder where it is there, else as `EXPECTED`."""
    expected = EXPECTED[env]
    read: Literal["", "experts", "pairs"] = ""
    train, *evaluated = tasks(config, env)
    tokens, longest = round(train * expected.tokens), config.model.max_length
    share = min(expected.turns * expected.reply / expected.tokens, 1.0)
    folder, turns, reply = runs.seed_folder(config, env, config.seed[0]), expected.turns, expected.reply
    if found := _rendered_experts(config, folder):
        train, tokens = found["trajectories"], found["rendered_tokens"]
        share, longest = found["policy_tokens"] / tokens, found["longest"]
        turns, reply = found["turns"] / train, found["policy_tokens"] / found["turns"]
        read = "experts"
    explored = min(config.rollout.tasks or train, train) * config.rollout.samples
    pairs = min(config.pairs.limit or explored, explored)
    pair_tokens, longest_pair = round(pairs * tokens / train * (1 + LOSERS)), (config.model.max_length,) * 2
    if rendered := _rendered_pairs(config, folder):
        pairs, pair_tokens = len(rendered), sum(map(sum, rendered))
        longest_pair, read = max(rendered, key=sum), "pairs"
    return Work(
        experts=train,
        expert_tokens=tokens,
        trained_share=share,
        longest=longest,
        pairs=pairs,
        pair_tokens=pair_tokens,
        longest_pair=longest_pair,
        read=read,
        evaluated=sum(min(config.evaluate.tasks or one, one) for one in evaluated),
        turns=turns,
        reply=reply,
    )


def tasks(config: Config, env: str) -> tuple[int, ...]:
    """About how many tasks train and each evaluated split have: the published numbers, or fewer as the settings say."""
    settings: Any = getattr(config.env, env)
    published = dict(zip(("train", "seen", "unseen"), EXPECTED[env].tasks, strict=True))

    def most(split: str) -> int | None:
        if env == "sciworld":
            each = settings.train_variations if split == "train" else settings.eval_variations
            return int(each * len(settings.tasks))
        if env == "alfworld":
            return settings.most(split) or (None if settings.data else SIZES[split])
        found: int | None = getattr(settings, f"{split}_goals")
        return found

    found = {split: min(most(split) or number, number) for split, number in published.items()}
    found["dev"] = config.env.dev_tasks
    found["train"] -= found["dev"]
    return (found["train"], *(found[split] for split in config.evaluate.splits))


def _tokenizer(config: Config, folder: Path) -> Any:
    """The policy's, where it lies on this machine."""
    from transformers import AutoTokenizer

    for path in (folder / "sft" / "policy", Path(config.model.path or "")):
        if (path / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(path)
    return None


def _rendered_experts(config: Config, folder: Path) -> dict[str, Any] | None:
    """Counts of the experts that a run's folder holds; None without them or a tokenizer."""
    if not (folder / "experts" / runs.MANIFEST).is_file() or (tokenizer := _tokenizer(config, folder)) is None:
        return None
    from pipeline.examples import sft_examples
    from pipeline.rendering import Renderer

    experts = read_jsonl(folder / "experts" / runs.EPISODES, Trajectory)
    examples, counts = sft_examples(Renderer(tokenizer), experts, config.model.max_length)
    return counts | {"turns": sum(example.turns for example in examples)}


def _rendered_pairs(config: Config, folder: Path) -> list[tuple[int, int]]:
    """Tokens of both trajectories of each pair that a run's folder holds; none without a tokenizer."""
    if not (folder / "pairs" / runs.MANIFEST).is_file() or (tokenizer := _tokenizer(config, folder)) is None:
        return []
    from pipeline.examples import pair_examples
    from pipeline.pairs import PAIRS
    from pipeline.rendering import Renderer

    pairs = read_jsonl(folder / "pairs" / PAIRS, Pair)
    _, examples, _ = pair_examples(Renderer(tokenizer), pairs, config.model.max_length)
    return [(len(chosen.ids), len(rejected.ids)) for chosen, rejected in examples]


def _memory_table(config: Config, sft: Any, policy: Any, works: dict[str, Work], gpu: Gpu, gpus: int) -> Any:
    """Bytes of each GPU, by stage and by how the weights lie."""
    from rich.table import Table

    from pipeline import memory, qlora

    longest = max(one.longest for one in works.values())
    longest_pair = max((one.longest_pair for one in works.values()), key=sum)
    columns = ("stage", "longest", "weights on", "weights", "gradients", "AdamW", "passing", "total")
    title = "Memory of each GPU in GB (10^9 bytes)"
    table = Table(*columns, f"of {gpu.memory / 1e9:.0f}", title=title, title_justify="left", show_edge=False)

    def add(stage: str, rows: int, lengths: Sequence[int], where: str, said: memory.Training) -> None:
        parts = (said.weights, said.gradients, said.optimizer, said.passing, said.total)
        told = f"{rows} x " + " + ".join(map(str, lengths))
        verdict = "fits" if said.total < USABLE * gpu.memory else "does NOT fit"
        table.add_row(stage, told, where, *(f"{part / 1e9:.1f}" for part in parts), verdict)

    alone = "each GPU (DDP)" if gpus > 1 else "the GPU"
    for stage, model, section, lengths in (
        ("sft", sft, config.sft, (longest,)),
        ("train", policy, config.train, longest_pair),
    ):
        rows, bf16 = _micro_batch(section, gpus), section.bf16 is not False
        kept = memory.kept(model, lengths, rows=rows, bf16=bf16, checkpointing=section.gradient_checkpointing)
        if stage == "train":
            scored = section.micro_batch_size
            passed = memory.kept(model, lengths, rows=scored, bf16=bf16, checkpointing=True)
            add("reference", scored, lengths, "each GPU", memory.scoring(model, passed))
        add(stage, rows, lengths, alone, memory.training(model, kept, gpus=gpus))
        if gpus > 1 and not qlora.is_in_4bit(model):
            add(stage, rows, lengths, "all GPUs (FSDP)", memory.training(model, kept, gpus=gpus, sharded=True))
    return table


def _micro_batch(section: TrainingConfig, gpus: int) -> int:
    """Examples of one pass, as training makes them."""
    return min(section.micro_batch_size, max(section.batch_size // gpus, 1))


def _serving(config: Config, sizes: Any, served: "Parameters", gpu: Gpu) -> str:
    """What the engine has room for."""
    engine, length = config.engine, config.model.max_length
    room = _room(config, sizes, served, gpu)
    weights = 2 * served.total / engine.tensor_parallel / 1e9
    told = (
        f"Rollouts and evaluation use {engine.tensor_parallel} GPU (engine.tensor_parallel): {weights:.1f} GB of "
        f"weights in bfloat16 on each, a cache of {speed.cache_bytes_per_token(sizes):,} bytes a token, "
        f"{speed.SERVING_GB} GB beside: room for {room:.1f} conversations of {length} tokens at once"
    )
    return f"{told}; {_at_once(config, room):.0f} are played." if room >= 1 else f"{told}: it does NOT fit."


def _room(config: Config, sizes: Any, served: "Parameters", gpu: Gpu) -> float:
    engine = config.engine
    return speed.concurrent_sequences(
        sizes, served, gpu, engine.tensor_parallel, max_length=config.model.max_length, share=engine.gpu_memory
    )


def _at_once(config: Config, room: float) -> float:
    """Conversations that the engine works on at once; the cache's room is that of the longest ones."""
    return min(config.engine.concurrency, config.workers.processes * config.workers.slots, max(room, 1))


def _hours_table(
    config: Config,
    sizes: Any,
    sft: "Parameters",
    policy: "Parameters",
    served: "Parameters",
    works: dict[str, Work],
    gpu: Gpu,
    gpus: int,
) -> Any:
    """Hours of each stage and environment, for one seed and policy, and of the whole."""
    from rich.table import Table

    stages = ("sft", "rollout", "reference", "train", "evaluate")
    table = Table(
        *("environment", "experts", "pairs", "tokens/s: sft", "train", *(f"hours: {stages[0]}", *stages[1:]), "all"),
        title="Speed and hours for one seed; `train` and `evaluate` are of one policy, `all` of every policy",
        title_justify="left",
        show_edge=False,
    )
    total = 0.0
    trained, played = len(arms.trained(config)), len(arms.of(config))
    for env, one in works.items():
        speeds = {
            "sft": _training_speed(config.sft, sizes, sft, one, gpu, gpus, one.expert_tokens / one.experts),
            "train": _training_speed(config.train, sizes, policy, one, gpu, gpus, one.pair_tokens / one.pairs / 2),
        }
        hours = _hours(config, sizes, served, one, gpu, gpus, speeds)
        rounds = max(arm.rounds for arm in arms.of(config))
        explored = rounds * (hours["rollout"] + hours["reference"] + trained * hours["train"])
        whole = hours["sft"] + explored + played * hours["evaluate"]
        total += whole
        table.add_row(
            *(env, f"{one.experts:,}", f"{one.pairs:,}", f"{speeds['sft']:,.0f}", f"{speeds['train']:,.0f}"),
            *(f"{duration:.2f}" for duration in [*(hours[stage] for stage in stages), whole]),
        )
    table.caption = (
        f"All of it, {len(config.seed)} seed(s), {trained} trained and {played} evaluated policies: "
        f"{total * len(config.seed):.1f} h."
    )
    table.caption_justify = "left"
    return table


def _training_speed(
    section: TrainingConfig, sizes: Any, parameters: "Parameters", one: Work, gpu: Gpu, gpus: int, length: float
) -> float:
    return speed.training_tokens_per_second(
        sizes,
        parameters,
        gpu,
        gpus,
        length=length,
        trained_share=one.trained_share,
        checkpointing=section.gradient_checkpointing,
    )


def _hours(
    config: Config, sizes: Any, served: "Parameters", one: Work, gpu: Gpu, gpus: int, speeds: dict[str, float]
) -> dict[str, float]:
    """Hours of each stage for one environment."""
    length = one.expert_tokens / one.experts
    at_once, played_by = _at_once(config, _room(config, sizes, served, gpu)), config.engine.tensor_parallel
    replies = speed.reply_tokens_per_second(sizes, served, gpu, played_by, at_once=at_once, length=length)
    prompts = speed.prompt_tokens_per_second(sizes, served, gpu, played_by, length)
    episode = LOSERS * (one.turns * one.reply / replies + length / prompts)
    scored = speed.prompt_tokens_per_second(sizes, served, gpu, gpus, one.pair_tokens / one.pairs / 2)
    seen = {
        "sft": passes(config.sft, one.experts) * one.expert_tokens,
        "train": passes(config.train, one.pairs) * one.pair_tokens,
    }
    explored = min(config.rollout.tasks or one.experts, one.experts) * config.rollout.samples
    seconds = {stage: tokens / speeds[stage] for stage, tokens in seen.items()} | {
        "rollout": explored * episode,
        "reference": one.pair_tokens / scored,
        "evaluate": one.evaluated * episode,
    }
    return {stage: duration / 3600 for stage, duration in seconds.items()}


def passes(section: TrainingConfig, examples: int) -> float:
    """How often training sees each example."""
    return section.epochs if section.max_steps is None else section.max_steps * section.batch_size / examples


def _longest(one: Work) -> str:
    """The longest pair, or why it is not known."""
    chosen, rejected = one.longest_pair
    if one.read == "pairs":
        return f"the longest of {one.pairs} pairs has {chosen} + {rejected} tokens."
    experts = (
        f"the longest of {one.experts} experts has {one.longest} tokens" if one.read else "there are no experts yet"
    )
    return f"{experts}, and no pairs: the longest pair is taken to be {chosen} + {rejected} tokens, model.max_length."


def _assumptions() -> str:
    return (
        f"Assumed: {speed.MFU:.0%} of the GPU's dense bfloat16 peak in training and for prompts, "
        f"{speed.OF_BANDWIDTH:.0%} of its memory's bandwidth for replies, the policy's own trajectories {LOSERS} times "
        "as long as an expert's, a pair for every explored task; the environments' own time and loading are not "
        "counted. 'passing': activations and what else is there for a part of a step. Weights, gradients and AdamW are "
        "exact; what passes is within 15 % of real steps of small models on a CPU, and was not tried on a GPU."
    )
