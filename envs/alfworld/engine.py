"""TextWorld's engine for ALFWorld games, made quick from outside: same transcripts, a fraction of the time.

Unmodified (textworld 1.7.0, fast-downward-textworld 20.6.4), loading a game parses its grammar with a parser
generator's parser and translates its PDDL four times until the first observation, and every step deep-copies the
grammar for each admissible command. `_accelerate` puts four things in place, none of which changes what is computed:

- `fast_downward.pddl2sas` answers from a store of translations on disk. Its second, "optimized" translation would feed
  a planner that nobody asks; that one loads nothing.
- `GameLogic` parses a grammar once for all games that differ in the sentence of their goal only.
- `textgen._parse_and_convert` and `Rule.parse_conjunctive_query` remember what they parsed.
- `textgen.deepcopy` copies symbols and contexts one level deep. What lies deeper is never written to, except a symbol's
  own context, which is set right before it is read.

textworld also keeps every proposition that it ever made, a megabyte a game (`mementos`, by equality, so that losing
them costs time alone); `Engine.load` forgets them.

`tests/test_alfworld_engine.py` compares observations and admissible commands with the unmodified engine's.

An engine holds its own copy of the planner's library, which never leaves the process again (`fast_downward.close_lib`
can crash it), so engines are handed on from one user to the next and not made anew. The copy's file is deleted but held
as long: 34 MB of disk, or of memory where /tmp is in memory, of which 33 are for debuggers. Engines copy the rest.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import random
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fast_downward
import mementos.core
import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from fast_downward import interface as downward
from fast_downward.translate import pddl
from textworld.envs.pddl import logic as pddl_logic
from textworld.envs.pddl import pddl as pddl_env
from textworld.envs.pddl import textgen

from envs.alfworld.games import write

WELCOME = "-= Welcome to TextWorld, ALFRED! =-\n\n"
"""How the engine opens every game."""

NOTHING_HAPPENS = "Nothing happens."
"""The engine's answer to a command that is not admissible."""

_GOAL = re.compile(r'(?<="Your task is to: )[^"\\#{}\[\]|]*(?=\.")')
_translate = fast_downward.pddl2sas
_GameLogic = pddl_logic.GameLogic
_parse_symbols = textgen._parse_and_convert


@dataclasses.dataclass(frozen=True, slots=True)
class Translation:
    """A PDDL problem as the engine reads it: everything that it takes from `fast_downward.pddl2sas`."""

    sas: str
    """The planning task in Fast Downward's own format."""
    types: list[tuple[str, list[str]]]
    """Types of the domain with their supertypes."""
    objects: list[tuple[str, str]]
    """Objects of the problem with their types."""
    actions: list[tuple[str, list[tuple[str, str]]]]
    """Actions of the domain with the names and types of their parameters."""
    facts: list[list[str]]
    """What holds at the start: predicate and arguments."""

    @classmethod
    def of(cls, domain: str, problem: str) -> "Translation":
        """Translate, which takes some 0.2 s.

        Raises:
            ValueError: the problem or the domain is no PDDL.
        """
        try:
            with _untouched():
                task, sas = _translate(domain, problem)
        except (Exception, SystemExit) as error:  # its parser gives up in many ways, one of them sys.exit
            raise ValueError(f"the game's PDDL cannot be read ({type(error).__name__}: {error})") from None
        return cls(
            sas=sas,
            types=[(one.name, list(one.supertype_names)) for one in task.types],
            objects=[(one.name, one.type_name) for one in task.objects],
            actions=[(one.name, [(p.name, p.type_name) for p in one.parameters]) for one in task.actions],
            facts=[[one.predicate, *one.args] for one in task.init if isinstance(one, pddl.Atom)],
        )

    def task(self) -> SimpleNamespace:
        """The parts of the translator's task that `PddlState` reads."""
        return SimpleNamespace(
            types=[SimpleNamespace(name=name, supertype_names=above) for name, above in self.types],
            objects=[SimpleNamespace(name=name, type_name=kind) for name, kind in self.objects],
            actions=[
                SimpleNamespace(
                    name=name, parameters=[SimpleNamespace(name=one, type_name=kind) for one, kind in parameters]
                )
                for name, parameters in self.actions
            ],
            init=[pddl.Atom(predicate, args) for predicate, *args in self.facts],
        )


