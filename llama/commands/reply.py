"""A reply as it comes: shown, timed and kept."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field

from llama.completion import Completion, Delta
from llama.engine.request import SamplingParams
from llama.terminal import note, write_reply


@dataclass
class Reply:
    """All deltas of one request, sample by sample, and when they came, in seconds of `time.perf_counter`."""

    num_prompt_tokens: int
    params: SamplingParams
    samples: list[list[Delta]] = field(init=False)
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None

    def __post_init__(self) -> None:
        self.samples = [[] for _ in range(self.params.n)]

    def receive(self, deltas: Generator[Delta, None, None], *, shown: bool = False,
                stopped: Callable[[], bool] = lambda: False) -> None:
        """Take deltas to the end or until `stopped`; if `shown`, write the text to stdout as a line."""
        unfinished_line = False
        with closing(deltas):
            try:
                for delta in deltas:
                    if delta.ids:
                        self.last = time.perf_counter()
                        self.first = self.first or self.last
                        self.samples[delta.index].append(delta)
                    if shown and delta.text:
                        write_reply(delta.text)
                        unfinished_line = not delta.text.endswith("\n")
                    if stopped():
                        break
            finally:
                if unfinished_line:
                    write_reply("\n")

    @property
    def text(self) -> str:
        """The text of the first sample."""
        return "".join(delta.text for delta in self.samples[0])

    @property
    def finish_reason(self) -> str | None:
        """Why the first sample ended; None if it was stopped before that."""
        return self.samples[0][-1].finish_reason if self.samples[0] else None

    @property
    def num_tokens(self) -> int:
        """Tokens generated, in all samples."""
        return sum(len(delta.ids) for sample in self.samples for delta in sample)

    def completions(self) -> list[Completion]:
        """The samples, folded; to be asked when all have ended."""
        return [Completion.fold(deltas, self.params, self.num_prompt_tokens) for deltas in self.samples]

    def show_stats(self) -> None:
        """Tokens, tokens/s after the first one, and the time to that one, on stderr."""
        if self.first is None:
            return
        later, seconds = self.num_tokens - self.params.n, self.last - self.first
        rate = f", {later / seconds:.1f} tokens/s" if later and seconds else ""
        note(f"prompt {self.num_prompt_tokens} tokens, first token after {self.first - self.began:.2f} s; "
             f"reply {self.num_tokens} tokens in {self.last - self.began:.2f} s{rate}")
