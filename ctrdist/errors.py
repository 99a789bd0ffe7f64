"""The one exception for what a user can put right."""

from ctrdist.serving.errors import UserError, nearest

__all__ = ["UserError", "nearest"]
