"""One small flow a stage, so that each can be deployed, scheduled and run again alone.

Each computes its own stage only and reads what stands before it; `flows.pipeline` chains them all.
"""

from __future__ import annotations

from prefect import flow

from flows.pipeline import DEFAULT_CONFIG, pipeline, run_name


@flow(name="prepare", flow_run_name=run_name)
def prepare(config: str = DEFAULT_CONFIG, hardware: str | None = None, again: bool = False) -> None:
    """Clean, tokenize, mix and pack the data of CPT and SFT."""
    pipeline.fn(config, hardware, only="prepare", force="prepare" if again else None)


@flow(name="cpt", flow_run_name=run_name)
def cpt(config: str = DEFAULT_CONFIG, hardware: str | None = None, again: bool = False) -> None:
    """Continue the base model's pretraining on domain documents and replay."""
    pipeline.fn(config, hardware, only="cpt", force="cpt" if again else None)


@flow(name="sft", flow_run_name=run_name)
def sft(config: str = DEFAULT_CONFIG, hardware: str | None = None, again: bool = False) -> None:
    """Tune the CPT model on chats and replay."""
    pipeline.fn(config, hardware, only="sft", force="sft" if again else None)


@flow(name="evaluate", flow_run_name=run_name)
def evaluate(config: str = DEFAULT_CONFIG, hardware: str | None = None, again: bool = False) -> None:
    """Evaluate base, CPT and SFT model on the same tasks."""
    pipeline.fn(config, hardware, only="evaluate", force="evaluate" if again else None)


@flow(name="report", flow_run_name=run_name)
def report(config: str = DEFAULT_CONFIG, hardware: str | None = None, again: bool = False) -> None:
    """Write the table and the page of a run whose stages stand."""
    pipeline.fn(config, hardware, only="report", force="report" if again else None)
