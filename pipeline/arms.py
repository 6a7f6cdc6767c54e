"""The policies that a run compares, each an arm: a method and the recipe's keys that differ for it.

Arms share every stage that their keys leave alone. With B the folder of an environment and seed:

    B/{experts,sft,rollout,pairs,reference}      what the recipe itself says
    B/arms/KEYS/{...}                            the same stages where KEYS of an arm change them
    B/rounds/NAME/2/{rollout,pairs,reference}    later rounds of an arm that explores again with what it has learned
    B/rounds/NAME/1/train                        the policy of a round before the last
    B/train/NAME                                 the policy of the last round
    B/evaluate/NAME/SPLIT                        its evaluation

So a study of beta has one SFT policy and one set of pairs, and a study of model sizes one SFT policy a size. A policy
that learns from other environments (`env.others`) explores each of them in a folder of its own, rollout/ENV.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.config import Config, choices_of
from pipeline.methods import Method

STAGES = ("experts", "sft", "rollout", "pairs", "reference", "train", "evaluate")
FIRST = {
    **{"env": "experts", "experts": "experts", "model": "sft", "sft": "sft", "engine": "rollout", "play": "rollout"},
    **{"rollout": "rollout", "step": "rollout", "pairs": "pairs", "train.bf16": "reference", "evaluate": "evaluate"},
}
"""The first stage whose output depends on a section or key; every other key first matters to `train`."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One policy of the table."""

    name: str
    method: Method
    config: Config
    """The recipe with the arm's keys."""
    differs: Mapping[str, Any]
    """The arm's keys, `method` left out."""
    candidates: tuple["Arm", ...] = ()
    """Of an arm with `choose`, what it is chosen from; then its own policy is one of theirs."""

    @property
    def rounds(self) -> int:
        """How often it explores, pairs and trains."""
        if self.method.discount is None:
            return 1
        return max(self.config.train.rounds, 2 if self.method == Method.ETO else 1)

    def folder(self, env: str, seed: int, stage: str, number: int = 1) -> Path:
        """Where a stage of this arm writes, `train` and what comes before it in round `number`."""
        base = runs.seed_folder(self.config, env, seed)
        if stage == "evaluate":
            return base / stage / self.name
        if stage == "train":
            if number < self.rounds:
                return base / "rounds" / self.name / str(number) / stage
            return base / stage / (self.name if self._keys("train") else self.method)
        if number > 1:
            return base / "rounds" / self.name / str(number) / stage
        keys = self._keys(stage)
        return base / "arms" / ",".join(keys) / stage if keys else base / stage

    def sources(self, env: str) -> list[str]:
        """The environments that the policy of an environment learns from."""
        return [one for one in self.config.env.names if one != env] if self.config.env.others else [env]

    def explored(self, env: str, seed: int, number: int = 1) -> dict[str, Path]:
        """Where it explores in a round, in the order of `sources`, by the name that a manifest gives to the input."""
        folder = self.folder(env, seed, "rollout", number)
        if self.config.env.others:
            return {f"rollout in {one}": folder / one for one in self.sources(env)}
        return {"rollout": folder}

    def policy(self, env: str, seed: int, number: int | None = None) -> Path:
        """The stage that makes the policy of a round, the last one if none is named; 0 is policy 0."""
        number = self.rounds if number is None else number
        if number == 0 or not self.method.is_trained:
            return self.folder(env, seed, "sft")
        return self.folder(env, seed, "train", number)

    def made_by(self, number: int | None = None) -> str:
        """The stage that makes `policy`, as on the command line."""
        return "sft" if number == 0 or not self.method.is_trained else "train"

    def open_rounds(self, env: str, seed: int) -> list[int]:
        """The rounds that have been explored, or are next to be."""
        later = [number for number in range(2, self.rounds + 1) if _finished(self.explored(env, seed, number).values())]
        return [1, *later]

    def is_trained(self, env: str, seed: int, number: int) -> bool:
        """Whether the policy of a round is there, with these settings or others."""
        return _finished([self.folder(env, seed, "train", number)])

    def is_explorer_of(self, folder: Path, env: str, seed: int) -> bool:
        """Whether it is policy 0 itself, and plays when evaluated as it does when exploring into this folder."""
        explores = self.folder(env, seed, "rollout") == folder
        return explores and not self.method.is_trained and not self.config.evaluate.env

    def _keys(self, stage: str) -> list[str]:
        """Those of the arm's keys that change a stage, as parts of a folder's name."""
        keys = {"method": "step"} if self.method == Method.STEP and stage in ("rollout", "pairs", "reference") else {}
        keys |= {key: value for key, value in self.differs.items() if _matters(key, stage)}
        return [f"{key}={value}".replace("/", "_") for key, value in sorted(keys.items())]


def of(config: Config) -> list[Arm]:
    """The arms of a recipe: policy 0, its methods, and its named arms, each once and in this order."""
    plain = dict.fromkeys([Method.SFT, *config.method])
    arms = [_arm(config, method.value, {"method": method}) for method in plain]
    return arms + [_arm(config, name, keys) for name, keys in config.arms.items()]


def trained(config: Config) -> list[Arm]:
    """The arms that have a policy of their own, candidates in place of those that are chosen."""
    return [one for arm in of(config) if arm.method.is_trained for one in arm.candidates or (arm,)]


def preferring(config: Config) -> list[Arm]:
    """Those of the trained arms that learn from pairs."""
    return [arm for arm in trained(config) if arm.method.discount is not None]


def sharing(config: Config, env: str, seed: int, stage: str) -> list[Arm]:
    """For every folder of the stage `experts` or `sft` one of the arms that share it."""
    return list({arm.folder(env, seed, stage): arm for arm in [*of(config), *trained(config)]}.values())


def pairings(config: Config, env: str, seed: int, stage: str) -> list[tuple[Arm, int]]:
    """Every folder of the stage `pairs` or `reference`, once: one of the arms that share it, and the round."""
    folders = {
        arm.folder(env, seed, stage, number): (arm, number)
        for arm in preferring(config)
        for number in arm.open_rounds(env, seed)
    }
    return list(folders.values())


def baseline(arm: Arm, others: Sequence[Arm]) -> Arm:
    """The arm of policy 0 that an arm is to be compared with: one that began, and was evaluated, as it was."""
    like = [one for one in others if one.method == Method.SFT and one.name != arm.name]
    same = [one for one in like if _beginning(one) == _beginning(arm)]
    return (same or like)[0]


def _arm(config: Config, name: str, keys: Mapping[str, Any]) -> Arm:
    own, choices = choices_of(keys)
    resolved = config.differing(own)
    (method,) = resolved.method
    return Arm(
        name=name,
        method=method,
        config=resolved,
        differs={key: value for key, value in own.items() if key != "method"},
        candidates=tuple(_arm(config, f"{name}@{_told(choice)}", own | choice) for choice in choices),
    )


def _told(keys: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in keys.items())


def _finished(folders: Iterable[Path]) -> bool:
    return all((folder / runs.MANIFEST).is_file() for folder in folders)


def _matters(key: str, stage: str) -> bool:
    first = FIRST.get(key) or FIRST.get(key.partition(".")[0], "train")
    return STAGES.index(first) <= STAGES.index(stage)


def _beginning(arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in arm.differs.items() if _matters(key, "sft") or key.startswith("evaluate.")}
