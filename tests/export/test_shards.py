"""Safetensors files written tensor by tensor, and how much memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lpsearch.export.base import open_source
from lpsearch.export.shards import INDEX_NAME, SafetensorsReader, TensorSpec, list_shards, write_shard
from lpsearch.models import resolve_source
from tests.export.byte_tokenizer import write_byte_tokenizer

ROOT = Path(__file__).parents[2]


def test_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 5, generator=generator),
        "transposed": torch.randn(6, 4, generator=generator).T,
        "half": torch.randn(9, generator=generator).to(torch.float16),
        "brain": torch.randn(3, 3, generator=generator).to(torch.bfloat16),
    }
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    written: list[None] = []
    shards = list_shards(specs, max_shard_bytes=150)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == [
        ["matrix"],
        ["transposed", "half", "brain"],
    ]
    for shard in shards:
        write_shard(tmp_path, shard, lambda name, dtype: tensors[name].to(dtype), lambda: written.append(None))
    assert len(written) == 4
    found = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard.file_name).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    index = {"weight_map": {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    reader = SafetensorsReader(tmp_path)
    read = {name: reader.read(name) for name in tensors}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())  # type: ignore[arg-type]
    assert reader.read("bias") is None


MEASURE = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lpsearch.export import export_source
from lpsearch.export.base import open_source
from lpsearch.export.shards import SafetensorsReader
from lpsearch.models import resolve_source
from lpsearch.plan import Plan

def read_status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

small, large, shard_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
groups = [[0, 1], [2, 3]]
export_source(resolve_source(small), Plan.from_groups(groups), small + "-out")  # imports everything
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
baseline = read_status("VmRSS")
export_source(resolve_source(large), Plan.from_groups(groups), large + "-out", max_shard_bytes=shard_bytes)
print(json.dumps({"above_baseline": read_status("VmHWM") - baseline}))
"""


def measure_peak(tmp_path: Path, *, hidden_size: int, intermediate_size: int, shard_bytes: int) -> tuple[int, int]:
    """Export a random model in a process of its own; return its peak above the baseline, and its largest shard."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, hidden, intermediate in (("small", 64, 64), ("large", hidden_size, intermediate_size)):
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, vocab_size=4096,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.to_empty(device="cpu").save_pretrained(tmp_path / name)
        write_byte_tokenizer(tmp_path / name)
        del model
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), str(shard_bytes)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    largest = max(file.stat().st_size for file in (tmp_path / "large-out").glob("*.safetensors"))
    return json.loads(done.stdout.splitlines()[-1])["above_baseline"], largest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_needed_is_that_of_a_tensor_not_of_a_shard(tmp_path: Path) -> None:
    peak, largest = measure_peak(tmp_path, hidden_size=1024, intermediate_size=4096, shard_bytes=10**9)
    assert largest > 100 * 10**6
    assert peak < 1.2 * largest


def test_what_is_no_number_is_read_from_its_file_too(tmp_path: Path) -> None:
    """What transformers converted is kept in memory; that NaN is unequal to itself is no sign of a conversion."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    name = "lm_head.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    base = open_source(resolve_source(str(tmp_path / "model")))
    assert base.read(name) is not base.read(name)  # what is kept would be the same tensor
    torch.testing.assert_close(base.read(name), model.get_parameter(name).detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_needed_for_shards_of_a_gigabyte(tmp_path: Path) -> None:
    peak, largest = measure_peak(tmp_path, hidden_size=4096, intermediate_size=11008, shard_bytes=10**9)
    assert largest > 0.9 * 10**9
    assert peak < 1.2 * largest
