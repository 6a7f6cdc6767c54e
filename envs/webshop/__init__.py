"""WebShop: shopping for what an instruction asks for (Yao et al. 2022, https://arxiv.org/abs/2207.01206).

    json_stream, store, catalogue   the published files, read within bounds of memory and kept on disk
    generator                       a catalogue of our own in the same formats
    analyzer, search                Lucene's analysis and BM25: same scores, same order, without Java
    goals, tasks                    what customers want, as drawn by a seed; splits and content ids
    reward                          what a purchase is worth
    text, shop                      the official text environment, to the byte; all of it opened from settings
    expert                          who shops
    server, client                  the site over HTTP, for programs and people, and what drives it or the official one

What follows the official ETO wrapper: the first observation is the page with the search box; 10 steps; the reward comes
with the purchase and is 0 without one. Ours: `success` is a reward of 1, where the wrapper calls any purchase a success
(tables tell that share as `bought`); the instruction and the worked example are in our own words; where the official
code raises, the page stays and the step was invalid.
"""

import random
import re
from functools import lru_cache
from typing import Any, Literal, Self

from envs import MALFORMED_OBSERVATION, SPLITS, ExpertStep, Info, TextEnv
from envs.webshop.goals import CEILING
from envs.webshop.settings import Settings

__all__ = ["STEP_LIMIT", "Settings", "WebShop"]

STEP_LIMIT = 10
"""Most actions of an episode (eval_agent/configs/task/webshop.json of ETO)."""

INSTRUCTION = """\
You shop on a web site by text commands, for what an instruction asks for. Answer every message with a thought and one \
command:
Thought: why you act
Action: the command

Commands: search[words] and click[text], where the text is a button, a product's number or an option's value that the \
page shows.
Look for a product that fits, open it, choose the options that are asked for one by one, and click[Buy Now]. You buy \
once and take 10 steps at most. What is not possible changes nothing."""

# Of a catalogue of another seed than 0; its asin is in no other.
_WANTED = "Instruction: [SEP] i need a leak proof sports bottle in blue, and price lower than 40.00 dollars [SEP]"
_BOTTLE = (
    f"Observation: {_WANTED} Back to Search [SEP] < Prev [SEP] color [SEP] black [SEP] blue [SEP] pink [SEP] Norinby "
    "Modern Leak Proof Sports Bottle for Gym [SEP] Price: $18.99 [SEP] Rating: N.A. [SEP] Description [SEP] Features "
    "[SEP] Reviews [SEP] Buy Now"
)
EXAMPLE = [  # made up: no catalogue has these products
    (
        f"WebShop [SEP] {_WANTED} Search",
        "Thought: I search for what I am to buy.\nAction: search[leak proof sports bottle blue]",
    ),
    (
        f"Observation: {_WANTED} Back to Search [SEP] Page 1 (Total results: 50) [SEP] Next > [SEP] B0EXAMPLES [SEP] "
        "Norinby Modern Leak Proof Sports Bottle for Gym [SEP] $18.99 [SEP] B0EXEMPLAR [SEP] Kelaford Pro Bpa Free "
        "Sports Bottle with Straw [SEP] $22.99",
        "Thought: B0EXAMPLES may be it, so I open it.\nAction: click[B0EXAMPLES]",
    ),
    (_BOTTLE, "Thought: color: blue. I choose it.\nAction: click[blue]"),
    (_BOTTLE, "Thought: Price: $18.99, lower than 40.00 dollars. I buy it.\nAction: click[Buy Now]"),
]

_COMMAND = re.compile(r"(?:search|click)\[.+\]", re.DOTALL)


@lru_cache(maxsize=1)
def _numbers_by_wish(dumped: str) -> dict[str, list[int]]:
    """Numbers of goals by their instructions without the price ceiling; of a dumped `Settings`."""
    from envs.webshop.shop import open_shop

    found: dict[str, list[int]] = {}
    for number, goal in enumerate(open_shop(Settings.model_validate_json(dumped)).goals):
        found.setdefault(CEILING.sub("", goal["instruction_text"]), []).append(number)
    return found


_Settings = Settings  # by this name where a class has an attribute `Settings`


