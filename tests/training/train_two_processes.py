"""Run by test_trainer.py under `accelerate launch`: one worker of a distributed run."""

import os
import sys
from pathlib import Path

import tiny_models
import torch

if __name__ == "__main__":
    output = Path(sys.argv[1])
    student = tiny_models.llama(1, seed=1, hidden=8)  # narrower than its teacher: projections
    options = {"student": student, "terms": sys.argv[2]} if len(sys.argv) > 2 else {}
    trainer = tiny_models.trainer(output, per_device_train_batch_size=2, **options)
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"
    trainer.evaluate()  # must not keep the model from being wrapped for training
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {"model": trainer.model.state_dict(), "logs": logs, "metrics": metrics}
        torch.save(result, output / "result.pt")
    trainer.accelerator.end_training()
    # Results are on disk. The interpreter's own exit now and then aborts in a thread of gloo's
    # ("terminate called without an active exception"), which is not what this test is about.
    sys.stdout.flush()
    os._exit(0)
