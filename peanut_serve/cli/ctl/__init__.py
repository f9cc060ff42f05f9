"""Sub-commands of `peanut-serve ctl` that have sub-commands themselves."""
