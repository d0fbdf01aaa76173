"""Lets vLLM's own loader read exported folders, and holds what it has in memory against the files.

    python tests/harness/vllm_load.py FOLDER       packed (compressed-tensors), AWQ or GPTQ

Run it in an environment that has vLLM; the project itself does not need it. Without a GPU vLLM's CPU platform stands
in: the model is built and its weights are loaded, which is where a wrong name, shape, type or config shows, and
nothing is computed.
"""

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROWS = ("weight_packed", "weight_scale")  # joined along the outputs, which come first
COLUMNS = ("qweight", "qzeros", "scales")  # ... or last

STAND_INS: list[torch.library.Library] = []


def build(folder: Path) -> tuple[torch.nn.Module, set[str]]:
    """(the model as vLLM builds and fills it, names of the parameters that it filled)."""
    import vllm.platforms

    if not torch.cuda.is_available():
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()
        if not hasattr(torch.ops._C, "gelu_quick"):  # Qwen2-VL's tower asks for it when it is built
            STAND_INS.append(torch.library.Library("_C", "FRAGMENT"))  # it goes when nothing holds it
            STAND_INS[0].define("gelu_quick(Tensor(a!) out, Tensor x) -> ()")
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model

    model = ModelConfig(
        model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="auto", enforce_eager=True,
        max_model_len=64,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = VllmConfig(model_config=model, device_config=DeviceConfig(device), load_config=LoadConfig())
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29577", 0, "nccl" if device == "cuda" else "gloo")
        initialize_model_parallel(1)
        torch.set_default_dtype(model.dtype)
        with torch.device(device):
            built = initialize_model(config)
        return built, built.load_weights(DefaultModelLoader(config.load_config).get_all_weights(model, built))


def differing(model: torch.nn.Module, folder: Path) -> tuple[int, list[str]]:
    """(how many quantised parameters the model has, those that are not what the files say)."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {key: t for key, t in load_file(file).items() if "visual" not in key and "vision" not in key}
    seen, wrong = 0, []
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind not in (*ROWS, *COLUMNS) or "layers." not in name:
            continue
        end = name[name.rindex("layers.") :]
        part = end.split(".")[-2]
        keys = [end.replace(part, one) for one in JOINED.get(part, (part,))]
        pieces = [next(tensor for key, tensor in tensors.items() if key.endswith(wanted)) for wanted in keys]
        expected = torch.cat(pieces, dim=0 if kind in ROWS else 1)
        seen += 1
        wrong += [] if torch.equal(parameter.data.cpu(), expected) else [name]
    return seen, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    model, loaded = build(folder)
    # scales of an 8-bit key-value cache have defaults, and no checkpoint needs to hold them
    missing = [name for name in dict(model.named_parameters()) if name not in loaded and ".attn." not in name]
    seen, wrong = differing(model, folder)
    print(f"{folder}: {len(loaded)} parameters loaded, {len(missing)} missing {missing[:3]}; "
          f"{seen - len(wrong)} of {seen} quantised parameters equal the file's {wrong[:3]}")  # fmt: skip
    raise SystemExit(bool(missing or wrong or not seen))


if __name__ == "__main__":
    main()
