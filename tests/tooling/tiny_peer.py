"""An engine for tests of `make bench-peers`: it answers with sums of the prompt, and goes wrong where the job asks."""

import time

from tests.bench.peers.drivers.turn import Engine, Job, Tokens, take_turn


class TinyPeer(Engine):
    """New token n of a prompt is its sum and n; `kept` names the mistake that it makes, if any."""

    packages = ("pytest",)

    def __init__(self, job: Job) -> None:
        self._mistake = job.kept

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """A token short, or never, or not at all, if it is to go wrong so."""
        if self._mistake == "raises":
            raise ValueError("no such kernel")
        if self._mistake == "hangs":
            time.sleep(600)
        number = new_tokens - (self._mistake == "is short")
        return [[sum(prompt) + new for new in range(number)] for prompt in prompts]


if __name__ == "__main__":
    take_turn(TinyPeer)
