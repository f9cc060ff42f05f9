"""How requests name the two versions of a variant while a release of it is open."""

STAGED, CURRENT = "@staged", "@current"  # after a name: no name in the folders has an @


def staged_name(name: str) -> str:
    """The name of the staged version of a variant."""
    return name + STAGED


def released_name(name: str) -> str:
    """The variant that a name belongs to: `gsm8k` for `gsm8k@staged` and `gsm8k@current`, otherwise itself."""
    return name.removesuffix(STAGED).removesuffix(CURRENT)
