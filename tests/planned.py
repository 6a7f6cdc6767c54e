"""A player who does what it is told, for tests of what environments and workers do."""

from pipeline import react
from pipeline.play import Reply


class Planned:
    """Plays the actions that are planned for its task."""

    note = None

    def __init__(self, plans: dict[str, list[str]]) -> None:
        self._plans = plans

    async def prepare(self, episode, env):
        self.episode, self.played = episode, 0

    def begin(self, prompt):
        pass

    async def reply(self):
        self.played += 1
        return Reply(text=react.reply("", self._plans[self.episode.task][self.played - 1]))

    def observe(self, message):
        pass
