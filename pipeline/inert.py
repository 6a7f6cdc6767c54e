"""Keys that change nothing where they stand, which is an error: of an arm, of its choices, or on the command line.

A recipe itself may hold keys of methods that it does not name, for overrides and for recipes built on it.
"""

from typing import TYPE_CHECKING

from envs import ENVIRONMENTS
from pipeline.methods import Method

if TYPE_CHECKING:
    from pipeline.config import Config

PREFERRING = {method for method in Method if method.discount is not None}
USED_BY = {
    "rollout": {*PREFERRING, Method.RFT},
    **dict.fromkeys(
        ("rollout.samples", "rollout.tasks", "rollout.undemonstrated"), {*PREFERRING, Method.RFT} - {Method.STEP}
    ),
    "pairs": PREFERRING,
    "train": PREFERRING,
    "train.gamma": {method for method in PREFERRING if method.discount and method.discount.uses_gamma},
    **{method.value: {method} for method in (Method.RFT, Method.BON, Method.STEP)},
}
"""The methods that a section, or a key of it, is for; what is not here is for all of them."""


def reason(key: str, config: "Config") -> str | None:
    """Why a key changes nothing, if so.

    Args:
        key: dotted, as `train.gamma`, or a whole section.
        config: a recipe of one method, without arms.
    """
    (method,) = config.method
    section, _, name = key.partition(".")
    if key == "evaluate.env":
        return next(filter(None, (reason(f"env.{one}", config) for one in config.evaluate.env)), None)
    if method not in USED_BY.get(key, USED_BY.get(section, set(Method))):
        return f"method={method} makes no use of it"
    if method == Method.STEP and section == "pairs" and not config.step.with_trajectories:
        return "method=step makes no use of it without step.with_trajectories"
    if method == Method.RFT and section == "rollout" and config.rft.min_reward is None:
        return "rft.min_reward is empty, so nothing that was explored is learned from"
    if key == "train.reference" and config.train.rounds == 1 and method != Method.ETO:
        return "train.rounds is 1"
    if key == "train.rounds" and config.train.rounds == 1 and method == Method.ETO:
        return "eto has at least two rounds"
    of_env = {"env": name.partition(".")[0], "experts": name.removeprefix("tasks.")}.get(section)
    if of_env in ENVIRONMENTS and of_env not in config.env.names:
        return f"the run plays {', '.join(config.env.names)}"
    if name == "epochs" and (steps := getattr(config, section).max_steps) is not None:
        return f"{section}.max_steps={steps} decides; set that to nothing ({section}.max_steps=)"
    if key == "model.lora_alpha" and not config.model.lora_rank:
        return "model.lora_rank is 0"
    if key in ("env.alfworld.expert", "experts.min_reward") and config.experts.source is not None:
        return "the experts come from experts.source"
    if key == "env.webshop.mistakes" and not config.env.webshop.noise:
        return "env.webshop.noise is 0"
    if key in ("pairs.corruption", "pairs.corrupted_actions") and not config.pairs.corrupted:
        return "pairs.corrupted is 0"
    if key == "pairs.min_gap" and config.pairs.reward == "success":
        return "pairs.reward=success knows 0 and 1 alone"
    return None
