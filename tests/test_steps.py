from pipeline import steps
from pipeline.config import StepConfig
from pipeline.react import assistant, observation
from pipeline.records import EpisodeStatus, Turn
from tests.test_records import trajectory

PROMPT = [{"role": "user", "content": "instruction"}, assistant("OK"), {"role": "user", "content": "task"}]


def played(actions, reward, *, begun_with=0, sample=0, **changes):
    """An episode of these actions; what the policy said has ids, what it began with has none."""
    turns = [
        Turn(
            text=f"Action: {action}",
            action=action,
            observation=f"{action} done",
            reward=0.0,
            valid=True,
            token_ids=[] if number < begun_with else [number, 1],
        )
        for number, action in enumerate(actions)
    ]
    messages = [message for turn in turns for message in (assistant(turn.text), observation(turn.observation))]
    return trajectory(
        turns=turns,
        messages=[*PROMPT, *messages[:-1]],
        prompt_length=3,
        reward=reward,
        begun_with=begun_with,
        sample=sample,
        **({"status": EpisodeStatus.COMPLETED} | changes),
    )


EXPERT = played("abc", 1.0, policy="expert", begun_with=3)


def test_a_step_is_worth_the_mean_of_what_follows_it():
    explored = [
        played("ax", 0.0, sample=0),
        played("yz", 0.2, sample=1),
        played("yw", 0.0, sample=2),
        played("abq", 0.4, begun_with=1, sample=3),
        played("abc", 0.8, begun_with=1, sample=4),
        played("abd", 0.5, begun_with=2, sample=5),
        played("abe", 0.7, begun_with=2, sample=6),
    ]
    (first, last), dropped = steps.build([EXPERT], explored, StepConfig(min_gap=0.1))
    # `a` is worth (0.4 + 0.8) / 2, `y` (0.2 + 0.0) / 2; the worse of the two rollouts of `y` loses.
    assert (round(first.chosen_reward, 6), first.rejected_reward) == (0.6, 0.1)
    assert [message["content"] for message in first.rejected[::2]] == ["Action: y", "Action: w"]
    assert first.rejected_token_ids == [[0, 1], [1, 1]]
    assert first.prompt == PROMPT
    # `c`, the last, is worth the expert's reward; what both share is the prompt's.
    assert (last.chosen_reward, last.rejected_reward) == (1.0, 0.5)
    assert last.prompt == EXPERT.messages[:7]
    assert last.prompt[-1]["role"] == "user"
    assert [message["content"] for message in last.chosen] == ["Action: c"]
    assert (last.chosen_turns, last.rejected_turns, last.rejected_token_ids) == (1, 1, [[2, 1]])
    assert (last.chosen_source, last.rejected_source) == ("expert/seed0/0+after2", "sft/seed0/5+after2")
    assert dropped == {"the policy takes the expert's step": 1}


def test_a_step_makes_no_pair_without_a_worse_one():
    explored = [
        played("xbc", 0.9, sample=0),
        played("abx", 1.0, begun_with=1, sample=1),
        played("abx", 0.2, begun_with=2, sample=2, status=EpisodeStatus.ENV_ERROR),
        played("ab", 0.2, begun_with=2, sample=3, status=EpisodeStatus.CONTEXT_FULL),
    ]
    pairs, dropped = steps.build([EXPERT], explored, StepConfig(min_gap=0.2))
    assert pairs == []
    assert dropped == {
        "the policy's step is worth as much": 1,
        "a step without rollouts": 2,
        "rollouts without a step of the policy's (env_error)": 1,
        "rollouts without a step of the policy's (context_full)": 1,
    }


def test_an_expert_whose_task_was_not_explored_has_no_steps():
    assert steps.build([EXPERT], [], StepConfig()) == ([], {})