class WebShop(TextEnv):
    """WebShop in text.

    ## Description
    A shop with a search box, pages of results, pages of products with options, and a button to buy. A task
    (`webshop:goal-12-1f0c3a5e`) is a goal by its number and its instruction: a product of some kind, with attributes
    and options, below a price.

    ## Actions
    `search[words]` on any page, `click[text]` for what the page shows as a button, a product or an option.

    ## Observations
    The page's visible texts joined by ` [SEP] `, as the official `WebAgentTextEnv(observation_mode="text")` gives them.
    The first one is the page with the search box. An action that is not possible shows the same page again.

    ## Rewards
    WebShop's reward of the purchase, in [0, 1]; 0 before it.

    ## Episode end
    Terminated by the purchase. Truncated after `STEP_LIMIT` steps.

    ## Info
    `reward`, `success` (the reward is 1), `valid` (the action was possible).

    ## Arguments
    `settings`: see `Settings`. Nothing is left to chance but `search[<r>]`, so `reset(seed=...)` changes nothing.

    ## Version history
    1: princeton-nlp/WebShop at 64fa2a5.
    """

    name = "webshop"
    Settings = Settings
    completed = "bought"

    def __init__(self, settings: _Settings | None = None) -> None:
        from envs.webshop import tasks
        from envs.webshop.client import WebShopClient
        from envs.webshop.shop import open_shop
        from envs.webshop.text import WebShopText

        self._settings = settings or _Settings()
        self._shop = open_shop(self._settings)
        self._splits = tasks.split(self._shop.goals, self._settings)
        tasks.check(self._shop.goals, self._splits.goals, products=self._settings.splits is None)
        self._site = WebShopClient(self._settings.url) if self._settings.url else WebShopText(self._shop)
        self._goal = self._shop.goals[0]
        self._steps = 0
        self._reward = 0.0
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:  # type: ignore[override]
        """Begin the task whose content id is `options["task"]`; the observation is the page with the search box.

        Raises:
            ValueError: no such task, or the site of `Settings.url` has another goal under its number.
        """
        number = self._number((options or {}).get("task", ""))
        text = self._site.reset(number)
        self._steps, self._reward, self._over = 0, 0.0, False
        self._goal = self._shop.goals[number]
        wanted = self._goal["instruction_text"]
        if self._settings.url and CEILING.sub("", wanted).strip() not in text:
            raise ValueError(
                f"{self._settings.url} has another goal under number {number} than this catalogue, which asks for "
                f"{wanted!r}: env.webshop.data has to be the catalogue of that site."
            )
        return text, self._info(valid=True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:  # type: ignore[override]
        """Take one action; returns observation, reward, terminated, truncated, info.

        Raises:
            ValueError: no episode is going on.
        """
        from envs.webshop.text import OfficialError

        if self._over:
            raise ValueError("The episode is over: call reset before the next step.")
        self._steps += 1
        observation, reward, terminated, valid = MALFORMED_OBSERVATION, 0.0, False, False
        if action.strip():
            try:
                observation, reward, terminated, valid = self._site.step(action)
            except OfficialError:
                observation = self._site.page.text
        self._reward += reward
        truncated = not terminated and self._steps >= STEP_LIMIT
        self._over = terminated or truncated
        return observation, float(reward), terminated, truncated, self._info(valid=valid)

    def tasks(self, split: str) -> list[str]:
        """Content ids of a split's goals, in an order drawn once; official lists keep their order.

        Raises:
            ValueError: unknown split.
        """
        from envs.webshop.tasks import content_id

        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; known: {', '.join(SPLITS)}.")
        return [content_id(number, self._shop.goals[number]) for number in self._splits.goals[split]]

    def published(self) -> dict[str, list[str]]:
        """ETO's lists as the files of `Settings.splits` have them, a goal twice where they do."""
        from envs.webshop import tasks

        folder, goals = self._settings.splits, self._shop.goals
        lists = tasks.published(folder, len(goals)) if folder else {}
        return {name: [tasks.content_id(number, goals[number]) for number in lists[name]] for name in lists}

    def valid_actions(self) -> list[str]:
        """A click on all that the page lets one click; beside the search box, a search for what is wanted."""
        from envs.webshop.expert import wish_of

        available = self._site.available
        found = [f"click[{text}]" for text in available.clickables if text != "search"]
        if available.has_search_bar:
            found.append(f"search[{wish_of(self._goal['instruction_text'])}]")
        return sorted(found)

    def expert(self, task: str) -> list[ExpertStep]:
        """A purchase by someone who knows the goal's record; see `envs.webshop.expert`.

        Raises:
            ValueError: no such task.
        """
        from envs.webshop.expert import Customer
        from envs.webshop.text import WebShopText

        number = self._number(task)
        self._over = True
        text = WebShopText(self._shop)
        text.reset(number)
        chance = random.Random(task)
        mistake = chance.choice(self._settings.mistakes) if chance.random() < self._settings.noise else None
        customer = Customer(text.goal, STEP_LIMIT, chance, mistake)
        steps = []
        for _ in range(STEP_LIMIT):
            thought, action = customer.next(text.page)
            step = text.step(action)
            steps.append(ExpertStep(thought, action, step.observation))
            if step.done:
                break
        return steps

    def kind(self, task: str) -> str:
        """The product's category (`beauty`, ...)."""
        return self._shop.goals[self._number(task)]["category"]

    @classmethod
    def prepare(cls, settings: Any, processes: int) -> None:
        """Make the catalogue, its search index and the goals, where that was not done before."""
        from envs.webshop.shop import open_shop

        open_shop(settings, processes)

    @classmethod
    def notes(cls, settings: Any) -> list[str]:
        """The tagger, what of official lists is left out, and what `completed` means."""
        from envs.webshop import tasks
        from envs.webshop.reward import tagger
        from envs.webshop.shop import open_shop

        left_out = tasks.split(open_shop(settings).goals, settings).left_out
        return [
            f"Nouns of titles, for the reward, are found by {tagger()}.",
            "Completed episodes are those that ended in a purchase, whatever it was worth.",
            *(f"Goals {reason}, left out of train: {count}." for reason, count in left_out.items()),
        ]

    @classmethod
    def instruction(cls, settings: Any) -> str:
        """See `TextEnv`."""
        return INSTRUCTION

    @classmethod
    def example(cls, settings: Any) -> list[tuple[str, str]]:
        """See `TextEnv`."""
        return list(EXAMPLE)

    @classmethod
    def fingerprint(cls, settings: Any) -> str:
        """The catalogue's content, people's instructions, and the tagger that rewards depend on."""
        from envs.webshop.reward import tagger
        from envs.webshop.shop import content_of

        return f"{content_of(settings)}, {tagger()}"

    @classmethod
    def relevant(cls, settings: Any, split: str) -> dict[str, Any]:
        """All but the place of the files, whose content is in the fingerprint."""
        found: dict[str, Any] = settings.model_dump(mode="json", exclude={"data", "splits"})
        lists = sorted(settings.splits.expanduser().glob("*_indices.json")) if settings.splits else []
        return found | {"splits": [file.read_text("utf-8") for file in lists], "tests": "one of a product"}

    @classmethod
    def official_turn(cls, action: str, observation: str, settings: Any) -> tuple[str, str]:
        """Both as they are.

        Raises:
            ValueError: the action is neither a search nor a click.
        """
        if not _COMMAND.fullmatch(action):
            raise ValueError(f"webshop knows no action {action!r} (wanted: search[words] or click[text])")
        return action, observation

    @classmethod
    def official_id(cls, item: dict[str, Any], settings: Any) -> str:
        """The goal that a published trajectory's instruction is of; its price ceiling is drawn anew in each process.

        Raises:
            ValueError: no goal of the catalogue has this instruction, or several have.
        """
        from envs.webshop.shop import open_shop
        from envs.webshop.tasks import content_id

        task = str(item["conversations"][2]["value"])
        wanted = task.partition("Instruction: [SEP] ")[2].removesuffix(" [SEP] Search")
        goals = open_shop(settings).goals
        found = _numbers_by_wish(settings.model_dump_json()).get(CEILING.sub("", wanted), [])
        session = re.search(r"\d+$", str(item.get("id")))
        if session and int(session[0]) in found:
            found = [int(session[0])]
        if len(found) != 1:
            raise ValueError(
                f"item {item.get('id')!r}: {len(found)} goals of this catalogue have its instruction {wanted!r}; "
                "env.webshop.data has to be the catalogue that it was recorded on."
            )
        return content_id(found[0], goals[found[0]])

    @classmethod
    def official_task(cls, text: str) -> str:
        """The page with the search box, as it is."""
        return text

    def close(self) -> None:
        """Let go of the site; may be called twice."""
        self._over = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.close()
        return False

    def _info(self, *, valid: bool) -> Info:
        return Info(reward=self._reward, success=self._reward >= 1, valid=valid)

    def _number(self, task: str) -> int:
        """The goal's number of a content id."""
        from envs.webshop.tasks import content_id

        match = re.fullmatch(rf"{self.name}:goal-(\d+)-[0-9a-f]{{8}}", task)
        number = int(match[1]) if match else -1
        if not 0 <= number < len(self._shop.goals) or content_id(number, self._shop.goals[number]) != task:
            raise ValueError(
                f"No such WebShop task: {task!r} (wanted: {self.name}:goal-NUMBER-HASH, of this catalogue and draw)."
            )
        return number
