"""What workers are given, and the options that are refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair

from genssd.distill.pool.placing import Place, choose_gpus, divide_cpu
from genssd.distill.pool.worker import EngineRecipe
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.rounds.training import _count_places, _list_places
from genssd.distill.runs.chat_settings import read_clock
from genssd.distill.runs.pools import open_pool
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.train.processes import _list_variables
from genssd.engine.common.errors import InputError
from genssd.engine.texts.chat_options import ChatOptions


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_cpu_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genssd.distill.pool.placing.available_memory", lambda: 1000)
    assert [place.threads for place in divide_cpu(3, None, 8, None)] == [3, 3, 2]
    assert [place.threads for place in divide_cpu(3, "cpu", 2, 100)] == [1, 1, 1]
    assert {(place.device, place.memory) for place in divide_cpu(3, None, 8, None)} == {("cpu", 333)}
    assert len(divide_cpu(9, None, 8, 2)) == 2, "no more processes than prompts"
    assert divide_cpu(9, None, 8, 1) == divide_cpu(9, None, 8, 0) == divide_cpu(1, None, 8, None) == []


def test_every_gpu_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 4)

    def visible(devices: str, items: int | None = None, **environment: str) -> list[str | None]:
        return [place.visible_device for place in choose_gpus(devices, None, 8, items, environment)]

    assert visible("all") == ["0", "1", "2", "3"]
    assert visible("3, 1") == ["3", "1"]
    assert visible("all", items=2) == ["0", "1"]
    assert visible("0,2", CUDA_VISIBLE_DEVICES="4,5,GPU-6,7") == ["4", "GPU-6"]
    assert visible("all", CUDA_VISIBLE_DEVICES="GPU-a,GPU-b, GPU-c ,GPU-d") == ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES names 2 devices, and torch found 4 before it did: set"):
        visible("all", CUDA_VISIBLE_DEVICES="0,1")
    assert choose_gpus("1", "cuda", 8, None, {}) == [Place(device="cuda", threads=8, visible_device="1")]


def test_a_gpu_of_rocm_is_given_by_the_variable_that_counts_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with both variables sees what HIP_VISIBLE_DEVICES names: with the other one alone, always device 4."""
    see_gpus(monkeypatch, 2)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for variables in ({"HIP_VISIBLE_DEVICES": "4,5", "CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "4,5"}):
        places = choose_gpus("all", None, 8, None, variables)
        assert [place.visible_device for place in places] == ["4", "5"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(EngineRecipe, "load", lambda recipe: os.environ["HIP_VISIBLE_DEVICES"])
    assert EngineRecipe(arguments={}, chat=ChatOptions(), visible_device="5").open() == "5"
    assert _list_variables(places, rank=1, port=1)["HIP_VISIBLE_DEVICES"] == "4,5"


def test_every_mig_instance_that_is_named_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA shows a process no more than one of them; trainings over several would need NCCL, which joins none."""
    see_gpus(monkeypatch, 1)
    names = ["MIG-5a1e6c5e-0b1c", "MIG-GPU-77/1/0", "MIG-9"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    assert [place.visible_device for place in choose_gpus("all", None, 8, None)] == names
    assert [place.visible_device for place in choose_gpus("2,0", None, 8, None)] == [names[2], names[0]]
    with pytest.raises(InputError, match="there is no device 3: torch finds 3 devices, 0 to 2"):
        choose_gpus("3", None, 8, None)
    config = DistillConfig(teacher="t", student="s", data="d", devices="all")
    assert _count_places(config) == 1
    assert [place.visible_device for place in _list_places(config, 1)] == names[:1]


@pytest.mark.parametrize(
    ("options", "gpus", "message"),
    [
        ({"processes": 0}, 0, r"processes must be in 1\.\.256, not 0"),
        ({"processes": 1000}, 0, r"processes must be in 1\.\.256, not 1000"),
        ({"processes": 2, "devices": "all"}, 0, "give processes, which divide a CPU, or devices, which are GPUs, not"),
        ({"devices": "cuda:0"}, 4, "devices must be all, or numbers such as 0,1,2, not 'cuda:0'"),
        ({"devices": ""}, 4, "devices must be all, or numbers such as 0,1,2, not ''"),
        ({"devices": "0,-1"}, 4, "devices must be all"),
        ({"devices": "1,0,1"}, 4, "devices names a device twice: 1,0,1"),
        ({"devices": "all"}, 0, "devices names GPUs, and torch finds none here; processes divides the cores of a CPU"),
        ({"devices": "0"}, 0, "devices names GPUs, and torch finds none here"),
        ({"devices": "1,7"}, 4, "there is no device 7: torch finds 4 devices, 0 to 3"),
        ({"devices": "1"}, 1, "there is no device 1: torch finds 1 device, 0$"),
        ({"devices": "0", "device": "cpu"}, 4, "give devices or device, not both: device is cpu"),
        ({"processes": 2}, 4, "processes divides the cores of a CPU, and the models run on cuda: name GPUs with devic"),
        ({"processes": 2, "device": "tpu"}, 0, "device 'tpu'"),
        ({"processes": 2, "threads": 0}, 0, "threads must be in"),
        (
            {"ray": "local", "processes": 2},
            0,
            "give ray, which divides the prompts among the nodes .*, or processes, w",
        ),
        ({"ray": "auto", "devices": "all"}, 4, "give ray, which .*, or devices, which divides them on this machine"),
        ({"ray": "10.0.0.1"}, 0, "ray must be local, auto, or the HOST:PORT that `ray start --head` prints"),
        ({"ray": "local", "device": "cuda:0"}, 4, "device cuda:0: Ray gives each actor a GPU of its node"),
        (
            {"ray": "127.0.0.1:1"},
            0,
            "ray 127.0.0.1:1: nothing answers there" if find_spec("ray") else "ray needs .*: pip install 'genssd",
        ),
        ({"ray_cpus": 2}, 0, "ray_cpus=2 has no effect: it needs ray"),
        ({"ray_actors": "2"}, 0, "ray_actors='2' has no effect: it needs ray"),
    ],
)
def test_refused_before_anything_is_loaded(
    tiny_pair: TinyPair,
    write_rows: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    gpus: int,
    message: str,
) -> None:
    see_gpus(monkeypatch, gpus)
    data = write_rows([{"question": "1+1?"}, {"question": "1+2?"}])
    with pytest.raises(InputError, match=message):
        run_generate(
            GenerateConfig(teacher=str(tiny_pair.teacher), data=str(data), output_dir=str(tmp_path / "out"), **options)
        )
    assert not (tmp_path / "out").exists()


def test_an_engine_or_a_server_in_their_place_is_refused(tiny_pair: TinyPair) -> None:
    config = GenerateConfig(teacher=str(tiny_pair.teacher), data="x", processes=2)
    chat = config.make_chat_options(read_clock().isoformat())
    with (
        pytest.raises(InputError, match="processes: an engine is given, which works in this process"),
        open_pool(config, tiny_pair.engine, chat, teacher=config.teacher),
    ):
        pass
    on_ray = dataclasses.replace(config, processes=None, ray="local")
    with (
        pytest.raises(InputError, match="ray divides what models compute, and the teacher is the URL of a server"),
        open_pool(on_ray, None, chat, teacher="http://localhost:1/v1", items=2),
    ):
        pass
    with (
        pytest.raises(InputError, match="ray: an engine is given, which works in this process"),
        open_pool(on_ray, tiny_pair.engine, chat, teacher=config.teacher),
    ):
        pass
    with (
        pytest.raises(InputError, match="processes divides what models compute here, and the only one is the URL"),
        open_pool(config, None, chat, teacher="http://localhost:1/v1", items=2),
    ):
        pass
