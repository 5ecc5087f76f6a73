"""How good a checkpoint is, or what a weight format has cost it: over a text, and on multiple-choice questions."""


class EvaluationError(ValueError):
    """What was given cannot be measured; the message says what to change."""
