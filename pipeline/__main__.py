"""`python -m pipeline STAGE RECIPE [key=value ...]`: one stage, or one of the tools."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from pipeline import dry_run, recipe, runs
from pipeline.config import Config, describe

STAGES = {
    "experts": "expert trajectories, from the environment itself or from a file",
    "sft": "supervised fine-tuning on them: policy 0",
    "rollout": "policy 0 explores the training tasks and is evaluated",
    "pairs": "win/lose pairs of expert and policy 0",
    "reference": "per-turn log-probs of the pairs under policy 0",
    "train": "preference fine-tuning, one policy a method",
    "evaluate": "every policy, the experts and random play on seen and unseen tasks, or dev",
    "report": "tables, curves and a trajectory viewer in one page",
}
TOOLS = {
    "compare": "two runs, paired over the same tasks and seeds",
    "doctor": "what works on this machine, and what mends the rest",
    "fetch": "official data from where they are published, checked; without a name, what there is",
    "inspect": "a trajectory or pair with its tokens coloured by turn",
    "replay": "recorded episodes through their environment again, comparing",
    "rounds": "how often a recipe explores, pairs and trains",
    "splits": "how many tasks each split has, and how many any two of them share",
    "tables": "the episodes of several runs in one set of tables, as of seeds run on several machines",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 0 only when its output is complete."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    try:
        module = importlib.import_module(f"pipeline.{options.command}")
        if options.command in TOOLS:
            return int(module.main(options) or 0)
        config = recipe.load(options.recipe, options.overrides)
        if options.dry_run:
            dry_run.main(config, options.gpus, options.gpu)
            return 0
        if options.gpus or options.gpu:
            raise ValueError("--gpus and --gpu have no effect without --dry-run; DMPO_LAUNCH says what a run uses.")
        with runs.locked(config):
            module.main(config)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; run the same command again to go on from here.\n")
        return 130
    except Exception as error:
        if options.debug:
            raise
        sys.stderr.write(f"error: {_sentence(error)}\n")
        return 1
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; keys may stand behind flags, too, which argparse by itself takes for unknown ones."""
    parser = _parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    if unknown := [one for one in rest if one.startswith("-") or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The command line; what a tool takes is loaded only when it is called."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="STAGE", required=True)
    for name, text in {**STAGES, **TOOLS}.items():
        command = commands.add_parser(
            name, help=text, description=f"{name}: {text}.", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name not in arguments:
            continue
        if name in TOOLS:
            importlib.import_module(f"pipeline.{name}").add_arguments(command)
        else:
            command.epilog = _keys(name)
            command.add_argument("recipe", help="a name in pipeline/recipes, or a YAML file")
            command.add_argument("overrides", nargs="*", metavar="key=value", help="keys that differ from the recipe")
            dry_run.add_arguments(command)
    return parser


def _keys(stage: str) -> str:
    """Every key of a recipe with its meaning and default, the stage's own section first."""
    rows = sorted(describe(Config), key=lambda row: not row[0].startswith(stage + "."))
    return "keys (key = default: meaning)\n" + "\n".join(
        f"  {name} = {default or 'null'}\n      {meaning}" for name, default, meaning in rows
    )


def _sentence(error: Exception) -> str:
    """An error on one line; one that nobody meant to be read says where to look."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text} (run again with --debug to see where)"


if __name__ == "__main__":
    sys.exit(main())
