"""`--dry-run`: what it prints, from configurations alone, of every recipe; and the paper's recipes, cell by cell."""

import operator
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from envs import alfworld, sciworld, webshop
from pipeline import arms, dry_run, memory, models, runs, speed
from pipeline.config import ModelConfig
from pipeline.examples import pair_examples
from pipeline.recipe import RECIPES, load
from pipeline.records import write_jsonl
from pipeline.rendering import Renderer
from pipeline.runs import write_json
from tests.test_examples import pairs_of, talk
from tests.tiny_policy import save_tiny_policy

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "tests" / "fixtures" / "model_configs"
ALL = {str(path.relative_to(RECIPES).with_suffix("")): path for path in sorted(RECIPES.rglob("*.yaml"))}
OF_THE_HUB = {name: path for name, path in ALL.items() if load(name).model.path}
MADE_NEW = [name for name in ALL if name not in OF_THE_HUB]


def local(recipe: str, *overrides: str):
    """A recipe with its model's configuration from the fixtures."""
    return load(recipe, [f"model.path={CONFIGS / recipe.removesuffix('-lora').removesuffix('-qlora')}", *overrides])


def row(told: str, first: str) -> list[str]:
    """The cells of the table row that begins so."""
    line = next(line for line in told.splitlines() if line.split("│")[0].strip() == first)
    return [cell.strip() for cell in line.split("│")]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OF_THE_HUB)
def test_every_recipe_of_the_hub_says_what_its_dry_run_says(recipe, capsys, tmp_path, monkeypatch):
    config = local(recipe)
    assert config.env.names == ["sciworld", "alfworld", "webshop"]
    monkeypatch.chdir(tmp_path)
    dry_run.main(config, 8, "h100")
    told = capsys.readouterr().out
    comment = "".join(line for line in OF_THE_HUB[recipe].read_text().splitlines() if line.startswith("#"))
    hours = ", ".join(f"{env} {float(row(told, env)[-1]):.1f} h" for env in config.env.names)
    assert hours in comment
    used = [line.split("│") for line in told.splitlines() if line.strip().startswith("train ")]
    lying = used[0] if config.model.lora_rank else used[1]  # LoRA by DDP, all weights by FSDP
    assert f"{float(lying[-2]):.0f} GB" in comment
    assert lying[-1].strip() == "fits"
    assert float(lying[-2]) < dry_run.USABLE * float(re.search(r"For 8 GPUs of (\d+) GB", comment)[1])
    assert not list(tmp_path.iterdir())


def test_qlora_on_the_gpus_that_its_recipe_names_replies_to_two_at_a_time():
    config = local("llama2-7b-qlora")
    sizes = models.read_sizes(config.model.path, config.model)
    served = memory.count(memory.build(sizes, ModelConfig()))
    told = dry_run._serving(config, sizes, served, speed.GPUS["4090"])
    assert speed.GPUS["4090"].memory == 24e9
    assert "it does NOT fit" not in told
    assert told.endswith("2 are played.")


@pytest.mark.parametrize("recipe", MADE_NEW)
def test_every_recipe_of_a_new_model_fits_one_small_gpu(recipe, capsys, tmp_path, monkeypatch):
    config = load(recipe)
    monkeypatch.chdir(tmp_path)
    dry_run.main(config, 1, "4090")
    told = capsys.readouterr().out
    assert "a new model: " in told
    assert "NOT fit" not in told
    for env in config.env.names:
        tasks, pairs, *_, hours = row(told, env)[1:]
        assert int(pairs.replace(",", "")) > 0
        assert 0 < int(tasks.replace(",", "")) <= dry_run.EXPECTED[env].tasks[0]
        assert float(hours) < 1
    trained, played = len(arms.trained(config)), len(arms.of(config))
    assert f"{len(config.seed)} seed(s), {trained} trained and {played} evaluated policies" in told
    assert not list(tmp_path.iterdir())


PAPER = [
    # arXiv 2406.14868: batch sizes, warm-up and cosine of SFT, AdamW, one worked example, all weights trained
    ("sft.batch_size", 64),
    ("sft.warmup", 0.03),
    ("sft.schedule", "cosine"),
    ("train.batch_size", 32),
    ("env.example", True),
    ("model.lora_rank", 0),
    ("model.load_in_4bit", False),
    ("method", ["dmpo"]),
    ("pairs.contest", "expert"),
    ("env.names", ["sciworld", "alfworld", "webshop"]),
    ("evaluate.splits", ["seen", "unseen"]),
    ("evaluate.tasks", None),
    # swt-user/DMPO at 64f4845, where the paper gives a range or nothing
    ("sft.learning_rate", 2e-5),
    ("sft.epochs", 3),
    ("sft.max_steps", None),
    ("sft.weight_decay", 0),
    ("train.learning_rate", 1e-6),
    ("train.beta", 0.1),
    ("train.gamma", 0.7),
    ("train.epochs", 3),
    ("train.max_steps", None),
    ("train.warmup", 0.1),
    ("train.schedule", "constant_with_warmup"),
    ("train.rounds", 1),
    ("train.nll", 0),
    ("train.label_smoothing", 0),
    ("model.max_length", 4096),
    ("rollout.temperature", 0),
    ("rollout.samples", 1),
    ("rollout.tasks", None),
    # the published data: ETO's experts and lists of tasks, the games and the catalogue that go with them
    ("experts.source", Path("data/{env}_sft.json")),
    ("env.sciworld.splits", Path("data/splits/sciworld")),
    ("env.alfworld.data", "data/alfworld-games-put"),
    ("env.webshop.data", Path("data/webshop-full")),
    ("env.webshop.splits", Path("data/splits/webshop")),
    ("env.webshop.profile", "official"),
]


