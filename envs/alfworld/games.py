"""ALFWorld's games: where they lie on disk, what is refused, and how our own are made.

A tree of games is laid out as the official ones are (`alfworld-download`: json_2.1.1, 2.1.2, 2.1.3):

    <root>/<train|valid_seen|valid_unseen>/<type>-<object>-<mrecep>-<receptacle>-<room>/<trial>/game.tw-pddl
                                                                                               /traj_data.json

An `Index` lists a tree's games. It is made once, by reading every game, and kept under `data/alfworld`; it is made
again when a file of the tree has changed.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tqdm import tqdm

from envs.processes import fresh_processes

if TYPE_CHECKING:
    from envs.alfworld.generator import Draft

STORE = Path("data") / "alfworld"
"""Everything that is made here: generated games, translations, indexes."""

FOLDERS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
"""The folder of each split."""

GAME, TRAJECTORY = "game.tw-pddl", "traj_data.json"

TaskType = Literal[
    "look_at_obj_in_light",
    "pick_and_place_simple",
    "pick_clean_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_two_obj_and_place",
]
TASK_TYPES: tuple[TaskType, ...] = get_args(TaskType)

TASK_PARAMS = ("object_target", "parent_target", "toggle_target", "mrecep_target", "object_sliced")
"""What `traj_data.json` says of a task."""

Dialect = Literal["move", "put"]
"""`move X to Y` (alfworld 0.4 and its games, json_2.1.2 on) or `put X in/on Y` (json_2.1.1, and so ETO's data)."""

_DIALECTS = {
    '"move {o} to {r}"': '"put {o} in/on {r}"',
    "You move the {o.name} to the {r.name}.": "You put the {o.name} in/on the {r.name}.",
    "You arrive at {r.name}.": "You arrive at {lend.name}.",
}
"""Where the grammar of alfworld 0.4 and that of json_2.1.1 differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What generated games are made by."""

    sizes: dict[str, int]
    """Number of games of each split."""
    task_types: Sequence[TaskType] = TASK_TYPES
    seed: int = 0
    """Another seed makes other games."""
    dialect: Dialect = "move"


@dataclass(frozen=True, slots=True)
class Index:
    """The games of a tree."""

    games: dict[str, list[str]]
    """For each split the folders of its games, relative to the split's folder, sorted."""
    dialect: Dialect
    digest: str
    """Hash of all games' contents."""
    skipped: dict[str, int]
    """What else lies in the tree, counted by the reason that it is not played."""
    stamps: dict[str, list[int]]
    """Size and time of change of every game's two files when they were read."""


def official_root(data: str) -> Path:
    """The tree that a user means by `data`: the folder itself, or the newest `json_2.1.*` in it.

    Args:
        data: a path; `~` and `$VARIABLES` are filled in. `official` is where `alfworld-download` puts its games.

    Raises:
        ValueError: there are no games; says how to get them.
    """
    named = (os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld") if data == "official" else data
    folder = Path(os.path.expandvars(named)).expanduser()
    for root in (folder, *sorted(folder.glob("json_2.1.*"), reverse=True)):
        if any((root / name).is_dir() for name in FOLDERS.values()):
            return root
    raise ValueError(_no_games(folder))


def _no_games(folder: Path) -> str:
    return (
        f"No ALFWorld games in {folder}: it needs folders {', '.join(FOLDERS.values())}. `python -m pipeline fetch "
        "alfworld-games` puts the official games into data/alfworld-games, `alfworld-download` into ~/.cache/alfworld "
        "or $ALFWORLD_DATA; with env.alfworld.data empty, games are generated here."
    )


def index_of(root: Path) -> Index:
    """The index of an official tree.

    Raises:
        ValueError: no games, a file that is no whole ALFWorld game, games of both dialects, or a room of the unseen
            split that the training games have, too.
    """
    kept = STORE / "indexes" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:24]}.json"
    stamps: dict[str, list[int]] = {}
    for file in sorted(root.glob(f"*/*/*/{GAME}")):
        stamp = stamps[str(file.relative_to(root))] = []
        for one in (file, file.parent / TRAJECTORY):
            with contextlib.suppress(FileNotFoundError):
                stamp += [(status := one.stat()).st_size, status.st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or not whole
        index = Index(**json.loads(kept.read_text("utf-8")))
        if index.stamps == stamps:
            return index
    index = _read_tree(root, stamps)
    write(kept, json.dumps(asdict(index)))
    return index


def _read_tree(root: Path, stamps: dict[str, list[int]]) -> Index:
    games: dict[str, list[str]] = {split: [] for split in FOLDERS}
    split_of = {folder: split for split, folder in FOLDERS.items()}
    skipped: Counter[str] = Counter()
    dialects: dict[Dialect, str] = {}
    digest = hashlib.sha256()
    for name in tqdm(stamps, desc="alfworld: reading the games", unit="game", disable=None):
        folder = Path(name).parent
        if (split := split_of.get(folder.parts[0])) is None:
            continue
        if reason := _unplayable(root / name):
            skipped[reason] += 1
            continue
        game = read_game(root / name)
        if game.get("solvable") is not True:
            skipped["not solvable" if "solvable" in game else "not checked for solvability"] += 1
            continue
        room_of(f"{root / folder}")
        games[split].append(str(folder.relative_to(folder.parts[0])))
        dialects.setdefault(dialect_of(game), name)
        whole = json.dumps([game, task_of(root / name)], sort_keys=True)
        digest.update(name.encode() + hashlib.sha256(whole.encode()).digest())
    if len(dialects) > 1:
        raise ValueError(f"{root}: games of two dialects, {' and '.join(map(str, dialects.values()))}; keep one.")
    if not dialects:
        raise ValueError(f"{_no_games(root)} Not played: {dict(skipped)}.")
    check_rooms(games)
    return Index(
        games=games, dialect=next(iter(dialects)), digest=digest.hexdigest()[:16], skipped=dict(skipped), stamps=stamps
    )


def _unplayable(file: Path) -> str | None:
    """Why the official loader passes a game over, if it does (alfworld/agents/environment/alfred_tw_env.py)."""
    if "movable" in str(file.parent) or "Sliced" in str(file.parent):
        return "movable receptacles or sliced objects"
    return None if (file.parent / TRAJECTORY).is_file() else f"no {TRAJECTORY}"


def read_game(file: Path) -> dict[str, Any]:
    """The contents of a `game.tw-pddl`.

    Raises:
        ValueError: the file is cut short, no JSON, or a game of another domain.
    """
    try:
        game = json.loads(file.read_text("utf-8"))
        domain, problem, grammar = (game[key] for key in ("pddl_domain", "pddl_problem", "grammar"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{file}: no whole ALFWorld game ({type(error).__name__}); fetch it again, or delete its folder."
        ) from None
    for text in (domain, problem):
        if not (name := re.search(r"\(\s*:?domain\s+([\w-]+)", str(text))) or name[1] != "alfred":
            raise ValueError(f"{file}: a game of the PDDL domain {name[1] if name else '?'!r}, not of alfred.")
    if not isinstance(grammar, str):
        raise ValueError(f"{file}: its grammar is no text.")
    whole: dict[str, Any] = game
    return whole


def task_of(file: Path) -> tuple[str, dict[str, Any]]:
    """Type and parameters of a game's task, from the `traj_data.json` beside it.

    Raises:
        ValueError: the file is cut short or lacks them.
    """
    beside = file.parent / TRAJECTORY
    try:
        data = json.loads(beside.read_text("utf-8"))
        params = dict(data["pddl_params"])
        return data["task_type"], {key: params[key] for key in TASK_PARAMS}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{beside}: not whole ({type(error).__name__}); fetch it again, or delete its folder."
        ) from None


def dialect_of(game: Mapping[str, Any]) -> Dialect:
    """How a game wants things put down, from its own grammar."""
    return "put" if '"put {o} in/on {r}"' in game["grammar"] else "move"


def room_of(game: str) -> int:
    """The number of the floor plan, from a game's folder (`pick_and_place_simple-Mug-None-Shelf-5/trial_1`).

    Raises:
        ValueError: the folder's name has none.
    """
    match = re.search(r"-(\d+)/[^/]+$", game)
    if not match:
        raise ValueError(f"{game}: its task's folder does not end with a room's number, as ALFRED's do.")
    return int(match[1])


def check_rooms(games: Mapping[str, list[str]]) -> None:
    """Refuse an unseen split that shares a room with the training games.

    Raises:
        ValueError: names the rooms.
    """
    shared = {room_of(game) for game in games["train"]} & {room_of(game) for game in games["unseen"]}
    if shared:
        raise ValueError(f"ALFWorld's unseen games share rooms with its training games: {sorted(shared)}.")


@cache
def packaged(name: str) -> str:
    """A text file of the alfworld package's data folder, read without importing the package.

    The import writes to the environment and makes a folder in the user's home (alfworld/info.py).
    """
    spec = find_spec("alfworld")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "data", name).read_text("utf-8")


