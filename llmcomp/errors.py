"""Every error that llmcomp raises on purpose.

    LlmcompError
    ├── UserError               exit 2: what was asked cannot be; one sentence says what would work
    │   ├── ModelNotFound       neither a directory, nor cached, nor reachable
    │   ├── BadCheckpoint       a directory or file that is not a readable checkpoint
    │   ├── UnknownArchitecture blocks that could not be found; the message shows what was
    │   ├── BadRecipe           a recipe, flag or combination that cannot be
    │   ├── BadData             calibration or evaluation data that is missing, empty or unusable
    │   └── OutputExists        a directory that would be overwritten
    └── RunError                exit 1: something failed on the way; nothing was half-written
        ├── NumericalError      NaN or Inf; names the layer
        ├── VerificationFailed  the written checkpoint is not the model that was compressed
        ├── RankLost            another process of the run has ended without a word
        └── EndedElsewhere      another process of the run has said why all end; this one has nothing to add

Messages say what was given, what was expected and what to do, in one sentence.
"""


class LlmcompError(Exception):
    """Base of the tree; the CLI prints its message and exits with `exit_code`."""

    exit_code = 1


class UserError(LlmcompError):
    exit_code = 2


class ModelNotFound(UserError): ...


class BadCheckpoint(UserError): ...


class UnknownArchitecture(UserError): ...


class BadRecipe(UserError): ...


class BadData(UserError): ...


class OutputExists(UserError): ...


class RunError(LlmcompError): ...


class NumericalError(RunError): ...


class VerificationFailed(RunError): ...


class RankLost(RunError): ...


class EndedElsewhere(RunError):
    """Ends this process with the exit status of the one that has spoken."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
