"""A run folder as the stages leave it, made up: no model, no simulator, with every oddity that text can have."""

import json
import random
from pathlib import Path
from typing import Any

from pipeline import arms, choose, runs
from pipeline.config import Config
from pipeline.records import EpisodeStatus, Message, Pair, Trajectory, Turn, write_jsonl

SCRIPT = "<script>window.injected = true</script></script><img src=x onerror='window.injected = true'>"
ODD = f"{SCRIPT} \"quoted\" 'single' &amp; {{{{ braces }}}} <!-- 𝛾 → ünïcode 火 \u2028 -->"  # noqa: RUF001
KINDS = ("boil", "find-plant", "lifespan-longest", "use-thermometer")
SKILL = {"random": 0.05, "sft": 0.4, "dmpo": 0.55, "dpo": 0.5, "permuted": 0.45, "expert": 1.0}


def make_run(
    *, methods: list[str], seeds: list[int], tasks: int, name: str = "made-up", gamma: float = 0.7, **recipe: Any
) -> Config:
    """Write `runs/NAME` below the working directory.

    Args:
        methods: preference methods.
        seeds: of the run.
        tasks: of each split; kinds of task in turn.
        name: of the run.
        gamma: of the discounts.
        recipe: further sections; of an arm with `choose` the first candidate is chosen for even seeds, else the last.
    """
    tree = {"run": name, "seed": seeds, "method": methods, "train": {"gamma": gamma}}
    config = Config.model_validate(tree | recipe)
    with runs.locked(config):
        pass  # which saves config.yaml
    for seed in seeds:
        folder = runs.seed_folder(config, "sciworld", seed)
        experts = [play("expert", "train", seed, task) for task in range(tasks)]
        explored = [play("sft", "train", seed, task) for task in range(tasks)]
        _stage(folder / "experts", {"episodes.jsonl": experts}, {"episodes": tasks})
        _stage(folder / "sft", {"log.jsonl": sft_log(seed)}, {"steps": 40})
        _stage(folder / "rollout", {"episodes.jsonl": explored}, {"episodes": tasks})
        pairs = [pair(*both) for both in zip(experts, explored, strict=True) if both[0].reward > both[1].reward]
        facts = {"pairs": len(pairs), "dropped": {"tie": tasks - len(pairs) + 2, "ended in timeout": 0}, "notes": [ODD]}
        _stage(folder / "pairs", {"pairs.jsonl": pairs}, facts)
        _stage(folder / "reference", {}, {"pairs": len(pairs)})
        for arm in arms.trained(config):
            for number in range(1, arm.rounds + 1):
                for stage in ("rollout", "pairs", "reference") if number > 1 else ():
                    _stage(arm.folder("sciworld", seed, stage, number), {}, {})
                log = preference_log(f"{arm.name} {number}", seed)
                _stage(arm.folder("sciworld", seed, "train", number), {"log.jsonl": log}, {"steps": 40})
        for arm in arms.of(config):
            if arm.candidates:
                place = choose.folder(arm, "sciworld", seed)
                _stage(place, {choose.CHOICE: [{"chosen": arm.candidates[-(seed % 2)].name}]}, {})
        for policy in ("random", *(arm.name for arm in arms.of(config)), "expert"):
            for split in ("seen", "unseen"):
                episodes = [play(policy, split, seed, task) for task in range(tasks)]
                _stage(folder / "evaluate" / policy / split, {"episodes.jsonl": episodes}, {"episodes": tasks})
    return config


def _stage(folder: Path, files: dict[str, list], facts: dict) -> None:
    with runs.stage(folder, settings={}) as stage:
        for name, records in files.items():
            write_jsonl(folder / name, records)
        stage.facts.update(facts)