@pytest.mark.parametrize(("key", "value"), PAPER, ids=[key for key, _ in PAPER])
@pytest.mark.parametrize("recipe", ["llama2-7b", "mistral-7b"])
def test_the_papers_settings(recipe, key, value):
    assert operator.attrgetter(key)(load(recipe)) == value


def test_the_papers_models_and_most_steps():
    assert load("llama2-7b").model.path == "meta-llama/Llama-2-7b-chat-hf"
    assert load("mistral-7b").model.path == "mistralai/Mistral-7B-Instruct-v0.2"
    assert alfworld.STEP_LIMITS[load("llama2-7b").env.alfworld.profile] == 40
    assert webshop.STEP_LIMIT == 10
    tasks = {10: 2, 12: 1, 15: 5, 20: 1, 30: 8, 60: 2, 80: 3, 100: 1, 120: 1}  # how many have that limit
    assert Counter(sciworld.STEP_LIMITS.values()) == tasks


def test_weights_that_lie_on_every_gpu_do_not_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dry_run.main(local("mistral-7b", "env=sciworld"), 8, "a100")
    told = capsys.readouterr().out
    assert "7,241,732,096 parameters" in told
    assert "does NOT fit" in next(line for line in told.splitlines() if "DDP" in line)
    assert "taken to be 4096 + 4096 tokens" in told


