"""Every error a user's mistake can cause. Each message names the field, its value and the remedy."""

from __future__ import annotations


class JambascopeError(ValueError):
    """Base of the project's errors; the command line prints its message on one line and exits with status 1."""


class ConfigError(JambascopeError):
    """A model configuration, backend or option that does not make sense."""


class CheckpointError(JambascopeError):
    """A checkpoint directory, file or tensor that is missing, damaged or of the wrong kind or shape."""


class InputError(JambascopeError):
    """Tokens, masks, prompts, positions or states that the model cannot take."""


class HookError(JambascopeError):
    """A hook point that does not exist, or a hook that returned what the model cannot use."""


class RunError(JambascopeError):
    """A study's run directory that is missing, damaged, in use, of another version, or cannot be written."""