def play(policy: str, split: str, seed: int, task: int) -> Trajectory:
    """One made-up episode; the same arguments give the same one."""
    draw = random.Random(f"{policy} {split} {seed} {task}")
    hard = random.Random(f"{split} {task}").uniform(-0.3, 0.3)
    skill = SKILL.get(policy, 0.5) + hard + draw.uniform(-0.2, 0.2) - 0.08 * (split == "unseen")
    reward = 1.0 if policy == "expert" else round(min(1.0, max(0.0, skill)), 2)
    kind = KINDS[task % len(KINDS)]
    count = draw.randint(3, 7) if policy == "expert" else draw.randint(4, 12)
    turns = [_turn(number, count, reward, policy, draw) for number in range(count)]
    task_text = f"Your task is to {kind.replace('-', ' ')} number {task}. {ODD if task == 0 else ''}"
    messages: list[Message] = [
        {"role": "user", "content": "You are a helpful assistant to do some scientific experiment in an environment."},
        {"role": "assistant", "content": "OK"},
        {"role": "user", "content": task_text},
    ]
    for turn in turns:
        messages += [{"role": "assistant", "content": turn.text}, {"role": "user", "content": turn.observation}]
    broken = policy == "dmpo" and split == "seen" and task == 1
    return Trajectory(
        id=f"sciworld:{kind}:{100 * ('train', 'seen', 'unseen').index(split) + task}",
        env="sciworld",
        split=split,
        kind=kind,
        policy=policy,
        seed=seed,
        messages=messages[:-1],
        prompt_length=3,
        turns=turns,
        reward=reward,
        success=reward > 0.6,
        status=EpisodeStatus.ENV_ERROR
        if broken
        else EpisodeStatus.COMPLETED
        if reward == 1
        else EpisodeStatus.MAX_STEPS,
        note=f"py4j: gone {SCRIPT}" if broken else None,
    )


def _turn(number: int, count: int, reward: float, policy: str, draw: random.Random) -> Turn:
    """One turn; the first is odd in every way that text can be, the second observes much."""
    valid = policy == "expert" or draw.random() > 0.15
    place = draw.choice(["kitchen", "greenhouse", "workshop", "art studio", "foundry"])
    action = draw.choice([f"go to {place}", f"open door to {place}", "focus on thermometer", "pick up metal pot"])
    observation = f"You move to the {place}. You see a table, on it a glass cup (containing orange juice), and a stove."
    thought = f"The {place} may hold what I need, so that is where I look next."
    if number == 0:
        action, thought = action + " " + ODD, "First I look around. " + ODD
    if number == 1:
        observation = "This room is called the kitchen. In it, you see: " + "\n\ta cupboard (closed)" * 150
    if not valid:
        action, observation = action.replace("o", "0"), "No known action matches that input."
    return Turn(
        text=f"Thought: {thought}\nAction: {action}",
        action=action,
        observation=f"Observation: {observation}",
        reward=round(reward * (number + 1) / count, 2),
        valid=valid,
    )


def pair(chosen: Trajectory, rejected: Trajectory) -> Pair:
    """The expert's trajectory over the policy's."""
    return Pair(
        id=chosen.id,
        prompt=chosen.prompt,
        chosen=chosen.completion,
        rejected=rejected.completion,
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
        chosen_status=chosen.status,
        rejected_status=rejected.status,
        chosen_turns=len(chosen.turns),
        rejected_turns=len(rejected.turns),
        chosen_source=f"expert/seed{chosen.seed}/0",
        rejected_source=f"sft/seed{rejected.seed}/0",
    )


def sft_log(seed: int) -> list[dict]:
    """Loss that falls; as training writes it."""
    draw = random.Random(seed)
    return [
        {"step": step, "epoch": step / 20, "loss": 3 / (1 + step / 5) + draw.uniform(0, 0.1), "learning_rate": 2e-5}
        | {"grad_norm": draw.uniform(0.5, 1.5)}
        for step in range(1, 41)
    ]


def preference_log(name: str, seed: int) -> list[dict]:
    """Preference training; as training writes it, with a line that a resumed run wrote twice."""
    draw = random.Random(f"{name} {seed}")
    pull = draw.uniform(0.4, 0.6)
    lines = [
        {
            "step": step,
            "loss": 0.69 * (1 - pull * step / 60) + draw.uniform(-0.02, 0.02),
            "margin": pull * step / 20 + draw.uniform(-0.1, 0.1),
            "accuracy": min(1.0, 0.5 + pull * step / 50),
            "kl": 0.002 * step * pull,
            "chosen_logprob": -40 + 0.1 * step * pull,
            "rejected_logprob": -60 - 0.4 * step * pull,
            "chosen_reward": 0.01 * step,
            "rejected_reward": -0.02 * step,
            "chosen_logprob_by_turn": [-6 - turn / 2 + step / 50 for turn in range(7)],
            "rejected_logprob_by_turn": [-7 - turn / 3 - step / 30 for turn in range(12)] + [None],
            "chosen_logratio_by_turn": [-(step - 1) * (turn + 1) / 400 for turn in range(7)],
            "rejected_logratio_by_turn": [-(step - 1) * (turn + 1) / 200 for turn in range(12)] + [None],
        }
        for step in range(1, 41)
    ]
    return [*lines[:20], json.loads(json.dumps(lines[19])), *lines[20:]]
