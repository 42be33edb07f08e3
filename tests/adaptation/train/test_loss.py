from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, T5Gemma2ForConditionalGeneration

from t5g2convert.adaptation.train.loss import IGNORED, ModelWithLoss
from t5g2convert.adaptation.train.sharding import load_values
from t5g2convert.adaptation.train.teacher import Teacher, build_teacher, teacher_names
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.weights import Weights
from tests.conftest import TwinFolder

TEXT = "text-float32"


@pytest.fixture
def model(converted_twin: TwinFolder) -> T5Gemma2ForConditionalGeneration:
    return T5Gemma2ForConditionalGeneration.from_pretrained(converted_twin(TEXT), dtype=torch.float32).train()


def load_teacher(folder: Path) -> Teacher:
    teacher, checkpoint = build_teacher(folder, vocabulary=300, dtype=torch.float32), open_checkpoint(folder)
    load_values(teacher, teacher_names(teacher, checkpoint), Weights(checkpoint), torch.device("cpu"))
    return teacher


def make_batch(*, vocabulary: int = 300) -> dict[str, torch.Tensor]:
    """Return three samples of three tasks, the second the shortest; every length is odd."""
    generator = torch.Generator().manual_seed(1)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(4, vocabulary, shape, generator=generator)

    batch = {
        "input_ids": ids(3, 17),
        "attention_mask": torch.ones(3, 17, dtype=torch.int64),
        "decoder_input_ids": ids(3, 11),
        "decoder_attention_mask": torch.ones(3, 11, dtype=torch.int64),
        "labels": ids(3, 11),
        "tasks": torch.tensor([0, 2, 1]),
    }
    batch["attention_mask"][1, 9:] = 0
    batch["decoder_attention_mask"][1, 7:] = 0
    batch["labels"][1, 7:] = IGNORED
    return batch


def add_teaching(batch: dict[str, torch.Tensor], *, vocabulary: int = 300) -> dict[str, torch.Tensor]:
    raw = torch.randint(4, vocabulary, (3, 21), generator=torch.Generator().manual_seed(2))
    positions = torch.full((3, 11), -1)
    positions[0, 2:9] = torch.arange(3, 10)
    positions[1, 1:5] = torch.arange(0, 4)
    positions[2, 4] = 19
    return {**batch, "raw_ids": raw, "raw_mask": torch.ones_like(raw), "teacher_positions": positions}


@pytest.mark.parametrize("chunk", [4, 29, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_loss_and_its_gradient_equal_those_of_the_class(
    chunk: int, softcap: float | None, model: T5Gemma2ForConditionalGeneration
) -> None:
    model.config.decoder.final_logit_softcapping = softcap
    batch = make_batch()
    loss, sums, counts = ModelWithLoss(model, tasks=4, softcap=softcap, chunk=chunk)(batch)
    assert counts.tolist() == [11, 11, 7, 0]
    assert loss.item() == pytest.approx(sums.sum().item(), rel=1e-6)
    (loss / 29).backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    expected = model(**{name: tensor for name, tensor in batch.items() if name != "tasks"})
    assert loss.item() / 29 == pytest.approx(expected.loss.item(), abs=1e-6)
    expected.loss.backward()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, model.get_parameter(name).grad, atol=1e-6), name


def test_each_task_has_its_own_sum(model: T5Gemma2ForConditionalGeneration) -> None:
    batch = make_batch()
    module = ModelWithLoss(model, tasks=4, softcap=None, chunk=5)
    together = module(batch)[1]
    for row, task in enumerate(batch["tasks"].tolist()):
        alone = module({name: tensor[row : row + 1] for name, tensor in batch.items()})[1]
        assert float(alone[task]) == pytest.approx(float(together[task]), rel=1e-5)


def test_a_batch_of_padding_has_no_loss_and_a_gradient_of_zero(model: T5Gemma2ForConditionalGeneration) -> None:
    batch = make_batch()
    batch["labels"][:] = IGNORED
    loss, sums, counts = ModelWithLoss(model, tasks=4, softcap=None, chunk=5)(batch)
    loss.backward()
    assert (loss.item(), sums.sum().item(), counts.sum().item()) == (0.0, 0.0, 0)
    table = model.get_parameter("model.encoder.text_model.embed_tokens.weight").grad
    assert table is not None
    assert not table.any()


def test_distillation_is_the_divergence_for_text_tokens_and_cross_entropy_elsewhere(
    model: T5Gemma2ForConditionalGeneration, twin_folder: TwinFolder
) -> None:
    teacher = load_teacher(twin_folder(TEXT))
    batch = add_teaching(make_batch())
    loss, _, _ = ModelWithLoss(model, tasks=4, softcap=None, chunk=5, teacher=teacher)(batch)
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    with torch.no_grad():
        student = model(**{name: batch[name] for name in names}).logits
        parent = teacher.lm_head(teacher.stack(input_ids=batch["raw_ids"]).last_hidden_state)
    naive = 0.0
    for row in range(3):
        for column in range(11):
            label, at = int(batch["labels"][row, column]), int(batch["teacher_positions"][row, column])
            if label == IGNORED:
                continue
            own = student[row, column]
            if at < 0:
                naive += float(functional.cross_entropy(own, torch.tensor(label)))
            else:
                expected = parent[row, at].softmax(-1)
                naive += float((expected * (expected.log() - own.log_softmax(-1))).sum())
    assert loss.item() == pytest.approx(naive, rel=1e-5)


def test_a_teacher_is_never_trained(model: T5Gemma2ForConditionalGeneration, twin_folder: TwinFolder) -> None:
    teacher = load_teacher(twin_folder(TEXT))
    module = ModelWithLoss(model, tasks=4, softcap=None, chunk=5, teacher=teacher).train()
    module(add_teaching(make_batch()))[0].backward()
    assert model.training
    assert not any(part.training for part in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_unused_rows_of_a_teacher_are_ignored() -> None:
    head = torch.nn.Linear(4, 10, bias=False)
    teacher = Teacher(torch.nn.Identity(), head, vocabulary=7, softcap=3.0)
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = 3.0 * torch.tanh(head(states)[:, :7] / 3.0)
    assert torch.equal(teacher.logits(states), expected)


@pytest.mark.parametrize("twin", ["text-float32", "images-8", "text-13"])
def test_a_teacher_computes_as_the_text_stack_that_transformers_loads(twin: str, twin_folder: TwinFolder) -> None:
    folder = twin_folder(twin)
    teacher = load_teacher(folder)
    multimodal = open_checkpoint(folder).config["model_type"] == "gemma3"
    loader = Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(4, 290, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    states = teacher.states(ids, torch.ones_like(ids))
    assert torch.equal(teacher.logits(states.flatten(0, 1)), expected[..., :300].flatten(0, 1))
