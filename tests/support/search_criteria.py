"""The criteria that judge the chunks of a search, every registered one among them."""

from __future__ import annotations

from genssd.engine.criteria.criterion import not_in_search
from genssd.engine.criteria.criterion_names import registered_criteria, resolve


def list_search_criteria() -> list[str]:
    """Return their names. One that is fitted over data has what it fits fixed; others judge finished traces alone."""
    names = ["aslec_casl(gamma=0.1)" if name == "aslec_casl" else name for name in registered_criteria()]
    names += ["ppl(norm='byte')", "ppl(scope='window', window=20)", "0.5*rsr + 0.5*divergence"]
    return [name for name in names if not_in_search(resolve(name)) is None]
