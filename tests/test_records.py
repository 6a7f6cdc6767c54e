import errno
import json

import pytest

from pipeline.records import (
    EpisodeStatus,
    JsonlAppender,
    Pair,
    Trajectory,
    Turn,
    atomic_write,
    dump_line,
    read_jsonl,
    recover_jsonl,
    write_jsonl,
)


def trajectory(**changes):
    fields = {
        "id": "sciworld:boil:3", "env": "sciworld", "split": "train", "policy": "sft", "seed": 0, "prompt_length": 1,
        "reward": 0.5,
        "messages": [{"role": "user", "content": "Boil “water”\n"}, {"role": "assistant", "content": "Action: wait"}],
        "turns": [Turn(text="Action: wait", action="wait", observation="ok", reward=0.5, valid=True, token_ids=[4, 1])],
        "success": False, "status": EpisodeStatus.MAX_STEPS,
    }  # fmt: skip
    return Trajectory(**(fields | changes))


def test_a_record_reads_back_as_it_was_written(tmp_path):
    written = [trajectory(), trajectory(id="sciworld:melt:0", status=EpisodeStatus.CONTEXT_FULL)]
    write_jsonl(tmp_path / "episodes.jsonl", written)
    assert read_jsonl(tmp_path / "episodes.jsonl", Trajectory) == written


def test_a_trajectory_knows_its_prompt_and_completion():
    one = trajectory()
    assert [message["role"] for message in one.prompt] == ["user"]
    assert one.completion == [{"role": "assistant", "content": "Action: wait"}]


def test_a_half_written_last_line_is_dropped_and_counted(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text(dump_line(trajectory()) + dump_line(trajectory())[:40])
    records, dropped = recover_jsonl(path, Trajectory)
    assert (len(records), dropped) == (1, 1)


@pytest.mark.parametrize("lost", [1, 40])
def test_a_finished_file_that_was_cut_short_is_an_error_with_its_place(tmp_path, lost):
    path = tmp_path / "episodes.jsonl"
    path.write_text((dump_line(trajectory()) + dump_line(trajectory()))[:-lost])
    with pytest.raises(ValueError, match=r"episodes.jsonl, line 2: the last line has no end"):
        read_jsonl(path, Trajectory)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken\n", "line 2: not a Trajectory"),
        (json.dumps({"id": "x"}) + "\n", r"line 2: not a Trajectory \(field env\)"),
        (dump_line(trajectory()).replace('"max_steps"', '"bored"'), r"line 2: not a Trajectory \(field status\)"),
        (dump_line(trajectory()).replace('"note"', '"notes"'), r"line 2: not a Trajectory \(field notes\)"),
    ],
)
def test_a_bad_line_elsewhere_is_an_error_with_its_place(tmp_path, line, complaint):
    path = tmp_path / "episodes.jsonl"
    path.write_text(dump_line(trajectory()) + line + dump_line(trajectory()))
    with pytest.raises(ValueError, match=complaint) as error:
        read_jsonl(path, Trajectory)
    assert str(path) in str(error.value)


def test_appending_after_a_kill_begins_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text(dump_line(trajectory()) + '{"id": "half')
    with JsonlAppender(path) as appender:
        appender.append(trajectory(seed=7))
    assert [record.seed for record in read_jsonl(path, Trajectory)] == [0, 7]


def test_a_full_disk_leaves_no_file_under_the_final_name(tmp_path):
    def records():
        yield trajectory()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_jsonl(tmp_path / "pairs.jsonl", records())
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_device_is_an_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("old\n")
    (tmp_path / ".pairs.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write("new\n" * 10_000)
    assert path.read_text() == "old\n"
    assert [child.name for child in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_record_that_does_not_fit_on_the_disk_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "episodes.jsonl"
    with JsonlAppender(path) as appender:
        appender.append(trajectory())
        real = appender._file

        class FullDisk:
            name = real.name

            def write(self, data):
                real.write(data[:10])
                raise OSError(errno.ENOSPC, "No space left on device")

            def __getattr__(self, attribute):
                return getattr(real, attribute)

        monkeypatch.setattr(appender, "_file", FullDisk())
        with pytest.raises(OSError, match="No space left"):
            appender.append(trajectory(seed=1))
    assert len(read_jsonl(path, Trajectory)) == 1
    assert path.read_bytes().endswith(b"\n")


def test_pairs_are_conversational_preference_data(tmp_path):
    """TRL's conversational preference format: lists of role/content messages under prompt, chosen and rejected."""
    one = trajectory()
    record = Pair(
        id=one.id, prompt=one.prompt, chosen=one.completion, rejected=one.completion, chosen_reward=1.0,
        rejected_reward=0.5, chosen_status=one.status, rejected_status=one.status, chosen_turns=1, rejected_turns=1,
        chosen_source="expert/seed0/0", rejected_source="sft/seed0/0",
    )  # fmt: skip
    line = json.loads(dump_line(record))
    for column in ("prompt", "chosen", "rejected"):
        assert all(set(message) == {"role", "content"} for message in line[column])
