"""Train the packaged digits models from nothing: classifier, teacher, one- to two-step student.

    classifier                  cross-entropy on the real training half; its features carry the
                                metrics
    teacher, student, refine    trainer.py says how; a stopped run goes on where it was

    python examples/digits/train.py                   # into out/digits; prints the time left
    python examples/digits/train.py --device cuda
    python examples/digits/train.py --stage student   # one stage again; the others are kept
    fewstep demo --weights out/digits                 # look at what came out

The package ships what `--output python/fewstep/assets/digits` wrote.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import evaluate
import torch
import trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from trainer import Run, StageConfig, Task, draw_batch

from fewstep.assets.digits import digits_data, digits_transformer
from fewstep.metrics import DigitClassifier

STAGES = {
    "classifier": StageConfig(steps=1000, lr=2e-3, weight_decay=0.05),
    "teacher": StageConfig(steps=2400, guidance=1.2),
    "student": StageConfig(
        steps=1400,
        lr=2.5e-4,
        time_mean=0.4,
        time_std=1.2,
        endpoint_mass=0.25,
        tangent_warmup=400,
        guidance=1.2,
        fp32=True,
    ),
    "refine": StageConfig(
        steps=700,
        lr=2.5e-4,
        warmup=50,
        ema=0.995,
        time_mean=-0.3,
        time_std=1.6,
        endpoint_mass=0.1,
        guidance=1.2,
        power=0.5,
        fp32=True,
    ),
}


def train_classifier(config: StageConfig, run: Run) -> DigitClassifier | None:
    """Cross-entropy with label smoothing on shifted, slightly noisy images of the training half."""
    torch.manual_seed(config.seed)
    images, labels = (x.to(run.device) for x in digits_data("train"))

    def loss_fn(model: nn.Module, step: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = draw_batch(len(images), config.batch, run, g)
        x = images[rows]
        dy, dx = torch.randint(0, 3, (2,), generator=g).tolist()
        x = nn.functional.pad(x, (1, 1, 1, 1), value=-1)[..., dy : dy + 16, dx : dx + 16]
        x = x + 0.15 * torch.randn(x.shape, generator=g).to(run.device)
        loss = nn.functional.cross_entropy(model(x), labels[rows], label_smoothing=0.05)
        return loss, loss.detach()

    return trainer.train("classifier", config, DigitClassifier(), loss_fn, run)


def classifier_stage(config: StageConfig, run: Run) -> bool:
    """Train the classifier and write it; False if it was stopped early."""
    model = train_classifier(config, run)
    if model is not None:
        state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(state, run.output / "classifier.safetensors")
    return model is not None


def report(output: Path, smoke: bool) -> None:
    """Measure and write the card."""
    # A smoke run only shows that measuring works: one seed, few images and steps.
    quick = {"seeds": 1, "teacher_steps": 2, "limit": 40} if smoke else {"seeds": 3}
    evaluate.report(output, **quick)


TASK = Task(
    output=Path("out/digits"),
    stages=STAGES,
    data=partial(digits_data, "train"),
    network=digits_transformer,
    report=report,
    extra={"classifier": classifier_stage},
)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    trainer.main(TASK, argv)


if __name__ == "__main__":
    main()
