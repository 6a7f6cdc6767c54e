"""What a run is made of, checked before anything starts; `pipeline.recipe` reads it from a file and the command line.

Every key is a field below with a default and a docstring; `--help` prints them, and a key that is not here is refused.
"""

import difflib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from envs import ENVIRONMENTS, comma_list
from envs.alfworld import Settings as AlfWorldSettings
from envs.sciworld import Settings as ScienceWorldSettings
from envs.webshop.settings import Settings as WebShopSettings
from pipeline import inert
from pipeline.engines import EngineSettings
from pipeline.methods import Method


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("names something twice")
    return values


def _known_environment(name: str) -> str:
    if name not in ENVIRONMENTS:
        raise ValueError(f"unknown environment; known: {', '.join(ENVIRONMENTS)}")
    return name


def _some_of_each(value: int | dict[str, int] | None) -> int | dict[str, int] | None:
    numbers = value if isinstance(value, dict) else {} if value is None else {"": value}
    for number in numbers.values():
        if number < 1:
            raise ValueError(f"a number of tasks must be at least 1, and {number} is not")
    for name in numbers if isinstance(value, dict) else ():
        _known_environment(name)
    return value


Seed = Annotated[int, Field(ge=0)]
RunName = Annotated[str, BeforeValidator(str), Field(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*)?$")]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors; a field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class EnvConfig(Section):
    """Environments. On the command line `env=NAME[,NAME]` picks them and `env.NAME.key=value` sets one up."""

    names: Annotated[
        list[Annotated[str, AfterValidator(_known_environment)]],
        BeforeValidator(comma_list),
        Field(min_length=1),
        AfterValidator(_distinct),
    ] = ["sciworld"]
    """The environments of the run, one after the other."""
    dev_tasks: int = Field(0, ge=0)
    """Training tasks, spread over their kinds, that are set aside as the split `dev`: nothing is learned from them, and
    what is to be chosen (`choose` of an arm) is chosen by them, never by seen or unseen."""
    others: bool = False
    """Whether a policy learns from the run's other environments, and not from the one that it is evaluated on; for arms
    alone, which begin with an SFT policy of their own."""
    example: bool = True
    """Whether prompts of rollouts and evaluations carry one worked example, as the paper's do. Training never does."""
    alfworld: AlfWorldSettings = AlfWorldSettings()
    sciworld: ScienceWorldSettings = ScienceWorldSettings()
    webshop: WebShopSettings = WebShopSettings()

    @model_validator(mode="before")
    @classmethod
    def _bare_names(cls, value: Any) -> Any:
        return {"names": value} if isinstance(value, str | list) else value


class ModelConfig(Section):
    """The policy before any training."""

    path: str | None = None
    """Hub id or folder of the model to start from. Empty: a new, randomly initialised Llama of the sizes below with a
    BPE tokenizer trained on the experts' text."""
    revision: str | None = None
    """Commit, tag or branch of the Hub model; a commit pins what a name alone does not. Empty: its main branch, whose
    commit the manifest of `sft` names."""
    max_length: int = Field(2048, ge=64)
    """Longest conversation in tokens, in training and in rollouts."""
    vocabulary: int = Field(3000, ge=300)
    """Tokens of the new tokenizer."""
    hidden: int = Field(256, ge=8)
    """Width of the new model; its feed-forward layers are three times as wide."""
    layers: int = Field(4, ge=2)
    """Decoder layers of the new model; its induction heads take two (pipeline/induction.py)."""
    heads: int = Field(4, ge=2)
    """Attention heads of the new model; its induction heads take two."""
    lora_rank: int = Field(0, ge=0)
    """Rank of LoRA adapters on every linear layer; 0 trains all weights. With LoRA the reference is the base model with
    the adapter off."""
    lora_alpha: int = Field(16, ge=1)
    """Scale of the LoRA update: it is multiplied by alpha / rank."""
    load_in_4bit: bool = False
    """QLoRA: hold the frozen base of a LoRA policy in 4 bits (NF4, double quantisation), a quarter of bfloat16's bytes;
    needs bitsandbytes. Policies are saved, and served, with the dequantised base; a stage quantises what it loads."""

    @model_validator(mode="after")
    def _sizes_of_a_new_model(self) -> "ModelConfig":
        sizes = self.model_fields_set & {"vocabulary", "hidden", "layers", "heads"}
        if self.path is not None and any(getattr(self, key) != type(self).model_fields[key].default for key in sizes):
            raise ValueError(f"{sorted(sizes)[0]} is a size of a new model and has no effect beside model.path")
        if self.path is None and self.revision is not None:
            raise ValueError("revision is of a Hub model and has no effect without model.path")
        return self

    @model_validator(mode="after")
    def _frozen_base_in_4bit(self) -> "ModelConfig":
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError("load_in_4bit is of the frozen base of a LoRA policy; set model.lora_rank, too")
        return self


class WorkersConfig(Section):
    """The processes that environments run in. On the command line `workers=ray` is short for `workers.backend=ray`."""

    backend: Literal["local", "ray"] = "local"
    """Where they run: on this machine, or as actors of a Ray cluster (the one that RAY_ADDRESS names, else the one this
    machine is a node of, else one that is started here). The episodes are the same. Needs the extra `ray`."""
    processes: int = Field(2, ge=1)
    """Worker processes, in all; ScienceWorld starts one JVM in each."""
    slots: int = Field(8, ge=1)
    """Episodes that take turns in one worker; processes x slots episodes are played at once."""
    timeout: float = Field(120, gt=0)
    """Seconds after which an unanswered step counts as lost."""

    @property
    def here(self) -> int:
        """How many processes may work side by side on this machine, at what the environments need."""
        return self.processes if self.backend == "local" else min(self.processes, os.cpu_count() or 1)


class ExpertsConfig(Section):
    """Expert trajectories."""

    source: Path | None = None
    """File of official expert data (ShareGPT JSON, as published with ETO); `{env}` in it stands for the environment's
    name, as in `data/{env}_sft.json`. Empty: the environment solves its own training tasks."""
    thoughts: bool = True
    """Whether the expert's replies say why (`Thought: ...`) before they act. Official data keeps what it has."""
    min_reward: float = Field(1.0, gt=0, le=1)
    """Least reward of a solution that is kept as a demonstration; with less than 1 imperfect ones are, where experts
    make mistakes (`env.webshop.noise`). Official data are kept whatever their reward."""
    tasks: Annotated[int | dict[str, int] | None, AfterValidator(_some_of_each)] = None
    """Demonstrate only this many of the training tasks, as many of every kind, drawn by their ids: one number, or one
    for each environment, as `{webshop: 1000}`; of an environment that is not named, and if empty, all."""

    def tasks_of(self, env: str) -> int | None:
        """The most tasks of one environment, if there is a most."""
        return self.tasks.get(env) if isinstance(self.tasks, dict) else self.tasks

    def source_of(self, env: str) -> Path | None:
        """The file of one environment, if there is any."""
        return self.source and Path(str(self.source).replace("{env}", env))


class TrainingConfig(Section):
    """What SFT and preference training share."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(gt=0)
    """Examples an optimizer step sees, over all processes and accumulation steps."""
    micro_batch_size: int = Field(8, gt=0)
    """Examples in one forward pass on one device; accumulation makes up the rest of `batch_size`."""
    epochs: float = Field(3, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps in all, however many passes that makes. Empty: `epochs` decides."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps that the learning rate rises over."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "constant_with_warmup"
    """Learning rate after the warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    bf16: bool | None = None
    """bfloat16 autocast; empty: where the machine computes in it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_steps: int = Field(100, ge=1)
    """Optimizer steps between checkpoints; a killed stage goes on from the last one."""

    @model_validator(mode="after")
    def _whole_accumulation(self) -> "TrainingConfig":
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}; make it one"
            )
        return self


class SftConfig(TrainingConfig):
    """Supervised fine-tuning on the experts' turns."""

    learning_rate: float = Field(2e-5, gt=0)
    batch_size: int = Field(64, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"


class PlayConfig(Section):
    """How a policy plays, in exploration and evaluation alike."""

    max_tokens: int = Field(256, ge=1)
    """Most tokens of one reply."""
    max_malformed: int | None = Field(None, ge=1)
    """Give an episode up after this many malformed replies in a row (status `parse_error`). Empty: never, as the
    paper."""
    max_invalid: int | None = Field(None, ge=1)
    """Give an episode up after this many steps in a row that were not possible, malformed replies among them (status
    `stuck`). Empty: never, as the paper."""


class RolloutConfig(Section):
    """Exploration of the training tasks by the SFT policy."""

    temperature: float = Field(0.7, ge=0)
    """Sampling temperature; 0 is greedy, which is what the official code does."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: keep the likeliest tokens up to this probability."""
    samples: int = Field(1, ge=1)
    """Episodes for each training task."""
    tasks: int | None = Field(None, ge=1)
    """Explore only this many training tasks of those that may be, drawn by the run's seed. Empty: all."""
    undemonstrated: bool = False
    """Whether training tasks without an expert may be explored, too (`experts.tasks` leaves some): they make pairs of
    the policy's own samples, with pairs.contest=samples or all."""

    @model_validator(mode="after")
    def _sampling(self) -> "RolloutConfig":
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1):
            raise ValueError("samples and top_p have no effect at temperature 0, where every episode is the same")
        return self


def _is_empty(value: Any) -> bool:
    return value is None


class PairsConfig(Section):
    """Win/lose pairs: who competes on a task, what makes a pair, and how much noise the pairs hold.

    Done in this order: contest, `min_gap`, `cut`, limits of length, `noisy`, `limit`, corruption, flips.
    """

    contest: Literal["expert", "samples", "all"] = "expert"
    """Who competes on a task. `expert`: the expert against each of the policy's samples, a pair each. `samples`: the
    best of the policy's samples against the worst, one pair a task (it takes rollout.samples of 2 or more). `all`: the
    best against the worst of the samples and the expert. Of several equally good, or equally bad, the one with the
    fewest turns is taken, so that no side is long by selection; then the expert; then the earliest sample."""
    reward: Literal["score", "success"] = "score"
    """What decides: the score in [0, 1], or success alone (1 or 0)."""
    min_gap: float = Field(0.0, ge=0, lt=1)
    """Least difference of the two rewards; a smaller one drops the pair, and 0 drops ties alone."""
    errors: Literal["drop", "keep"] = "drop"
    """What to do with episodes that ended in an environment error or a time-out."""
    cut: Literal["none", "official"] = "none"
    """`official`: a policy's losing trajectory loses the turns after the winner's number of turns + 5, as in ETO's
    construct_preference.py, which does so on WebShop and ScienceWorld but not on ALFWorld; here this key decides."""
    min_turns: int = Field(1, ge=1)
    """Least turns of the loser, after the cut; a shorter one drops the pair."""
    max_turns: int | None = Field(None, ge=1)
    """Most turns of the loser, after the cut; a longer one drops the pair. Empty: no limit."""
    min_turn_gap: int | None = Field(None, ge=1, exclude_if=_is_empty)
    """Least difference of the two sides' numbers of turns, whichever is longer, after the cut; a smaller one drops the
    pair. Empty: no limit."""
    max_turn_gap: int | None = Field(None, ge=0, exclude_if=_is_empty)
    """Most difference of the two sides' numbers of turns, after the cut; a larger one drops the pair. Empty: no
    limit."""
    noisy: Literal["keep", "drop", "only"] = "keep"
    """What to do with losers that, after the cut, repeat actions or hold meaningless text (defined in
    pipeline/noise.py): `keep` is the paper's noisy setting, `drop` its clean one, `only` keeps nothing else."""
    limit: int | None = Field(None, ge=1)
    """Train on so many pairs, drawn by the run's seed, for arms that are to differ in what their pairs are and not in
    how many; fewer are an error. Empty: all."""
    corrupted: float = Field(0.0, ge=0, le=1)
    """Share of the pairs whose loser is corrupted, drawn by the run's seed; a larger share holds a smaller one's."""
    corruption: Literal["repeat", "random"] = "repeat"
    """What is put into a corrupted loser, at a random turn: `repeat`, that turn again, with the answer it got;
    `random`, actions made of random words of the pairs."""
    corrupted_actions: int = Field(3, ge=1)
    """How many actions are put into a corrupted loser."""
    flipped: float = Field(0.0, ge=0, le=1)
    """Share of the pairs whose chosen and rejected are swapped, drawn by the run's seed; a larger share holds a
    smaller one's."""

    @model_validator(mode="after")
    def _some_length(self) -> "PairsConfig":
        if self.max_turns is not None and self.max_turns < self.min_turns:
            raise ValueError(f"min_turns {self.min_turns} is more than max_turns {self.max_turns}; no loser fits")
        least, most = self.min_turn_gap, self.max_turn_gap
        if least is not None and most is not None and most < least:
            raise ValueError(f"min_turn_gap {least} is more than max_turn_gap {most}; no pair fits")
        return self


class PreferenceConfig(TrainingConfig):
    """Preference training."""

    learning_rate: float = Field(1e-6, gt=0)
    batch_size: int = Field(32, gt=0)
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference policy."""
    gamma: float = Field(0.7, ge=0, le=1)
    """Discount over turns; `dpo`, `dpo_norm` and `mean` have none."""
    nll: float = Field(0.0, ge=0)
    """Weight of an SFT term beside the preference loss: the winner's mean negative log-prob a token. It keeps the
    winner likely where the loss alone would only make the loser less so."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs taken to be labelled the wrong way round (conservative DPO)."""
    rounds: int = Field(1, ge=1)
    """Rounds of exploring, pairing and training; each explores with the policy of the one before and goes on from it.
    `eto` has at least two."""
    reference: Literal["renewed", "kept"] = "renewed"
    """The reference of a later round: the policy that explored it, or policy 0 throughout."""


class RftConfig(TrainingConfig):
    """Rejection-sampled fine-tuning, `method=rft`: SFT that goes on from policy 0, on experts and its own successes."""

    learning_rate: float = Field(2e-5, gt=0)
    batch_size: int = Field(64, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    min_reward: float | None = Field(1.0, gt=0, le=1)
    """Least reward of an explored trajectory that is learned from; equal ones of a task count once. Empty: none is, and
    the experts alone are learned from again, which is the control for what is mere further training."""


class BonConfig(Section):
    """Best of n at evaluation, `method=bon`."""

    samples: int = Field(10, ge=2)
    """Attempts at each task, of which the best counts."""
    temperature: float = Field(0.7, gt=0)
    """Sampling temperature."""


class StepConfig(Section):
    """Step-level preferences, `method=step`: policy 0 goes on from every step of an expert."""

    samples: int = Field(3, ge=1)
    """Rollouts from each step; their mean reward is what the expert's step before is worth."""
    tasks: int | None = Field(None, ge=1)
    """Only the experts of this many of the explored tasks, drawn by the seed. Empty: of all."""
    min_gap: float = Field(0.01, gt=0, le=1)
    """Least difference between what the expert's step is worth and what the policy's is."""
    with_trajectories: bool = False
    """Whether the pairs of whole trajectories are trained on as well: IPR's mixture of step and outcome loss."""


class EvaluateConfig(Section):
    """Evaluation on new tasks, greedy."""

    splits: Annotated[
        list[Literal["train", "dev", "seen", "unseen"]],
        BeforeValidator(comma_list),
        Field(min_length=1),
        AfterValidator(_distinct),
    ] = ["seen", "unseen"]
    """The splits to play. `dev` alone, while a recipe is being found, leaves seen and unseen tasks untouched; `train`
    tells whether a policy is better where it has learned."""
    env: dict[str, Any] = {}
    """Keys of the section `env` that are other ones when policies are evaluated than when they learn, as
    `{sciworld.simplification: ""}`: what a change of the environment costs."""
    tasks: int | None = Field(None, ge=1)
    """Play only this many tasks of a split, as many of every kind, drawn by their ids. Empty: all."""


class Config(Section):
    """A whole run."""

    run: RunName = ""
    """Name of the run's folder under runs/; empty: the recipe's name."""
    reuse: Annotated[list[RunName], BeforeValidator(comma_list), AfterValidator(_distinct)] = []
    """Other runs whose finished stages are taken over where settings and inputs are the same: studies that begin alike
    train one SFT policy, and seeds that were run apart (`seed=0 run=a`, `seed=1 run=b`) become one table."""
    seed: Annotated[list[Seed], BeforeValidator(comma_list), Field(min_length=1), AfterValidator(_distinct)] = [0]
    """Seeds; each is a whole run of its own, and the table averages over them."""
    method: Annotated[list[Method], BeforeValidator(comma_list), AfterValidator(_distinct)] = [Method.DMPO]
    """Methods to compare, each from the same SFT policy: sft, bon, rft, dpo, eto, dpo_norm, dmpo, dmpo_printed, mean,
    reversed, permuted, matched, step (pipeline/methods.py says what each is)."""
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+=-]*$")], dict[str, Any]] = {}
    """Further policies of the run, by name: the keys that differ, as `{dmpo+nll: {method: dmpo, train.nll: 0.3}}`. What
    does not differ is shared with the other policies: SFT, exploration, pairs. With `choose: {train.gamma: [0.5, 0.9]}`
    among them there is one policy a value (of several keys: a combination), and the best on `dev` is taken."""
    compare: Annotated[list[tuple[str, str]], AfterValidator(_distinct)] = []
    """Policies to set against each other in the report, as `[[dpo, dmpo]]`: the baseline, then the one that is compared
    with it. Judged together with what is compared anyway, each policy with the SFT policy that it began from."""
    env: EnvConfig = EnvConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineSettings = EngineSettings()
    workers: WorkersConfig = WorkersConfig()
    experts: ExpertsConfig = ExpertsConfig()
    sft: SftConfig = SftConfig()
    play: PlayConfig = PlayConfig()
    rollout: RolloutConfig = RolloutConfig()
    pairs: PairsConfig = PairsConfig()
    train: PreferenceConfig = PreferenceConfig()
    rft: RftConfig = RftConfig()
    bon: BonConfig = BonConfig()
    step: StepConfig = StepConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _some_others(self) -> "Config":
        if self.env.others and len(self.env.names) < 2:
            raise ValueError("env.others: the run plays one environment, so there is no other; name more with env=")
        return self

    @model_validator(mode="after")
    def _some_dev(self) -> "Config":
        if "dev" in self.evaluate.splits and not self.env.dev_tasks:
            raise ValueError("evaluate.splits: dev has no tasks; set env.dev_tasks")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> "Config":
        source = self.experts.source
        if source is not None and len(self.env.names) > 1 and "{env}" not in str(source):
            raise ValueError(
                "experts.source holds the data of one environment; name one with env=, or write {env} where its name "
                "stands in each file's"
            )
        return self

    @model_validator(mode="after")
    def _room_for_worlds(self) -> "Config":
        if "sciworld" in self.env.names:
            self.env.sciworld.check_heap(self.workers.slots)
        return self

    @model_validator(mode="after")
    def _whole_arms(self) -> "Config":
        for name, keys in self.arms.items():
            if name in {"random", "expert", "sft", *self.method}:
                raise ValueError(f"arms.{name}: the run has a policy of this name already")
            if shared := sorted(key for key in keys if key.partition(".")[0] in SHARED or key in ("env", "env.names")):
                raise ValueError(f"arms.{name}: {shared[0]} is the whole run's and cannot differ for one policy")
            of_data = [key for key in keys if key.partition(".")[0] in ("env", "experts") and key != "env.others"]
            if keys.get("env.others") and of_data:
                raise ValueError(f"arms.{name}: with env.others the data are the run's own; leave {of_data[0]} out")
            self._check_policies(name, *choices_of(keys))
        return self

    def _check_policies(self, arm: str, own: dict[str, Any], choices: list[dict[str, Any]]) -> None:
        """Refuse an arm whose policy, or one that it may choose, cannot be, and one of whose keys makes no difference.

        Raises:
            ValueError: names the arm.
        """
        if choices and not self.env.dev_tasks:
            raise ValueError(f"arms.{arm}: choose needs a dev split; set env.dev_tasks")
        try:
            recipes = [self.differing(own | one) for one in [{}, *choices]]
            recipes[0].when_evaluated  # noqa: B018
        except ValidationError as error:
            raise ValueError(explain(error, f"arms.{arm}").removesuffix(".")) from None
        if "method" not in own or len({method for one in recipes for method in one.method}) != 1:
            raise ValueError(f"arms.{arm}: an arm has one method, as in {{method: dmpo, train.beta: 0.5}}")
        for key in [*own, *(choices[0] if choices else ())]:
            reasons = [inert.reason(key, one) for one in recipes[1:] or recipes]
            if all(reasons):
                raise ValueError(f"arms.{arm}: {key} has no effect: {reasons[0]}")

    @model_validator(mode="after")
    def _known_contrasts(self) -> "Config":
        methods: dict[str, Any] = {method.value: method for method in (Method.SFT, *self.method)}
        methods |= {name: keys["method"] for name, keys in self.arms.items()}
        # Best of n is chosen by the very reward that would judge it.
        known = [name for name, method in methods.items() if method != Method.BON]
        for baseline, treatment in self.compare:
            for name in (baseline, treatment):
                if name not in known:
                    raise ValueError(f"compare: the run has no policy {name!r} to compare; it has {', '.join(known)}")
            if baseline == treatment:
                raise ValueError(f"compare: {baseline} is set against itself; name two policies")
        return self

    def differing(self, keys: Mapping[str, Any]) -> "Config":
        """This recipe with other values for some dotted keys, and without arms.

        Raises:
            ValidationError: a key or value that a run cannot have.
            ValueError: a key that lies in no section.
        """
        tree = self.model_dump(mode="json") | {"arms": {}, "compare": []}
        for key, value in keys.items():
            put(tree, key, value)
        return Config.model_validate(tree)

    @property
    def when_evaluated(self) -> "Config":
        """This recipe with `evaluate.env` in force."""
        return self.differing({f"env.{key}": value for key, value in self.evaluate.env.items()})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path("runs") / self.run


def choices_of(keys: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The keys of an arm without `choose`, and every combination of values that `choose` gives to pick from.

    >>> choices_of({"method": "dmpo", "choose": {"train.gamma": [0.5, 0.9]}})
    ({'method': 'dmpo'}, [{'train.gamma': 0.5}, {'train.gamma': 0.9}])
    """
    own = {key: value for key, value in keys.items() if key != "choose"}
    grid = keys.get("choose") or {}
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError("choose: name keys and for each a list of values, as in {train.gamma: [0.5, 0.9]}")
    if twice := [key for key, values in grid.items() if len(set(map(str, values))) < len(values)]:
        raise ValueError(f"choose: {twice[0]} has the same value twice")
    return own, [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []


SHORT = {"env": "names", "workers": "backend"}
"""Sections that one of their keys may stand for: `env=sciworld` is `env.names=sciworld`."""

SHARED = ("run", "reuse", "seed", "arms", "compare", "workers")
"""Keys that no arm can have for itself."""


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put the value of `a.b.c` into nested dicts.

    Raises:
        ValueError: `a` or `a.b` is there, and no dict.
    """
    path = [key, SHORT[key]] if key in SHORT else key.split(".")
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{key}: {part} is no section.")
    tree[path[-1]] = value


def explain(error: ValidationError, source: str) -> str:
    """The first complaint of a validation as one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not key:  # keys that contradict each other
        return f"{source}: {message}."
    if first["type"] != "extra_forbidden":
        return f"{source}: {key}: {message} (given: {first['input']!r})."
    near = difflib.get_close_matches(key, [name for name, _, _ in describe(Config)], n=1, cutoff=0.5)
    return f"{source}: unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else '.'} --help lists every key."


def describe(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of a section as (dotted name, default, meaning), depth first."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from describe(annotation, f"{prefix}{name}.")
            continue
        default = yaml.safe_dump(_plain(field.default), default_flow_style=True).removesuffix("...\n").strip()
        yield prefix + name, default, " ".join(_meaning(section, name).split())


def _meaning(section: type[BaseModel], name: str) -> str:
    """The docstring of a field, or of the field that it overrides."""
    fields = (base.model_fields.get(name) for base in section.__mro__ if issubclass(base, BaseModel))
    return next((field.description for field in fields if field and field.description), "")


def _plain(value: Any) -> Any:
    """A default as YAML writes it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else str(value)
