"""An exported trunk as the folder that another library reads: timm's, transformers', or ONNX.

timm           `config.json`, `model.safetensors`: `timm.create_model("local-dir:FOLDER")`
transformers   the same names: `RegNetModel.from_pretrained(FOLDER)`, or `ResNetModel`; and
               `preprocessor_config.json`, which `AutoImageProcessor` reads
onnx           `trunk.onnx`, of normalised inputs in batches of any size; and `trunk.json`, which says how
               they are made

Each has a model card. None needs the library but ONNX, which torch's exporter writes.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import nn

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from pipeline.data.clip.evaluation import AudioPreprocessing, ClipPreprocessing
from pipeline.data.evaluation import Preprocessing
from pipeline.data.shown import AnyPreprocessing
from pipeline.models.regnet import PRESETS, STEM_WIDTH, widths_and_depths
from pipeline.models.resnet import STAGE_WIDTHS
from pipeline.models.timm_trunk import own_name
from pipeline.recipe.trunk import Architecture, RegNetParameters
from pipeline.trunks.classifier import head_name
from pipeline.trunks.files import TrunkSpec, model_card
from pipeline.trunks.layouts import TRANSFORMERS_REGNET, TRANSFORMERS_RESNET
from pipeline.trunks.tensor_file import write_tensors

Format = Literal["timm", "transformers", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)

_FILES: Mapping[Format, tuple[str, ...]] = {
    "timm": ("config.json", "model.safetensors", "README.md"),
    "transformers": ("config.json", "model.safetensors", "preprocessor_config.json", "README.md"),
    "onnx": ("trunk.onnx", "trunk.json", "README.md"),
}
_LARGEST_ONNX = 1 << 30  # bytes of weights; those of a larger trunk lie beside it
_PILLOW = {"bilinear": 2, "bicubic": 3}  # its numbers of filters, which transformers uses


def save_as(format_: Format, network: nn.Module, spec: TrunkSpec, out: Path, *, force: bool = False) -> None:
    """Write a trunk, in evaluation mode on the CPU, as a folder of another library.

    Raises:
        UserError: if that library has no such network, or the folder holds files that are not to be lost.
    """
    architecture = spec.architecture
    if not isinstance(architecture, Architecture):
        raise UserError(f"raw pixels are no network, and cannot be exported as {format_}")
    config = _CONFIGS[format_](architecture, spec)
    taken = sorted(name for name in _FILES[format_] if (out / name).exists())
    if taken and not force:
        raise UserError(
            f"{out} already holds {taken[0]}: name another folder, or use --force to overwrite it"
        )
    out.mkdir(parents=True, exist_ok=True)
    if format_ == "onnx":
        _write_onnx(network, spec, out / "trunk.onnx")
        write_atomically(out / "trunk.json", spec.model_dump_json(indent=2) + "\n")
    else:
        tensors = network.state_dict()
        if format_ == "transformers":
            layout = TRANSFORMERS_RESNET if architecture.name.startswith("resnet") else TRANSFORMERS_REGNET
            tensors = {theirs: tensors[ours] for ours, theirs in layout.theirs(tensors).items()}
            _write_json(out / "preprocessor_config.json", _processor(spec.preprocessing))
        write_tensors(tensors, out / "model.safetensors", architecture=None)
        _write_json(out / "config.json", config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    write_atomically(out / "README.md", model_card(spec, parameters, **_USED[format_](architecture)))


def _timm_config(architecture: Architecture, spec: TrunkSpec) -> dict[str, Any]:
    """As timm writes it when it saves a model."""
    name, arguments = _timm_name(architecture)
    view = _images(spec.preprocessing, "timm")
    shown = {
        "input_size": [3, view.image_size, view.image_size],
        "fixed_input_size": False,
        "interpolation": view.interpolation,
        "crop_pct": view.image_size / view.resize,
        "crop_mode": "center",
        "mean": list(view.mean),
        "std": list(view.std),
        "custom_load": False,
        "num_classes": 0,
        "classifier": head_name(architecture),
    }
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": spec.feature_dim,
        **({} if architecture.is_timms else {"global_pool": "avg"}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": shown,
    }


def _timm_name(architecture: Architecture) -> tuple[str, dict[str, Any]]:
    """What timm calls it, and what else its `create_model` has to be told."""
    if architecture.is_timms:
        return own_name(architecture.name)
    _refuse_other_networks(architecture, "timm")
    if architecture.name.startswith("resnet"):
        return architecture.name, {}
    known = {f"regnety_{number:03}" for number in (2, 4, 6, 8, 16, 32, 40, 64, 80, 120, 160, 320, 640)}
    known |= {"regnety_1280", "regnety_2560"}
    size = architecture.name.removeprefix("regnety_").removesuffix("f")
    if size[-1:] in (
        "g",
        "m",
    ):  # billions or millions of multiply-adds; timm's number counts hundreds of them
        number = float(size[:-1].replace("_", ".")) * (10 if size.endswith("g") else 0.01)
        if (name := f"regnety_{round(number):03}") in known:
            return name, {}
    p = _parameters(architecture)
    sizes = {"depth": p.depth, "w0": p.w_0, "wa": p.w_a, "wm": p.w_m, "group_size": p.group_width}
    return "regnety_002", sizes


def _transformers_config(architecture: Architecture, spec: TrunkSpec) -> dict[str, Any]:
    _refuse_other_networks(architecture, "transformers")
    _images(spec.preprocessing, "transformers")
    if architecture.name.startswith("resnet"):
        deep = architecture.name == "resnet50"
        return {
            "architectures": ["ResNetModel"],
            "model_type": "resnet",
            "num_channels": 3,
            "embedding_size": 64,
            "hidden_sizes": [width * (4 if deep else 1) for width in STAGE_WIDTHS],
            "depths": [3, 4, 6, 3] if deep else [2, 2, 2, 2],
            "layer_type": "bottleneck" if deep else "basic",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            "torch_dtype": "float32",
        }
    parameters = _parameters(architecture)
    widths, depths = widths_and_depths(parameters)
    return {
        "architectures": ["RegNetModel"],
        "model_type": "regnet",
        "num_channels": 3,
        "embedding_size": STEM_WIDTH,
        "hidden_sizes": list(widths),
        "depths": list(depths),
        "groups_width": parameters.group_width,
        "layer_type": "y",
        "hidden_act": "relu",
        "downsample_in_first_stage": True,
        "torch_dtype": "float32",
    }


def _processor(view: AnyPreprocessing) -> dict[str, Any]:
    """Short side, centre crop and normalisation, as `AutoImageProcessor` reads them."""
    images = _images(view, "transformers")
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": images.resize},
        "resample": _PILLOW[images.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": images.image_size, "width": images.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }


def _nothing_but_an_exporter(architecture: Architecture, spec: TrunkSpec) -> dict[str, Any]:
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--format onnx needs {' and '.join(missing)}: pip install 'seer-pipeline[onnx]', or in a clone "
            "pip install '.[onnx]'"
        )
    return {}


_CONFIGS = {
    "timm": _timm_config,
    "transformers": _transformers_config,
    "onnx": _nothing_but_an_exporter,
}


def _write_onnx(network: nn.Module, spec: TrunkSpec, path: Path) -> None:
    logging.getLogger("onnxscript").setLevel(logging.WARNING)
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    program = torch.onnx.export(
        network,
        (torch.zeros(2, *_input_shape(spec.preprocessing)),),
        dynamo=True,
        input_names=["inputs"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    if program is None:  # as the type says
        raise RuntimeError("torch has exported nothing")
    with TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        program.save(str(whole), external_data=size > _LARGEST_ONNX)  # protobuf ends at 2 GB
        weights = [each for each in whole.parent.iterdir() if each != whole]
        for each in (*weights, whole):
            with each.open("r+b") as file:
                os.fsync(file.fileno())
        if weights:  # the file names them: it is not to be found beside those of another
            path.unlink(missing_ok=True)
        for each in (*weights, whole):
            each.replace(path.parent / each.name)


def _input_shape(view: AnyPreprocessing) -> tuple[int, ...]:
    if isinstance(view, Preprocessing):
        return 3, view.image_size, view.image_size
    if isinstance(view, ClipPreprocessing):
        return 3, view.frames, view.pictures.image_size, view.pictures.image_size
    assert isinstance(view, AudioPreprocessing)
    return 1, view.audio.frames, view.audio.bins


def _refuse_other_networks(architecture: Architecture, library: str) -> None:
    if architecture.takes != "images" or architecture.is_timms:
        raise UserError(f"{library} has no {architecture.name}: export it as onnx, or without --format")
    if architecture.stem != "imagenet":
        raise UserError(
            f"{library}'s {architecture.name} has no stem {architecture.stem}, and would compute something "
            "else of these weights: export it as onnx, or without --format"
        )


def _images(view: AnyPreprocessing, library: str) -> Preprocessing:
    if not isinstance(view, Preprocessing):
        raise UserError(f"this trunk is for videos, which {library} has no model for: export it as onnx")
    return view


def _parameters(architecture: Architecture) -> RegNetParameters:
    return architecture.regnet or PRESETS[architecture.name]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def _in_timm(architecture: Architecture) -> dict[str, str]:
    return {
        "library": "timm",
        "example": """import timm