class Translations:
    """Translations on disk, by content. Several processes may use one folder at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._version = importlib.metadata.version("fast-downward-textworld")

    def get(self, domain: str, problem: str) -> Translation:
        """The translation of a problem, made and kept if there is none yet."""
        digest = hashlib.sha256("\0".join((self._version, domain, problem)).encode()).hexdigest()
        path = self._folder / digest[:2] / f"{digest[2:40]}.json.z"
        with contextlib.suppress(OSError, zlib.error, ValueError, TypeError):  # not there, or not whole: made again
            return Translation(**json.loads(zlib.decompress(path.read_bytes())))
        made = Translation.of(domain, problem)
        write(path, zlib.compress(json.dumps(dataclasses.asdict(made)).encode(), 1))
        return made


class Engine:
    """One TextWorld environment that plays one ALFWorld game after the other. Not for several threads."""

    _idle: ClassVar[list["Engine"]] = []
    """Engines that nobody uses now."""

    def __init__(self) -> None:
        _accelerate()
        self._requests = textworld.EnvInfos(won=True, admissible_commands=True)
        with _untouched(), _short_library():
            env = pddl_env.PddlEnv(self._requests)
            env.downward_lib.load_sas_replan = lambda sas: None
            self._env = AlfredDemangler(env)
        self.state: Mapping[str, Any] = {}
        """TextWorld's game state after the last reset or step."""
        self._broken = False

    @classmethod
    def acquire(cls) -> "Engine":
        """An engine of one's own until it is given back by `release`."""
        return cls._idle.pop() if cls._idle else cls()

    def release(self) -> None:
        """Hand the engine on, unless it broke."""
        self.state = {}
        if not self._broken:
            self._idle.append(self)

    def load(self, game: Mapping[str, Any], translations: Translations) -> None:
        """Make `game`, the contents of a `game.tw-pddl`, the one that is played.

        Raises:
            ValueError: its PDDL or its grammar cannot be read.
        """
        mementos.core._memento_cache.clear()
        with self._reading("the game's grammar cannot be read"), _translating(translations):
            self._env.load(game)
        self._translations = translations

    def reset(self, *, facts: bool = False) -> str:
        """Begin the game anew; with `facts`, states also hold all that is true, for experts that read it.

        Raises:
            ValueError: its PDDL and its grammar do not go together.
        """
        self._requests.facts = facts
        with self._reading("the game cannot be begun"), _translating(self._translations):
            self.state = self._env.reset()
        return str(self.state["feedback"])

    def step(self, command: str) -> str:
        """Take a command; returns what the engine says to it."""
        self._broken = True  # until it has answered
        with _untouched():
            self.state, _, _ = self._env.step(command)
        self._broken = False
        return str(self.state["feedback"])

    @contextlib.contextmanager
    def _reading(self, complaint: str) -> Iterator[None]:
        """While the library reads what a game's file says, of which it takes offence in many ways."""
        self._broken = True
        with _untouched():
            try:
                yield
            except OSError:
                raise  # the machine's
            except ValueError as error:
                raise ValueError(complaint if isinstance(error, json.JSONDecodeError) else str(error)) from None
            except Exception as error:
                raise ValueError(f"{complaint} ({type(error).__name__}: {error})") from None
        self._broken = False

    @property
    def won(self) -> bool:
        """Whether the goal is reached now."""
        return bool(self.state["won"])

    @property
    def admissible(self) -> list[str]:
        """The commands that the engine understands now, sorted."""
        return [str(command) for command in self.state["admissible_commands"]]

    def facts(self) -> list[tuple[str, ...]]:
        """What is true now: predicate, then the names of the things it is true of, such as `apple 1`."""
        names = {key: info.name.strip() for key, info in self.state["_entity_infos"].items()}
        return [(fact.name, *(names[one.name] for one in fact.arguments)) for fact in self.state["_facts"]]


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    """Keep the process's arguments, output and random numbers from the libraries, which write to all three."""
    arguments, output, drawn = sys.argv, sys.stdout, random.getstate()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv, sys.stdout = arguments, output
        random.setstate(drawn)


