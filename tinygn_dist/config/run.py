"""What is compressed, on which data, how it is evaluated, written and launched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tinygn_dist.config.section import Section


class ModelConfig(Section):
    name: str
    """hub id, local folder, .gguf file, or the embedded name smollm2-135m"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the loaded and exported weights; auto keeps the checkpoint's"""
    task: Literal[
        "auto", "causal-lm", "seq2seq-lm", "sequence-classification", "image-classification", "feature-extraction"
    ] = "auto"
    """which model class and which loss; auto reads the checkpoint's `architectures`"""
    trust_remote_code: bool = False
    """run the Python code that comes with the checkpoint"""
    dequantize: bool = False
    """start from the weights that the codes of a quantised checkpoint stand for (compressed-tensors, GPTQ or AWQ); else
    such a checkpoint is refused"""


class DataConfig(Section):
    name: str = "python-docs"
    """hub id, txt/jsonl/csv/parquet/arrow file, folder, python-docs (the reference shipped with Python), or self
    (text sampled from the model)"""
    subset: str | None = None
    """configuration of a hub dataset, or of a local copy of one"""
    split: str = "train"
    """split of a hub dataset, or of a local copy of one; train[:1000] is a piece of it"""
    column: str | None = None
    """column holding the text, chat messages or image, or the columns that make a row (prompt,completion); found when
    there is only one candidate"""
    label_column: str | None = None
    """column holding the class, the classes or the number that a model with a head is to answer"""
    evaluation: str | None = None
    """a second dataset to evaluate on; by default rows are split off and used for nothing else"""
    num_samples: int = Field(64, ge=1)
    """calibration sequences"""
    seq_len: int = Field(512, ge=2)
    """tokens per sequence"""
    eval_samples: int = Field(16, ge=1)
    """evaluation sequences"""
    micro_batch: int = Field(1, ge=1)
    """sequences per forward; part of the result's identity, not dealt differently at another world size"""
    packing: bool = True
    """join the rows and cut fixed windows; false pads each row and masks the padding"""
    streaming: bool = False
    """read the dataset row by row instead of downloading it"""
    seed: int = Field(0, ge=0)
    """which windows are drawn"""


class EvaluateConfig(Section):
    latency: bool = True
    """measure prefill and decode tokens per second"""
    prefill_tokens: int = Field(256, ge=8)
    """prompt length of the speed measurement"""
    batch_size: int = Field(1, ge=1)
    """sequences or images in the forward that a goal latency=... is measured on"""
    decode_tokens: int = Field(32, ge=2)
    """tokens generated in the speed measurement"""
    tasks: tuple[str, ...] = ()
    """tasks of lm-evaluation-harness to run on the dense and on the exported model (needs the package lm_eval)"""
    task_limit: int | None = Field(None, ge=1)
    """examples of each task; all by default"""
    task_dir: str | None = None
    """a folder with task files of your own"""


class OutputConfig(Section):
    dir: str = "compressed"
    """folder to write; it appears whole or not at all"""
    overwrite: bool = False
    """replace a folder that is not empty"""
    max_shard_gib: float = Field(5.0, gt=0)
    """largest size of one safetensors file"""


class DistributedConfig(Section):
    num_processes: int | None = Field(None, ge=1)
    """how many processes must be running; the run refuses to start on any other number"""
    timeout_seconds: int = Field(600, ge=1)
    """a collective that waits longer ends the run"""
    offload: Literal["none", "cpu", "disk"] = "none"
    """where weights wait that the device has no room for; for one process"""
    offload_dir: str | None = None
    """folder for the files of offload disk; by default the system's for temporary files"""
    device_gib: float = Field(0.0, ge=0)
    """offload: weights, in GiB, that stay on the device, the model's first layers"""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """where Accelerate logs metrics"""
