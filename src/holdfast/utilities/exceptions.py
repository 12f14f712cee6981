"""Lightning's names for exceptions, as aliases of holdfast's own."""

from holdfast.errors import ConfigError

MisconfigurationException = ConfigError

__all__ = ["MisconfigurationException"]