@contextlib.contextmanager
def _short_library() -> Iterator[None]:
    """Have `fast_downward.load_lib` copy no more of the planner's library than a process loads."""
    whole = downward.DOWNWARD_LIB_PATH
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(loaded_part(Path(whole)))
        file.flush()
        downward.DOWNWARD_LIB_PATH = file.name
        try:
            yield
        finally:
            downward.DOWNWARD_LIB_PATH = whole


@functools.cache
def loaded_part(library: Path) -> bytes:
    """An ELF file up to the end of its last loaded segment; what comes after, linkers and debuggers read.

    A file of another kind is left whole. The layout is that of elf(5): `e_phoff` at byte 32, `e_phentsize` and
    `e_phnum` at 54; of a program header `p_type` (1: loaded) at 0, `p_offset` at 8, `p_filesz` at 32.
    """
    content = library.read_bytes()
    if content[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return content
    (table,), (size, number) = struct.unpack_from("<Q", content, 32), struct.unpack_from("<HH", content, 54)
    ends = [0]
    for place in range(table, table + size * number, size):
        kind, start, length = struct.unpack_from("<I4xQ16xQ", content, place)
        ends.append(start + length if kind == 1 else 0)
    return content[: max(ends)]


_current: Translations | None = None


@contextlib.contextmanager
def _translating(translations: Translations) -> Iterator[None]:
    """Where `fast_downward.pddl2sas` looks while the block runs."""
    global _current
    _current = translations
    try:
        yield
    finally:
        _current = None


@functools.cache
def _accelerate() -> None:
    """Put the quick parts in place; see the module's docstring."""
    if sys.version_info >= (3, 13):
        raise ValueError(
            "ALFWorld's engine (textworld 1.7.0) cannot run on Python 3.13: its grammar evaluates expressions over "
            "names put into locals(), which PEP 667 ended (textworld/envs/pddl/textgen, EvalSymbol.derive). "
            "Use Python 3.11 or 3.12."
        )
    fast_downward.pddl2sas = _pddl2sas
    pddl_logic.GameLogic = _logic
    textgen._parse_and_convert = _symbols
    textgen.deepcopy = _copied
    textgen.Rule.parse_conjunctive_query = functools.cache(textgen.Rule.parse_conjunctive_query)


@functools.lru_cache(maxsize=1)
def _translation(translations: Translations, domain: str, problem: str) -> Translation:
    return translations.get(domain, problem)


def _pddl2sas(domain: str, problem: str, verbose: bool = False, optimize: bool = False) -> tuple[Any, str]:
    if _current is None:
        answer: tuple[Any, str] = _translate(domain, problem, verbose=verbose, optimize=optimize)
        return answer
    translation = _translation(_current, domain, problem)
    return (None, "") if optimize else (translation.task(), translation.sas)


def _logic(domain: str, grammar: str) -> Any:
    goals = list(_GOAL.finditer(grammar))
    if len(goals) != 1:
        return _GameLogic(domain, grammar)
    start, end = goals[0].span()
    logic = copy.copy(_parsed_logic(domain, grammar[:start] + "UNKNOWN GOAL" + grammar[end:]))
    sentence = textgen.TerminalSymbol(f"Your task is to: {goals[0].group()}.")
    rules, logic.grammar = logic.grammar._rules, textgen.ContextSensitiveGrammar()
    logic.grammar._rules = {**rules, "task": [textgen.ProductionRule("task", [sentence])]}
    return logic


@functools.lru_cache(maxsize=8)
def _parsed_logic(domain: str, grammar: str) -> Any:
    return _GameLogic(domain, grammar)


def _symbols(text: str, rule_name: str, **options: Any) -> list[Any]:
    return [copy.copy(symbol) for symbol in _parsed_symbols(text, rule_name)]


@functools.lru_cache(maxsize=4096)
def _parsed_symbols(text: str, rule_name: str) -> list[Any]:
    symbols: list[Any] = _parse_symbols(text, rule_name=rule_name)
    return symbols


def _copied(value: Any) -> Any:
    return [copy.copy(one) for one in value] if isinstance(value, list) else copy.copy(value)