def test_the_reference_pass_is_told_of_the_batch_that_it_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = local("mistral-7b", "env=sciworld", "train.batch_size=4", "train.micro_batch_size=4")
    dry_run.main(config, 4, "h100")  # training has one pair of a batch on each GPU
    cells = row(capsys.readouterr().out, "reference")
    model = memory.build(models.read_sizes(CONFIGS / "mistral-7b", config.model), config.model)
    kept = memory.kept(model, [4096] * 2, rows=4, bf16=True, checkpointing=True)
    assert cells[1] == "4 x 4096 + 4096"
    assert float(cells[6]) == pytest.approx(memory.scoring(model, kept).passing / 1e9, abs=0.06)


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run folder with a tiny policy, its experts and pairs."""
    monkeypatch.chdir(tmp_path)
    config = load("tiny", ["env=sciworld", "run=here"])
    folder = runs.seed_folder(config, "sciworld", 0)
    save_tiny_policy(folder / "sft" / "policy")
    experts, pairs = [talk(2, id="a"), talk(4, id="b")], pairs_of(talk(5))
    write_jsonl(folder / "experts" / "episodes.jsonl", experts)
    write_jsonl(folder / "pairs" / "pairs.jsonl", pairs)
    for stage in ("experts", "pairs"):
        write_json(folder / stage / runs.MANIFEST, {"key": "x"})
    return config, folder, pairs


def test_lengths_are_those_of_the_runs_own_pairs(run_folder):
    config, folder, pairs = run_folder
    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(folder / "sft" / "policy"))
    _, examples, _ = pair_examples(renderer, pairs, config.model.max_length)
    found = dry_run.work(config, "sciworld")
    assert found.read == "pairs"
    assert found.longest_pair == (len(examples[0][0].ids), len(examples[0][1].ids))
    assert (found.experts, found.pairs, found.turns) == (2, 1, 3)
    (folder / "pairs" / runs.MANIFEST).unlink()  # half-made pairs count for nothing
    found = dry_run.work(config, "sciworld")
    assert (found.read, found.longest_pair, found.experts) == ("experts", (2048, 2048), 2)


def test_fewer_tasks_make_less_work():
    config = load("tiny", ["env.dev_tasks=8"])
    assert dry_run.tasks(config, "sciworld") == (400 - 8, 104, 104)
    assert dry_run.tasks(config, "alfworld") == (400 - 8, 100, 100)
    assert dry_run.tasks(load("tiny", ["env.dev_tasks=8", "evaluate.splits=dev"]), "sciworld") == (400 - 8, 8)
    assert dry_run.tasks(load("tiny", ["env.dev_tasks=8", "evaluate.splits=train"]), "sciworld") == (400 - 8, 400 - 8)
    assert dry_run.tasks(load("llama2-7b"), "alfworld") == (3321, 140, 134)
    assert dry_run.tasks(load("llama2-7b", ["evaluate.splits=seen"]), "webshop") == (1824, 200)


def test_speed_is_the_formula_by_hand():
    sizes = models.read_sizes(CONFIGS / "llama2-7b", ModelConfig())
    gpu = speed.GPUS["a100"]
    full = memory.count(memory.build(sizes, ModelConfig()))
    adapted = memory.count(memory.build(sizes, ModelConfig(lora_rank=8)))
    how = {"length": 1000, "trained_share": 0.25}
    attention, head = 3 * 2 * 1000 * 4096 * 32, 2 * 131_072_000 * 0.25
    by_hand = 2 * 312e12 * speed.MFU / (6 * full.used + attention + 4 * head)
    plain = speed.training_tokens_per_second(sizes, full, gpu, 2, checkpointing=False, **how)
    assert plain == pytest.approx(by_hand)
    lora = speed.training_tokens_per_second(sizes, adapted, gpu, 2, checkpointing=False, **how)
    assert lora == pytest.approx(2 * 312e12 * speed.MFU / (4 * adapted.used + attention + 3 * head))
    assert speed.training_tokens_per_second(sizes, full, gpu, 2, checkpointing=True, **how) < plain


def test_the_cache_has_room_for_what_the_weights_leave():
    sizes = models.read_sizes(CONFIGS / "llama3.1-8b", ModelConfig())
    assert speed.cache_bytes_per_token(sizes) == 2 * 32 * 8 * 128 * 2
    counts = memory.count(memory.build(sizes, ModelConfig()))
    room = (0.9 * 80e9 - speed.SERVING_GB * 1e9 - 2 * 8_030_261_248) / (4096 * 131_072)
    found = speed.concurrent_sequences(sizes, counts, speed.GPUS["h100"], 1, max_length=4096, share=0.9)
    assert found == pytest.approx(room)
    small = speed.concurrent_sequences(sizes, counts, speed.GPUS["4090"], 1, max_length=4096, share=0.5)
    assert small == 0


def test_a_models_head_width_is_its_own():
    sizes = models.read_sizes(CONFIGS / "qwen3-4b", ModelConfig())
    assert speed.cache_bytes_per_token(sizes) == 2 * 36 * 8 * 128 * 2


# ---- The command line ----


def cli(*arguments, **environment):
    command = [sys.executable, "-m", "pipeline", *arguments]
    offline = {"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=offline | environment, check=False)


def test_any_stage_takes_the_flag_and_keys_may_follow_it():
    tiny = cli(
        "sft", "tiny", "--dry-run", "--gpu", "4090", "env=webshop", DMPO_LAUNCH="accelerate launch --num_processes 4"
    )
    assert tiny.returncode == 0, tiny.stderr
    assert "a new model: " in tiny.stdout
    assert "4 x GeForce RTX 4090" in tiny.stdout
    assert "webshop" in tiny.stdout
    assert "alfworld" not in tiny.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint", "code"),
    [
        (["llama2-7b", "--dry-run"], "No model at meta-llama/Llama-2-7b-chat-hf: it is no folder here", 1),
        (["tiny", "--gpus", "2"], "--gpus and --gpu have no effect without --dry-run", 1),
        (["tiny", "--dry-run", "--gpus", "0"], "argument --gpus: invalid", 2),
        (["tiny", "--dry-run", "--gpu", "tpu"], "invalid choice: 'tpu'", 2),
        (["tiny", "--dryrun"], "unrecognized arguments: --dryrun", 2),
        (["tiny", "--dry-run", "sft.epoch=1"], "unknown key 'sft.epoch'", 1),
    ],
)
def test_mistakes_are_told(arguments, complaint, code):
    told = cli("train", *arguments)
    assert told.returncode == code
    assert complaint in told.stderr
    assert "Traceback" not in told.stderr


def test_processes_are_those_that_the_launch_command_starts(tmp_path):
    assert dry_run.launched("") is None
    assert dry_run.launched("torchrun --nproc-per-node=2") == 2
    path = tmp_path / "eight.yaml"
    path.write_text(yaml.safe_dump({"num_processes": 8}))
    assert dry_run.launched(f"accelerate launch --config_file {path}") == 8
    path.write_text("mixed_precision: bf16\n")
    with pytest.raises(ValueError, match=r"eight.yaml, which says no num_processes .*give --gpus"):
        dry_run.launched(f"accelerate launch --config_file {path}")


@pytest.mark.parametrize("node", [0, 1])
def test_the_command_for_two_nodes_is_one_that_the_launcher_takes(node, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch = re.search(r' LAUNCH="(accelerate launch .*?)"', (ROOT / "README.md").read_text(), re.DOTALL)[1]
    launch = launch.replace("\\\n", "") + f" --machine_rank {node}"
    assert dry_run.launched(launch) == 16
    command = [*shlex.split(launch)[2:], "-m", "pipeline", "sft", "llama2-7b"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.use_fsdp
    told = prepare_multi_gpu_env(arguments)
    assert told["FSDP_VERSION"] == "2"
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", node)
    assert (arguments.rdzv_endpoint, arguments.rdzv_conf) == ("NODE1:29500", "timeout=86400")


def test_the_script_passes_the_flag_on():
    script = (ROOT / "run_all.sh").read_text()
    assert re.search(r'= --dry-run \]; then exec python -m pipeline train "\$recipe" "\$@"', script)
