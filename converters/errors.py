"""Every refusal of the toolkit. All messages say what was found, what was wanted and what to do.

PeanutError
├── AdapterError                the adapter cannot be used
│   ├── LayoutError             the folder is in no layout this version reads
│   ├── AdapterConfigError      adapter_config.json is invalid, unknown or disagrees with the weights
│   └── ThetaError              θ is missing, extra, of the wrong shape, damaged or not finite
├── BaseModelError              the base cannot be used
│   ├── CheckpointError         missing, truncated, corrupt, or not safetensors
│   ├── QuantizedBaseError      quantised weights cannot be merged into
│   ├── AlreadyMergedError      f(W0; θ) needs the original W0
│   └── BaseMismatchError       not the base the adapter was trained on
├── HubError                    a download from the Hub, or an upload to it, failed
├── TargetError                 an adapter weight finds no tensor in the base
├── OutputError                 the output cannot be written
│   ├── OutputExistsError       the folder exists
│   │   └── OutputBusyError     another run is writing it
│   ├── NoSpaceError            not enough room on the disk
│   └── NonFiniteError          a merged weight is NaN or does not fit the output dtype
├── VerificationError           what was written is not what was computed
├── ConversionError             the format asked for cannot say what the adapter does
├── OptionError                 an option has no meaning here
│   └── MissingScalingError     the adapter does not store its scale
└── MissingDependencyError      a package of an extra is not installed
"""


class PeanutError(Exception):
    """Base class of every error this toolkit raises on purpose."""


class AdapterError(PeanutError):
    """The adapter cannot be used."""


class LayoutError(AdapterError):
    """The folder is in no layout this version reads."""


class AdapterConfigError(AdapterError):
    """The adapter's config is invalid, holds unknown keys, or disagrees with its weights."""


class ThetaError(AdapterError):
    """θ is missing, extra, of the wrong shape, damaged or not finite."""


class BaseModelError(PeanutError):
    """The base checkpoint cannot be used."""


class CheckpointError(BaseModelError):
    """The base is missing, truncated, corrupt, or not safetensors."""


class QuantizedBaseError(BaseModelError):
    """The base holds quantised weights."""


class AlreadyMergedError(BaseModelError):
    """The base already carries a merged adapter."""


class BaseMismatchError(BaseModelError):
    """The base is not the one the adapter was trained on."""


class HubError(PeanutError):
    """Something cannot be had from the Hub, or not be uploaded to it."""


class TargetError(PeanutError):
    """A weight of the adapter finds no tensor in the base."""


class OutputError(PeanutError):
    """The output cannot be written."""


class OutputExistsError(OutputError):
    """The output folder exists, or another run is writing it."""


class OutputBusyError(OutputExistsError):
    """Another run is writing the output."""


class NoSpaceError(OutputError):
    """The disk has not enough room for the output."""


class NonFiniteError(OutputError):
    """A merged weight is NaN, infinite, or too large for the output dtype."""


class VerificationError(PeanutError):
    """The written files are not what was computed."""


class ConversionError(PeanutError):
    """The format that was asked for cannot say what the adapter does."""


class OptionError(PeanutError):
    """An option that has no meaning, or not for this input."""


class MissingScalingError(OptionError):
    """The adapter does not store its scale, and none was given."""


class MissingDependencyError(PeanutError):
    """A package is not installed; the message names the extra that brings it."""