@lru_cache(maxsize=2)
def grammar_of(dialect: Dialect) -> str:
    """The package's grammar in a dialect; `UNKNOWN GOAL` stands where the goal's sentence goes."""
    text = packaged("alfred.twl2")
    for new, old in _DIALECTS.items() if dialect == "put" else ():
        assert new in text, f"the installed alfworld's grammar has no {new!r}"
        text = text.replace(new, old)
    return text


def game_of(draft: "Draft", dialect: Dialect, walkthrough: list[str]) -> dict[str, Any]:
    """The contents of the `game.tw-pddl` of a generated game."""
    return {
        "pddl_domain": packaged("alfred.pddl"),
        "grammar": grammar_of(dialect).replace("UNKNOWN GOAL", draft.goal),
        "pddl_problem": draft.problem,
        "solvable": True,
        "walkthrough": walkthrough,
    }


def folder_of(draft: "Draft") -> Path:
    """The folder of a generated game, relative to its split's; the trial's name is a hash of the game's content."""
    params = draft.params
    what = [draft.task_type, params["object_target"], params["mrecep_target"] or "None"]
    what += [params["parent_target"] or params["toggle_target"], str(draft.scene)]
    return Path("-".join(map(str, what)), f"trial_G{draft.digest[:16]}")


def trajectory_of(draft: "Draft") -> dict[str, Any]:
    """The contents of the `traj_data.json` of a generated game: what ALFWorld's text mode reads of it."""
    return {
        "task_id": folder_of(draft).name,
        "task_type": draft.task_type,
        "pddl_params": draft.params,
        "scene": {"floor_plan": f"FloorPlan{draft.scene}", "scene_num": draft.scene},
        "turk_annotations": {"anns": [{"task_desc": f"{draft.goal}.", "high_descs": []}]},
        "plan": {"high_pddl": [], "low_actions": []},
    }


