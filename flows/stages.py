"""One small flow a stage, so that each can be deployed, scheduled and run again alone.

Each computes its own stage only and reads what stands before it; `flows.pipeline` chains them all.
"""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from flows.parameters import DEFAULT_CONFIG, Config, HardwareOrDefault
from flows.pipeline import pipeline, run_name

Moved = State[None] | None  # of a run that went on in another work pool


@flow(name="prepare", flow_run_name=run_name)
def prepare(config: Config = DEFAULT_CONFIG, hardware: HardwareOrDefault = None, again: bool = False) -> Moved:
    """Clean, tokenize, mix and pack the data of CPT and SFT."""
    return pipeline.fn(config, hardware, only="prepare", force="prepare" if again else None)


@flow(name="cpt", flow_run_name=run_name)
def cpt(config: Config = DEFAULT_CONFIG, hardware: HardwareOrDefault = None, again: bool = False) -> Moved:
    """Continue the base model's pretraining on domain documents and replay."""
    return pipeline.fn(config, hardware, only="cpt", force="cpt" if again else None)


@flow(name="sft", flow_run_name=run_name)
def sft(config: Config = DEFAULT_CONFIG, hardware: HardwareOrDefault = None, again: bool = False) -> Moved:
    """Tune the CPT model on chats and replay."""
    return pipeline.fn(config, hardware, only="sft", force="sft" if again else None)


@flow(name="evaluate", flow_run_name=run_name)
def evaluate(config: Config = DEFAULT_CONFIG, hardware: HardwareOrDefault = None, again: bool = False) -> Moved:
    """Evaluate base, CPT and SFT model on the same tasks."""
    return pipeline.fn(config, hardware, only="evaluate", force="evaluate" if again else None)


@flow(name="report", flow_run_name=run_name)
def report(config: Config = DEFAULT_CONFIG, hardware: HardwareOrDefault = None, again: bool = False) -> Moved:
    """Write the table and the page of a run whose stages stand."""
    return pipeline.fn(config, hardware, only="report", force="report" if again else None)
