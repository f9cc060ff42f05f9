"""Releases: a new version of a name is staged, checked, given a share of the requests, promoted or rolled back.

    stage     the files of NAME, or another entry of the folders, become NAME@staged; NAME is held where it is
    check     NAME@staged answers the canary set, `canary.json` beside its files
    weight    NAME@staged answers a share of the requests for NAME
    promote   NAME moves to the version; the one before is kept for a rollback
    rollback  NAME@staged ends, or NAME moves back; failures of the share do the same without an operator

A staged version is a variant of its own in the catalogue, held at its digest. So what holds for every variant holds
for it: it is evaluated, swapped in or loaded as an adapter, asked by its name, counted in the metrics under it, kept
with its θ over restarts, and exported with the state. A release is the record beside it
(`variants/release.py`), on the name that it is for. Each step is one write of all records, after everything that can
fail, so that a crash leaves the state before or after it.

No request learns its version anew after it was prepared: a promotion or a rollback moves names, and the requests in
flight end with the version that their headers name.
"""
