"""The configuration in force, which a reload replaces."""

from ckptfs._model.config import Config


class CurrentConfig:
    """A cell with the daemon's configuration, which is frozen and which a reload replaces.

    Code that needs a setting which can change reads it from the cell when it needs it.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
