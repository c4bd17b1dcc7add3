"""What importing costs, and what it must not load."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAVY = ("torch", "transformers", "diffusers", "triton", "decord", "gradio", "accelerate", "matplotlib", "av", "numpy")


def loaded_after(code):
    """Which of the heavy packages a fresh interpreter has loaded after running `code`."""
    code = textwrap.dedent(code) + f"\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return eval(run.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import mmaccel; mmaccel.__version__; mmaccel.MMAccelError") == []


def test_listing_the_methods_loads_torch_alone():
    code = """
    import mmaccel
    assert mmaccel.HoliTom(keep=0.15).keep == 0.15
    assert "fastv" in mmaccel.methods()
    import torch
    assert not torch.cuda.is_initialized()
    """
    assert set(loaded_after(code)) <= {"torch", "numpy", "av"}


def test_accelerating_a_model_does_not_load_what_it_does_not_need():
    code = """
    import mmaccel
    from mmaccel.tiny.families import FAMILIES
    model = FAMILIES["llava"].build()
    with mmaccel.accelerate(model, "holitom"):
        model(**FAMILIES["llava"].inputs("image"))
    import torch
    assert not torch.cuda.is_initialized()
    """
    assert not set(loaded_after(code)) & {"diffusers", "decord", "gradio", "matplotlib"}


@pytest.mark.parametrize(
    "name",
    [
        "HoliTom",
        "FastV",
        "VisionZip",
        "EVS",
        "STC",
        "ToMe",
        "EarlyTom",
        "Random",
        "Uniform",
        "FewerFrames",
        "accelerate",
        "stream",
    ],
)
def test_public_names_are_there(name):
    import mmaccel

    assert callable(getattr(mmaccel, name))
    assert name in dir(mmaccel)


def test_subpackages_come_with_the_package():
    code = """
    import mmaccel
    assert callable(mmaccel.tiny.video_qa) and callable(mmaccel.measure.compare)
    assert "tiny" in dir(mmaccel)
    """
    assert "diffusers" not in loaded_after(code)


def test_ops_on_a_cpu_do_not_load_triton():
    code = """
    import torch
    from mmaccel.kernels.attention_received import attention_received
    attention_received(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    """
    assert "triton" not in loaded_after("import os; os.environ.pop('TRITON_INTERPRET', None)\n" + textwrap.dedent(code))


def test_a_name_that_is_not_there_is_an_attribute_error():
    import mmaccel

    for name in ("Nothing", "nothing", "_private"):
        with pytest.raises(AttributeError, match=name):
            getattr(mmaccel, name)
