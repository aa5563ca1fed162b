"""What batches that are fixed beforehand have in common."""

from __future__ import annotations

from typing import Any


class Planned:
    """A batch that follows nothing measured: it is a function of the clock, and a resumed run needs no state."""

    def measures(self, progress: object) -> bool:
        return True  # for who watches

    def observe(self, progress: object, noise: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
