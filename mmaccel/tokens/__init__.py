"""The token layer: signal -> allocate -> select -> reduce -> place, as pure functions on tensors; no model in sight.

Conventions of every module: B items, N tokens, D features; a mask is bool, True where a token is valid; a signal is
float32 (B, N), higher keeps, -inf is not eligible; indices are int64, ascending, and -1 fills up rows that are shorter
than the longest; ties go to the lower position; a budget is met exactly or is an error.
"""

from __future__ import annotations
