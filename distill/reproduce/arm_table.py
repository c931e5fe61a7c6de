"""The arms of the comparison, as a table. Nothing here imports torch."""

from __future__ import annotations

from typing import Final

from genssd.distill.reproduce.arms import Arm
from genssd.distill.reproduce.sources import (
    Distracted,
    Picked,
    Prefixed,
    Probed,
    Refreshed,
    Refused,
    Searched,
    Single,
    Untrained,
)
from genssd.distill.score.pick_options import PickOptions
from genssd.distill.train.key_attention_options import KeyAttentionOptions

EASY: Final = "genssd.distill.reproduce.oracle:EasyStyle"
TEACHER: Final = {"kd_ratio": 1.0}
"""Training on the divergence from the teacher in memory alone; making.py names the teacher."""
RIVALS: Final = ("standard", "random-of-n", "standard-4x")
SAME_SEARCH: Final = ("standard", "gen-ssd-random", "standard-4x")
OTHER_CHOICES: Final = ("grape", "longest", "gen-ssd-longest", "gen-ssd-teacher")
CORE: Final = (
    Arm(name="cold-start", source=Untrained(), paper="the student before training", cost=0.1),
    Arm(name="standard", source=Single(), controls=(), paper="standard distillation"),
    Arm(name="gen-ssd", source=Searched(), controls=(*SAME_SEARCH, *OTHER_CHOICES), paper="Gen-SSD 2604.02819",
        cost=2.0),
    Arm(name="gen-ssd-random", source=Searched(criterion="random"), controls=("standard", "standard-4x"),
        paper="control: the same search, no signal", cost=2.0),
    Arm(name="random-of-n", source=Picked(criterion="random"), controls=("standard", "standard-4x"),
        paper="control: the same pool, no signal", cost=1.3),
    Arm(name="grape", source=Picked(criterion="ppl"), controls=(*RIVALS, "longest"), paper="GRAPE 2502.04194"),
    Arm(name="standard-4x", source=Single(several=True), paper="control: as many teacher tokens, other problems",
        cost=1.4),
    Arm(name="pool-all", source=Picked(criterion="random", pick=PickOptions(keep=99)),
        controls=("standard", "standard-4x"), paper="control: the whole pool"),
    Arm(name="gen-ssd-correct", source=Searched(), train={"require_correct": True},
        controls=("standard", "standard-correct", "gen-ssd"), paper="Gen-SSD, right answers only", cost=2.0),
    Arm(name="standard-correct", source=Single(), train={"require_correct": True},
        paper="standard, right answers only"),
    Arm(name="longest", source=Picked(criterion="length(longest=True)"), controls=RIVALS, paper="control: length"),
    Arm(name="shortest", source=Picked(criterion="length"), controls=RIVALS, paper="control: length"),
    Arm(name="gen-ssd-longest", source=Searched(criterion="length(longest=True)"), controls=SAME_SEARCH,
        paper="control: length in the search", cost=2.2),
    Arm(name="gen-ssd-shortest", source=Searched(criterion="length"), controls=SAME_SEARCH,
        paper="control: length in the search", cost=1.8),
    Arm(name="gen-ssd-teacher", source=Searched(criterion="teacher_logprob"), controls=SAME_SEARCH,
        paper="control: the teacher chooses", cost=2.0),
)  # fmt: skip
"""Arms that decide the question, in the order in which they run."""
POST_HOC: Final = (
    Arm(name="teacher-logprob", source=Picked(criterion="teacher_logprob"), controls=RIVALS,
        paper="control: the teacher chooses"),
    Arm(name="rsr", source=Picked(criterion="rsr"), controls=RIVALS, paper="RSR 2601.14249"),
    Arm(name="lalp", source=Picked(criterion="lalp"), controls=RIVALS, paper="LALP 2510.03988"),
    Arm(name="aslec-drop", source=Picked(criterion="aslec_drop"), controls=RIVALS, paper="ASLEC 2604.06834"),
    Arm(name="lark", source=Picked(criterion="lark"), controls=RIVALS, paper="LARK 2605.30651"),
    Arm(name="rsd-accept", source=Picked(criterion="rsd_accept"), controls=RIVALS,
        paper="RSD's acceptance 2509.22230"),
    Arm(name="morsd",
        source=Picked(
            criterion="rationale_difficulty", pick=PickOptions(keep=4, correct=True, similarity=0.8, best_share=0.3)
        ),
        controls=RIVALS, paper="MoRSD 2509.23574"),
    Arm(name="rsd", source=Refused(), paper="RSD 2509.22230", cost=1.5),
    Arm(name="p-align", source=Prefixed(), paper="P-ALIGN 2601.10064", cost=1.2),
)  # fmt: skip
"""Arms of the papers that choose among finished responses, or change them."""
LOSSES: Final = (
    Arm(name="kd", source=Single(), train=TEACHER, paper="forward KL on the teacher's text", cost=1.8),
    Arm(name="on-policy", source=Single(), train={**TEACHER, "kd_loss": "reverse_kl", "lmbda": 1.0},
        paper="reverse KL on own text (GKD 2306.13649)", cost=3.0),
    Arm(name="gkd", source=Single(), train={**TEACHER, "kd_loss": "jsd", "lmbda": 0.5},
        paper="GKD 2306.13649, half on own text", cost=2.5),
    Arm(name="own-correct",
        source=Picked(criterion="random", writer="student", responses=16, pick=PickOptions(keep=16, correct=True)),
        paper="no teacher: own right rollouts (control of 2608.31046)", cost=1.5),
    Arm(name="own-random",
        source=Picked(criterion="random", writer="student", responses=16, pick=PickOptions(keep=16)),
        paper="control: own rollouts, right or wrong"),
    Arm(name="leaf", source=Distracted(), train=TEACHER, controls=("standard", "kd"), paper="LeaF 2506.07851",
        cost=2.2),
    Arm(name="molsaki", source=Single(), train={"key_attention": KeyAttentionOptions(weight=1.0)},
        paper="MoLSAKI 2604.15701", cost=2.5),
    Arm(name="tree-layout", source=Picked(criterion="random", pick=PickOptions(keep=99)), train={"layout": "tree"},
        controls=("pool-all",), paper="the data of pool-all, prefixes computed once"),
    Arm(name="positive-nodes", source=Probed(), train={**TEACHER, "kd_loss": "reverse_kl", "learning_rate": 3e-4},
        controls=("cold-start", "all-nodes"), paper="2605.10889, 2608.04419", tokens=0.1, cost=1.5),
    Arm(name="all-nodes", source=Probed(rule="nodes"),
        train={**TEACHER, "kd_loss": "reverse_kl", "learning_rate": 3e-4}, controls=("cold-start",),
        paper="control: nodes without the choice", tokens=0.1, cost=0.5),
)  # fmt: skip
"""Arms that differ in the loss, or in who writes."""
VARIANTS: Final = (
    Arm(name="gen-ssd-n2", source=Searched(factor=0.5), controls=("standard", "gen-ssd"),
        paper="Gen-SSD, half the candidates", cost=1.5),
    Arm(name="gen-ssd-n8", source=Searched(factor=2.0), controls=("standard", "gen-ssd"),
        paper="Gen-SSD, twice the candidates", cost=3.0),
    Arm(name="gen-ssd-short", source=Searched(chunk="short"), controls=("standard", "gen-ssd"),
        paper="Gen-SSD, chunks cut inside steps", cost=2.2),
    Arm(name="gen-ssd-whole", source=Searched(chunk="whole"), controls=("standard", "grape"),
        paper="Gen-SSD with one chunk, which is GRAPE", cost=1.8),
    Arm(name="gen-ssd-threshold", source=Searched(share=0.75, options={"on_unlearnable": "resample"}),
        controls=("standard", "gen-ssd"), paper="Gen-SSD with a threshold", cost=2.4),
    Arm(name="gen-ssd-beam", source=Searched(factor=0.5, options={"beam": 2}), controls=("standard", "gen-ssd"),
        paper="Gen-SSD, two branches with half the candidates", cost=2.4),
    Arm(name="gen-ssd-refreshed", source=Refreshed(), controls=("standard", "gen-ssd"),
        paper="Gen-SSD, the trained student chooses next", cost=2.2),
    Arm(name="gen-ssd-lalp", source=Searched(criterion="lalp"), controls=SAME_SEARCH, paper="LALP in the search",
        cost=2.2),
    Arm(name="gen-ssd-highest", source=Searched(criterion="divergence"), controls=SAME_SEARCH,
        paper="DASD 2601.09088: what the student finds least likely", cost=1.8),
)  # fmt: skip
"""Settings of the search."""
ORACLE: Final = (
    Arm(name="oracle", source=Searched(criterion=EASY), controls=("standard", "gen-ssd"),
        paper="upper bound: the easy style is known", cost=2.2),
    Arm(name="teacher", source=Untrained(model="teacher"), paper="reference: the teacher itself", cost=0.3),
)  # fmt: skip
