"""The options of `finetune`, for the command line and the Python API."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from t5g2convert.adaptation.options import IMAGE_WORKERS, LAST, RunOptions
from t5g2convert.adaptation.pairs.settings import TOKENS_OF_PASS, PairSettings
from t5g2convert.adaptation.train.run_settings import MACHINES, OBJECTIVE, OPTIMIZER, RUN
from t5g2convert.command_options import Option


class FinetuneOptions(PairSettings, RunOptions):
    """All options of `t5g2 finetune`.

    Attributes:
        steps: Steps of the whole run; 0 with `epochs`.
        epochs: How many times the pairs are read.
        keep_best: Keep the checkpoint of the best evaluation, and export it.
        best: What makes an evaluation the best.
        generate_eval: Generate texts for held-out pairs, and compare them with the targets.
        generate_samples: Pairs that texts are generated for.
        patience: Evaluations without a better one that end the run.
    """

    steps: Annotated[
        int,
        Field(ge=0),
        Option(
            "Steps of the whole run; the learning rate ends with them. A run that resumes may have more.",
            default="those of --epochs",
            group=OPTIMIZER,
        ),
    ] = 0
    epochs: Annotated[
        float | None,
        Field(gt=0),
        Option(
            "Read the pairs so many times, instead of --steps.", metavar="FLOAT", default="--steps", group=OPTIMIZER
        ),
    ] = None
    keep_best: Annotated[
        bool,
        Option(
            "Where pairs are held out: keep the checkpoint of the best evaluation, whatever --keep says, and write the "
            "model from it.",
            group=RUN,
        ),
    ] = True
    best: Annotated[
        Literal["loss", "exact", "chrf", "rouge-l"],
        Option(
            "The best evaluation: the one with the lowest held-out loss, or with --generate-eval with the highest "
            "exact match, chrF or ROUGE-L.",
            group=RUN,
        ),
    ] = "loss"
    generate_eval: Annotated[
        bool,
        Option(
            "With every evaluation, generate texts for held-out pairs, and compare them with the targets: exact match, "
            "chrF of sacrebleu, and ROUGE-L of rouge_score.",
            flag="--generate-eval/--no-generate-eval",
            group=RUN,
        ),
    ] = False
    generate_samples: Annotated[
        int, Field(ge=1), Option("Pairs that --generate-eval generates texts for.", group=RUN)
    ] = 128
    patience: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "End the run after N evaluations without a better one (see --best).",
            metavar="N",
            default="none",
            group=RUN,
        ),
    ] = None
    kd: Annotated[
        Path | None,
        Option(
            "Distil this Gemma 3 folder, which reads input and target as one text: targets are learnt from its "
            "distribution (KL), but for their final eos. Targets of pairs with images are learnt by cross-entropy.",
            metavar="GEMMA3",
            group=OBJECTIVE,
        ),
    ] = None
    eval: Annotated[
        Path | None,
        Option(
            "Packed pairs to evaluate, or a YAML file like DATA: before the first step and every --eval-every steps, "
            "their loss is computed, with the encoder visible and hidden.",
            metavar="DATA",
            group=RUN,
        ),
    ] = None
    save_every: Annotated[int, Field(ge=1), Option("Steps between checkpoints.", group=RUN)] = 1000
    keep: Annotated[int, Field(ge=1), Option("Checkpoints of --save-every to keep.", group=RUN)] = LAST
    eval_every: Annotated[int, Field(ge=1), Option("Steps between evaluations.", metavar="STEPS", group=RUN)] = 100
    eval_samples: Annotated[int, Field(ge=1), Option("Pairs of --eval that are evaluated, at most.", group=RUN)] = 1024
    workers: Annotated[
        int | None,
        Field(ge=0),
        Option(
            "Additional processes that prepare batches and decode their images, per process.",
            default=f"{IMAGE_WORKERS} if pairs have images, else 0",
            group=MACHINES,
        ),
    ] = None
    micro_tokens: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Most encoder tokens and labels per process and forward pass, padding included.",
            default=f"{TOKENS_OF_PASS:,}",
            group=MACHINES,
        ),
    ] = None
