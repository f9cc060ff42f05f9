"""Which modules an adapter's config says it adapts, and which it replaces: PEFT's rules, to check the config against
the keys in the weights (`peft/tuners/tuners_utils.py`, `check_target_module_exists`; `peft/utils/other.py`,
`_set_trainable`)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# what PEFT adds to modules_to_save by the task type, whether or not the model has it (`peft/peft_model.py`)
DEFAULT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

ALL_LINEAR = "all-linear"

PREFIX = "base_model.model."  # of every module name in a PeftModel


@dataclass(frozen=True)
class Targeting:
    """The targeting fields of an adapter_config.json, as PEFT spells them, and what they are for."""

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    replaces: bool = False  # the modules are not adapted, but replaced as a whole

    @property
    def all_linear(self) -> bool:
        """PEFT's shorthand for every linear layer but the output head."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def matches(self, module: str) -> bool:
        """Whether PEFT would adapt a linear module of this name."""
        if self.exclude_modules and _named(module, self.exclude_modules):
            return False
        if self._is_kept_from(module):
            return False
        if self.all_linear:
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return _named(module, self.target_modules) and self._in_layers(module)

    def saves(self, module: str) -> bool:
        """Whether PEFT replaces `module`, or one that contains it, by a trained copy."""
        return bool(self.holders([module]))

    def holders(self, modules: Iterable[str]) -> set[str]:
        """The modules that PEFT replaces by trained copies, among `modules` and those that contain them.

        Names that *end* with an entry of modules_to_save: `classifier` catches `pre_classifier`, too.
        """
        endings = tuple(self.modules_to_save)
        known = {module[:end] for module in modules for end in _ends_of_parts(module)}
        return {module for module in known if f"{PREFIX}{module}".endswith(endings)}

    def _is_kept_from(self, module: str) -> bool:
        """Whether PEFT gives `module` no θ because of modules_to_save, which it takes as whole names here."""
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)

    def _in_layers(self, module: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns or ()] or [r".*?\.[^.]*\.(\d+)\."]
        for expression in expressions:
            if found := re.match(expression, module):
                return int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
        return False


def _ends_of_parts(module: str) -> Iterable[int]:
    """Where the names of `module`, and of the modules that contain it, end."""
    yield from (found.start() for found in re.finditer(r"\.", module))
    yield len(module)


def _named(module: str, names: str | Sequence[str]) -> bool:
    """PEFT's test: a string is a regex for the whole name, a list holds names or their endings."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
