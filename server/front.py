"""The front process, put together: listens, loads the text side of a checkpoint, keeps an engine behind it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llama.checkpoint.pull import resolve
from llama.config import LlamaConfig
from llama.generation_config import read_generation_config
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from server.generation import Generator
from server.http import HttpLimits
from server.http.hangups import Hangups
from server.http.listener import Listener
from server.metrics import Metrics
from server.origins import Origins
from server.routes import Routes
from server.served import Served
from server.supervisor import State, Supervisor
from server.wire import EngineSpec

# After the engine has been stopped: what the last bytes of answers get to reach their clients.
_LAST_WORDS_SECONDS = 5.0


@dataclass(frozen=True)
class Settings:
    """How to serve. names: what clients call the model. spec: the engine. max_context: of prompt and reply
    together; None: what the model was made for. keys: none: everybody may ask. has_traces: whether requests may look
    inside."""

    names: tuple[str, ...]
    spec: EngineSpec = field(default_factory=EngineSpec)
    max_context: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    root_path: str = ""
    keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    limits: HttpLimits = field(default_factory=HttpLimits)
    heartbeat_seconds: float = 5.0
    has_traces: bool = False


class Front:
    """A server. on_state: as Supervisor has it."""

    def __init__(self, settings: Settings, on_state: Callable[[State, str], None] = lambda state, detail: None):
        """Bind. Raises OSError."""
        self.settings = settings
        self._on_state = on_state
        self.supervisor = Supervisor(settings.spec, self._note_state)
        measured = Metrics(settings.names[0])
        generator = Generator(self.supervisor, Hangups(), measured, settings.heartbeat_seconds)
        origins = Origins(settings.host, settings.allowed_hosts, settings.allowed_origins)
        self.routes = Routes(generator, origins, measured, settings.keys, settings.root_path)
        self.listener = Listener(settings.host, settings.port, settings.limits, self.routes.handle,
                                 self.routes.refuse, measured.connections.add)

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.settings.host, self.settings.host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.listener.port}{self.settings.root_path}"

    def start(self) -> None:
        """Accept connections, then load. Raises what a checkpoint's readers do: ConfigError, TokenizerError, ..."""
        self.listener.start()
        self.routes.served = load_served(self.settings)
        self.supervisor.start()

    def stop(self, drain_seconds: float) -> None:
        """Let running answers end, for so long; then close. A second call, from a signal handler, hurries the first
        and returns at once."""
        if self.supervisor.state == "draining":
            return self.supervisor.stop(drain_seconds)
        self.supervisor.stop(drain_seconds)
        self.listener.stop(_LAST_WORDS_SECONDS)

    def _note_state(self, state: State, detail: str) -> None:
        if state == "ready":  # what the cache has room for is known only now
            served = self.routes.served
            self.routes.served = replace(served, max_context=min(served.max_context,
                                                                 self.supervisor.loaded.max_context))
        self._on_state(state, detail)


def load_served(settings: Settings) -> Served:
    """The checkpoint's text side, and what is said about it."""
    directory = resolve(settings.spec.model)
    config = LlamaConfig.from_directory(directory)
    defaults, eos_token_ids = read_generation_config(directory)
    return Served(
        names=settings.names, root="demo" if settings.spec.model is None else settings.spec.model,
        tokenizer=Tokenizer.from_directory(directory), template=ChatTemplate.from_directory(directory),
        config=config, defaults=defaults, eos_token_ids=eos_token_ids or config.eos_token_ids,
        max_context=config.context_length(settings.max_context), created=int(time.time()),
        has_traces=settings.has_traces)
