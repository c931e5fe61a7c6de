"""genssd beside the fastest other engine: the ratio of their speeds, the bar for it, and fractions of the limit."""

from __future__ import annotations

BARS = {"prefill": 1.0, "decode": 1.5, "score": 1.3, "select_expand": 1.5}
"""Smallest accepted speed of genssd by workload, as a multiple of the fastest other engine's."""


def compare(rows: list[dict[str, object]], workload: str) -> dict[str, object] | None:
    """Return genssd's speed beside the fastest other engine's, the bar, and the fractions of the machine's limit.

    None where genssd or all others were not measured.
    """
    measured = {str(row["engine"]): row for row in rows if row["workload"] == workload and "seconds" in row}
    genssd = measured.pop("genssd", None)
    if genssd is None or not measured:
        return None
    best = min(measured, key=lambda name: float(str(measured[name]["seconds"])))
    ratio = float(str(measured[best]["seconds"])) / float(str(genssd["seconds"]))
    return {
        "best_peer": best,
        "ratio": round(ratio, 3),
        "bar": BARS[workload],
        "reached": ratio >= BARS[workload],
        "share_of_limit": genssd["share_of_limit"],
        "share_of_limit_of_best_peer": measured[best]["share_of_limit"],
    }
