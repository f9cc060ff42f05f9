"""The exceptions of the toolkit. Each message says what was found, what was expected and what to do.

PeanutError
├── AdapterError                the adapter cannot be used
│   ├── LayoutError             the folder matches no layout that this version reads
│   ├── AdapterConfigError      the config is invalid, has unknown keys or contradicts the weights
│   └── ThetaError              θ is missing, unexpected, of the wrong shape, damaged or not finite
├── BaseModelError              the base model cannot be used
│   ├── CheckpointError         the checkpoint is missing, truncated, corrupt, or not safetensors
│   ├── QuantizedBaseError      the weights are quantised; an adapter cannot be merged into them
│   ├── AlreadyMergedError      the base already contains an adapter; f(W0; θ) needs the original W0
│   └── BaseMismatchError       the adapter was trained on a different base
├── HubError                    a download from the Hub or an upload to it failed
├── TargetError                 an adapter weight has no matching tensor in the base
│   └── UnknownModelError       its names need the code of a model that transformers does not have
├── OutputError                 the output cannot be written
│   ├── OutputExistsError       the output folder already exists
│   │   └── OutputBusyError     another run is writing the same output
│   ├── NoSpaceError            not enough free disk space
│   └── NonFiniteError          a merged weight is NaN or does not fit the output dtype
├── VerificationError           the written files differ from what was computed
├── ConversionError             the requested format cannot express what the adapter does
├── OptionError                 an option is invalid or does not apply to this input
│   └── MissingScalingError     the adapter does not store its scale, and none was given
└── MissingDependencyError      an optional package is not installed
"""


class PeanutError(Exception):
    """Base class of every error this toolkit raises on purpose."""


class AdapterError(PeanutError):
    """The adapter cannot be used."""


class LayoutError(AdapterError):
    """The folder matches no layout that this version reads."""


class AdapterConfigError(AdapterError):
    """The adapter's config is invalid, has unknown keys, or contradicts its weights."""


class ThetaError(AdapterError):
    """θ is missing, unexpected, of the wrong shape, damaged or not finite."""


class BaseModelError(PeanutError):
    """The base model cannot be used."""


class CheckpointError(BaseModelError):
    """A checkpoint is missing, truncated, corrupt, or not safetensors."""


class QuantizedBaseError(BaseModelError):
    """The weights of the base are quantised, so an adapter cannot be merged into them."""


class AlreadyMergedError(BaseModelError):
    """The base already contains a merged adapter; f(W0; θ) needs the original W0."""


class BaseMismatchError(BaseModelError):
    """The adapter was trained on a different base."""


class HubError(PeanutError):
    """A download from the Hub or an upload to it failed."""


class TargetError(PeanutError):
    """A weight of the adapter has no matching tensor in the base."""


class UnknownModelError(TargetError):
    """The names or the head need the code of a model that transformers does not have; remote code is never run."""


class OutputError(PeanutError):
    """The output cannot be written."""


class OutputExistsError(OutputError):
    """The output already exists, or another run is writing it."""


class OutputBusyError(OutputExistsError):
    """Another run is writing the same output."""


class NoSpaceError(OutputError):
    """There is not enough free disk space for the output."""


class NonFiniteError(OutputError):
    """A merged weight is NaN, infinite, or too large for the output dtype."""


class VerificationError(PeanutError):
    """The written files differ from what was computed."""


class ConversionError(PeanutError):
    """The requested format cannot express what the adapter does."""


class OptionError(PeanutError):
    """An option is invalid or does not apply to this input."""


class MissingScalingError(OptionError):
    """The adapter does not store its scale, and none was given."""


class MissingDependencyError(PeanutError):
    """An optional package is not installed; the message names the extra that installs it."""
