"""What `llama chat`, `llama generate`, ... do: one module each, with a `run(args)` that `llama.cli` calls."""


class CommandError(Exception):
    """The command cannot do what it was asked for; the message is one line that says what to change."""


class UsageError(CommandError):
    """The flags do not go together."""