trunk = timm.create_model("local-dir:path/of/this/folder", pretrained=True).eval()
data = timm.data.resolve_model_data_config(trunk)
features = trunk(timm.data.create_transform(**data)(image)[None])   # (1, features)""",
        "weights": "`model.safetensors` and `config.json` are as timm writes them.",
    }


def _in_transformers(architecture: Architecture) -> dict[str, str]:
    model = "ResNetModel" if architecture.name.startswith("resnet") else "RegNetModel"
    return {
        "library": "transformers",
        "example": f"""from transformers import AutoImageProcessor, {model}

processor = AutoImageProcessor.from_pretrained("path/of/this/folder")
trunk = {model}.from_pretrained("path/of/this/folder")
features = trunk(**processor(image, return_tensors="pt")).pooler_output.flatten(1)   # (1, features)""",
        "weights": "`model.safetensors` and `config.json` are as transformers writes them.",
    }


def _in_onnx(architecture: Architecture) -> dict[str, str]:
    return {
        "library": "onnx",
        "example": """import onnxruntime

session = onnxruntime.InferenceSession("path/of/this/folder/trunk.onnx")
(features,) = session.run(None, {"inputs": inputs})   # normalised float32 inputs, as trunk.json describes""",
        "weights": "`trunk.onnx` takes batches of any size; `trunk.json` says how inputs are made.",
    }


_USED = {"timm": _in_timm, "transformers": _in_transformers, "onnx": _in_onnx}
