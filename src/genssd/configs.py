"""The config class of every command. Nothing here imports torch: flags are read, and refused, before that is done."""

from __future__ import annotations

from genssd.distill.demo.config import DemoConfig
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.doctor.config import DoctorConfig, EnvConfig
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.report.config import ReportConfig
from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.export_config import ExportConfig
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.train.config import TrainConfig
from genssd.distill.tune.config import TuneConfig

CONFIGS: dict[str, type] = {
    "demo": DemoConfig,
    "select": SelectConfig,
    "score": ScoreConfig,
    "reselect": ReselectConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "prefix": PrefixConfig,
    "leaf": LeafConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "distill": DistillConfig,
    "diagnose": DiagnoseConfig,
    "report": ReportConfig,
    "reproduce": ReproduceConfig,
    "tune": TuneConfig,
    "doctor": DoctorConfig,
    "env": EnvConfig,
}
"""Config classes by the name of the command."""
