"""Every error smolrun raises on purpose.

    SmolrunError
    |-- ModelNotFound      a source names nothing we can open (alias, path, hub id); says how to get it
    |-- ModelFileError     a file is damaged, hostile or cut short; names file, tensor, expected and found
    |-- UnsupportedModel   a sound file of a model we do not run; names the feature
    |-- TemplateError      a chat template is missing, hostile or refuses the messages
    |-- TokenizerError     text that has no ids (lone surrogates), ids that have no text
    |-- ContextOverflow    prompt + answer do not fit; carries both counts
    |-- SessionError       a session file that is damaged, of another model, or cannot be written
    |-- OptionError        an argument out of range; names it, its value and the range (also a ValueError)
    |-- OutOfMemory        a model that does not fit the memory at hand; says what would (also a MemoryError)
    |-- KernelError        no kernels for this CPU, or their compilation failed
    `-- ModelClosed        the LLM was closed

A message tells what was found, what was expected, and what to do next.
"""


class SmolrunError(Exception):
    """Base of all errors of this package."""


class ModelNotFound(SmolrunError):
    """A model source that leads to no files."""


class ModelFileError(SmolrunError):
    """A model file that is damaged, hostile or incomplete."""


class UnsupportedModel(SmolrunError):
    """A sound model that smolrun does not run."""


class TemplateError(SmolrunError):
    """A chat template that is missing, does not finish, or rejects the messages."""


class TokenizerError(SmolrunError):
    """Text without ids or ids without text."""


class ContextOverflow(SmolrunError):
    """More tokens than the context holds.

    Attributes:
        needed: tokens asked for.
        context: tokens the context holds.
    """

    def __init__(self, needed: int, context: int, what: str = "prompt") -> None:
        self.needed = needed
        self.context = context
        super().__init__(
            f"the {what} needs {needed:,} tokens, the context holds {context:,}: "
            "shorten it, drop old turns, or load with a larger context"
        )


class SessionError(SmolrunError):
    """A session file that cannot be read or written, or that is another model's."""


class OptionError(SmolrunError, ValueError):
    """An argument out of its range."""


class OutOfMemory(SmolrunError, MemoryError):
    """A model that needs more memory than there is."""


class KernelError(SmolrunError):
    """Kernels that cannot be compiled or run on this CPU."""


class ModelClosed(SmolrunError):
    """Work was asked of a closed model."""
