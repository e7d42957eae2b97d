"""Which keys a query sees: the `window` and `causal` arguments of the attention ops."""

from leedl_fast.ops import checks

Window = int | tuple[int | None, int | None] | None


def window_sides(window: Window, causal: bool, unlimited: int) -> tuple[int, int]:
    """(left, right), inclusive; `unlimited`, which must reach everything, where there is no limit.

    A number w means (w, w), or (w, 0) when causal, which never lets a query see past itself.
    """
    checks.check_bool("causal", causal)
    if window is not None and not isinstance(window, tuple):
        checks.check_int("window", window)
        window = (window, 0 if causal else window)
    if window is not None and len(window) != 2:
        raise ValueError(f"window must be (left, right), got {window}")
    left, right = window if window is not None else (None, None)
    for side in (left, right):
        if side is not None:
            checks.check_int("window", side)
            if side < 0:
                raise ValueError(
                    f"window must not be negative (None means unlimited), got {window}"
                )
    left = unlimited if left is None else min(left, unlimited)
    right = unlimited if right is None else min(right, unlimited)
    return left, 0 if causal else right
