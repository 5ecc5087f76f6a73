"""What the forward pass calls at every named place (`llama.model.sites`), and goes on with what it returns."""

from typing import Any

from torch import Tensor


class Tap:
    """The tap that leaves everything as it is: no copy, no kernel. `llama.model.plan_tap` has the one that looks."""

    def __call__(self, site: str, value: Tensor, *made_from: Any) -> Tensor:
        """The value to go on with. made_from: what the sites that are recomputed here follow from."""
        return value

    def layer(self, layer: int) -> "Tap":
        """The tap for the sites of one layer."""
        return self

    def rows(self, rows: Tensor | range) -> "Tap":
        """The tap for values that exist for these tokens ([rows], int64) of the step only, in this order."""
        return self


UNTOUCHED = Tap()