def generated_root(recipe: Recipe) -> Path:
    """Where the games of a recipe lie, whether they are there or not, among others of its seed and dialect."""
    key = json.dumps([recipe.seed, recipe.dialect, _generator()])
    return STORE / "generated" / hashlib.sha256(key.encode()).hexdigest()[:12]


def generated_list(recipe: Recipe) -> Path:
    """The index of a recipe's games, whether it is there or not."""
    key = json.dumps([recipe.sizes, sorted(recipe.task_types)], sort_keys=True)
    return generated_root(recipe) / f"index-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


@cache
def _generator() -> str:
    """What generated games depend on besides their settings: this package's code for it, and the wheel's files."""
    from envs.alfworld import generator

    code = Path(generator.__file__).read_bytes()
    return hashlib.sha256(code).hexdigest()[:16] + importlib.metadata.version("alfworld")


def generated_index(recipe: Recipe, processes: int = 1) -> tuple[Path, Index]:
    """The games of a recipe, made if they are not there yet.

    Every game is won once by a privileged plan on the real engine, whose commands it keeps as its walkthrough; one that
    cannot be won is left out and counted. What a killed process had finished is kept. So many `processes` check games
    side by side.
    """
    root = generated_root(recipe)
    with _locked(root):
        with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or not whole
            return root, Index(**json.loads(generated_list(recipe).read_text("utf-8")))
        index = _generate(root, recipe, processes)
        write(generated_list(recipe), json.dumps(asdict(index)))
    return root, index


def _generate(root: Path, recipe: Recipe, processes: int) -> Index:
    from envs.alfworld.generator import generate

    drafts = [
        (split, draft)
        for split, size in recipe.sizes.items()
        for draft in generate(split, size, recipe.seed, recipe.task_types)
    ]
    waiting = [(root / FOLDERS[split] / folder_of(draft), draft, recipe.dialect) for split, draft in drafts]
    waiting = [one for one in waiting if not (one[0] / GAME).is_file()]
    bar = tqdm(total=len(waiting), desc="alfworld: checking new games", unit="game", disable=None)
    skipped: Counter[str] = Counter()
    with fresh_processes(processes) if processes > 1 else contextlib.nullcontext() as pool:
        for reason in (pool.map if pool else map)(_ship, waiting, **({"chunksize": 4} if pool else {})):
            bar.update()
            skipped[reason] += bool(reason)
    bar.close()
    games: dict[str, list[str]] = {split: [] for split in recipe.sizes}
    digest = hashlib.sha256()
    for split, draft in drafts:
        folder = folder_of(draft)
        if (root / FOLDERS[split] / folder / GAME).is_file():
            games[split].append(str(folder))
            digest.update(str(folder).encode())
    check_rooms(games)
    return Index(games=games, dialect=recipe.dialect, digest=digest.hexdigest()[:16], skipped=dict(+skipped), stamps={})


def _ship(job: tuple[Path, "Draft", Dialect]) -> str:
    """Win a game and write it; returns why it was left out, or an empty string."""
    from envs.alfworld.expert import UnwinnableError, win

    folder, draft, dialect = job
    game = game_of(draft, dialect, [])
    try:
        walkthrough = win(game, draft.task_type, draft.params)
    except UnwinnableError as error:
        return str(error)
    write(folder / TRAJECTORY, json.dumps(trajectory_of(draft), indent=1))
    write(folder / GAME, json.dumps(game_of(draft, dialect, walkthrough)))
    return ""


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one process at a time make the games of a folder; the others wait for it."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
