"""V1 for T5Gemma from Gemma 2: tensors, settings and names are damaged, and the manifest resealed."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.parity.reports.report import Report
from tests.parity.mutations import (
    OPERATORS,
    Bench,
    Document,
    MakeBench,
    Tally,
    Tensors,
    check_of,
    close,
    departs,
    exchange,
    leaves,
    message_of,
    parent_of,
    plausible,
    put,
    setting_name,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_source")]

PARITIES = ("decoder_parity", "encoder_parity", "cross_parity")
TWINS = ["gemma2-5", "gemma2-untied-float32"]


def layer_tensors(names: list[str], number: int) -> list[str]:
    return [name for name in names if f".layers.{number}." in name]


def place_of(name: str) -> tuple[str, str]:
    """Return the parity check of a tensor and the expected first difference."""
    if name.startswith("lm_head."):
        return "decoder_parity", "lm_head.out_proj.weight, or"
    _, part, rest = name.split(".", 2)
    if rest.startswith("embed_tokens"):
        return f"{part}_parity", "embed_tokens"
    if rest == "norm.weight":
        return f"{part}_parity", f"{part} norm"
    _, number, module = rest.removesuffix(".weight").split(".", 2)
    parity = "cross_parity" if "cross_attn" in module else f"{part}_parity"
    return parity, f"{part} layers.{number}"


def failed_parities(report: Report) -> set[str]:
    return {check.name for check in report.failed} & set(PARITIES)


@pytest.mark.parametrize("name", TWINS)
def test_an_undamaged_model_passes(name: str, bench: MakeBench) -> None:
    made = bench(name)
    made.reseal()
    report = made.judged()
    assert report.passed, report.failed
    assert {check.name for check in report.checks} >= {"integrity", "provenance", "config", *PARITIES, "runs"}


def judge_tensor(made: Bench, name: str, tally: Tally, label: str) -> None:
    """Expect provenance to name the tensor, and only its parity check its layer and module."""
    report = made.resealed()
    tally.add(f"{label} {name}", report)
    assert name in message_of(check_of(report, "provenance")), label
    parity, place = place_of(name)
    assert failed_parities(report) == {parity}, (label, name)
    where = departs(report, parity)
    assert place in where, (label, name)
    if ".layers." in name:
        assert where.endswith(name.split(".", 4)[4].removesuffix(".weight")), (label, name)


@pytest.mark.parametrize("name", TWINS)
def test_no_operator_on_a_kind_of_tensor_passes(name: str, bench: MakeBench) -> None:
    made, tally = bench(name), Tally()
    with made.tensors() as views:
        names = list(views)
    kinds = [*layer_tensors(names, 1), *(each for each in names if ".layers." not in each)]
    assert len(kinds) == 28 + 4 + ("untied" in name)
    for target in kinds:
        for operator in OPERATORS:
            with made.tensors() as views:
                operator(views[target])
            judge_tensor(made, target, tally, operator.__name__)
    close(tally, "first generation, tensors")


@pytest.mark.parametrize("name", TWINS)
def test_one_changed_element_of_an_unread_row_is_found(name: str, bench: MakeBench) -> None:
    made, tally = bench(name), Tally()
    tables = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
    tables += ["lm_head.out_proj.weight"] if "untied" in name else []
    for table in tables:
        for row in range(0, 300, 37):
            with made.tensors() as views:
                views[table][row, 3] += 0.5
            report = made.resealed()
            tally.add(f"{table} {row}", report)
            assert failed_parities(report) == {place_of(table)[0]}
            assert f"{table}[{row}, 3]" in message_of(check_of(report, "provenance"))
    tally.close("rows", 18)


def test_tensors_swapped_between_layers_or_stacks_are_found(bench: MakeBench) -> None:
    made, tally = bench("gemma2-5"), Tally()
    modules = [f"cross_attn.{letter}_proj" for letter in "qkvo"]
    modules += ["pre_cross_attn_layernorm", "post_cross_attn_layernorm"]
    pairs = [
        (f"model.decoder.layers.{one}.{module}.weight", f"model.decoder.layers.{other}.{module}.weight")
        for one, other in ((0, 4), (1, 2))
        for module in modules
    ]
    for one, other in pairs:
        with made.tensors() as views:
            exchange(views, one, other)
        report = made.resealed()
        tally.add(f"{one} {other}", report)
        # Self-attention, MLP and encoder are unchanged.
        assert failed_parities(report) == {"cross_parity"}
        module = one.split(".", 4)[4].removesuffix(".weight")
        assert departs(report, "cross_parity") == f"decoder layers.{one.split('.')[3]}, {module}"
    for module in ("self_attn.q_proj", "mlp.up_proj", "post_self_attn_layernorm", "cross_attn.k_proj"):
        for part in ("encoder", "decoder"):
            one, other = (f"model.{part}.layers.{number}.{module}.weight" for number in (1, 3))
            with made.tensors() as views:
                if one not in views:
                    continue
                exchange(views, one, other)
            report = made.resealed()
            tally.add(f"{one} {other}", report)
            assert failed_parities(report) == {place_of(one)[0]}
    layer = "model.decoder.layers.2"
    for one, other in (
        (f"{layer}.pre_cross_attn_layernorm.weight", f"{layer}.post_cross_attn_layernorm.weight"),
        (f"{layer}.cross_attn.k_proj.weight", f"{layer}.cross_attn.v_proj.weight"),
        ("model.encoder.norm.weight", "model.encoder.layers.0.pre_feedforward_layernorm.weight"),
    ):
        with made.tensors() as views:
            exchange(views, one, other)
        report = made.resealed()
        tally.add(f"{one} {other}", report)
        assert failed_parities(report) == {place_of(other)[0]}
    close(tally, "first generation, exchanged")


# Settings


COMPUTED_WITH = {
    "attn_logit_softcapping", "head_dim", "hidden_activation", "layer_types", "num_attention_heads",
    "query_pre_attn_scalar", "rms_norm_eps", "rope_theta", "factor", "sliding_window",
}  # fmt: skip
"""Settings of a stack that change what it computes, and that a parity must see by itself."""


@pytest.mark.parametrize("name", ["gemma2-float32", "gemma2-7-untied"])
def test_every_changed_setting_is_found(name: str, bench: MakeBench) -> None:
    made, tally, seen = bench(name), Tally(), set()
    config = read_json_object(made.folder / "config.json")
    for path, value in leaves(config):
        other = plausible(path, value)
        made.edit("config.json", lambda document, path=path, other=other: put(document, path, other))
        report = made.resealed()
        tally.add(f"{path}: {value!r} to {other!r}", report)
        assert setting_name(path) in message_of(check_of(report, "config")) or path[-1] in message_of(
            check_of(report, "config")
        )
        last = next(str(key) for key in reversed(path) if isinstance(key, str))
        computed = any(check.name == "decoder_parity" and check.figures is not None for check in report.checks)
        if last in COMPUTED_WITH and computed:
            # Only the stack with other settings differs.
            parities = failed_parities(report)
            assert f"{path[0]}_parity" in parities, path
            assert (f"{'encoder' if path[0] == 'decoder' else 'decoder'}_parity") not in parities, path
            seen.add((path[0], last))
    assert {last for _, last in seen} == COMPUTED_WITH - {"head_dim", "num_attention_heads"}
    assert {part for part, _ in seen} == {"encoder", "decoder"}
    close(tally, "first generation, settings")


def test_every_missing_setting_is_found(bench: MakeBench) -> None:
    made, tally = bench("gemma2-5"), Tally()
    config = read_json_object(made.folder / "config.json")
    paths = dict.fromkeys(path for path, _ in leaves(config) if isinstance(path[-1], str))
    for path in paths:
        made.edit("config.json", lambda document, path=path: parent_of(document, path).pop(path[-1]))
        report = made.resealed()
        tally.add(f"without {path}", report)
        assert not check_of(report, "config").passed, path
    close(tally, "first generation, settings missing")


@pytest.mark.parametrize("name", ["gemma2-5"])
@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("attn_logit_softcapping", None, {"decoder_parity", "cross_parity"}),
        ("query_pre_attn_scalar", 144, {"decoder_parity", "cross_parity"}),
        ("final_logit_softcapping", None, {"decoder_parity"}),
        ("sliding_window", 6, {"decoder_parity"}),
        ("rms_norm_eps", 1e-3, {"decoder_parity", "cross_parity"}),
    ],
)
def test_cross_attention_settings_are_found_there(
    name: str, setting: str, value: object, found: set[str], bench: MakeBench
) -> None:
    made = bench(name)
    made.edit("config.json", lambda document: put(document, ("decoder", setting), value))
    report = made.resealed()
    assert failed_parities(report) == found
    if "cross_parity" in found and setting != "rms_norm_eps":
        assert departs(report, "cross_parity") == "decoder layers.0, cross_attn (scale, softcap or heads)"


def _untie(document: Document) -> None:
    document["tie_word_embeddings"] = not document["tie_word_embeddings"]


def _shorter(document: Document) -> None:
    document["decoder"]["num_hidden_layers"] -= 1
    document["decoder"]["layer_types"].pop()


def _wider(document: Document) -> None:
    document["encoder"]["hidden_size"] = 28


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("change", [_shorter, _wider, lambda document: document.pop("decoder")])
def test_a_config_of_another_model_is_not_run(
    name: str, change: Callable[[Document], object], bench: MakeBench
) -> None:
    made = bench(name)
    made.edit("config.json", change)
    report = made.resealed()
    assert not check_of(report, "config").passed
    assert not report.passed
    assert not any(check.passed for check in report.checks if check.name in PARITIES)


@pytest.mark.parametrize("name", TWINS)
def test_a_changed_output_tying_is_found(name: str, bench: MakeBench) -> None:
    made = bench(name)
    made.edit("config.json", _untie)
    report = made.resealed()
    assert {"config", "decoder_parity"} <= {check.name for check in report.failed}


def _without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _misnamed(tensors: Tensors) -> None:
    tensors["model.decoder.layers.0.cross_attention.q_proj.weight"] = tensors.pop(
        "model.decoder.layers.0.cross_attn.q_proj.weight"
    )


def _one_more(tensors: Tensors) -> None:
    tensors["lm_head.out_proj.weight"] = tensors["model.decoder.embed_tokens.weight"] + 1


def _other_shape(tensors: Tensors) -> None:
    name = "model.decoder.layers.0.cross_attn.k_proj.weight"
    tensors[name] = tensors[name][:, :-1].clone()


def _other_dtype(tensors: Tensors) -> None:
    name = "model.decoder.layers.0.cross_attn.k_proj.weight"
    tensors[name] = tensors[name].to(torch.float32)


def test_missing_extra_and_mistyped_tensors_are_found(bench: MakeBench) -> None:
    made, tally = bench("gemma2-5"), Tally()
    changes: list[Callable[[Tensors], object]] = [
        _without("model.decoder.layers.4.cross_attn.o_proj.weight"),
        _without("model.decoder.layers.1.post_cross_attn_layernorm.weight"),
        _without("model.encoder.embed_tokens.weight"),
        _without("model.decoder.norm.weight"),
        _misnamed, _one_more, _other_shape, _other_dtype,
    ]  # fmt: skip
    for change in changes:
        path = made.folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        report = made.resealed()
        tally.add(getattr(change, "__name__", ""), report)
        assert not check_of(report, "provenance").passed
    close(tally, "first generation, structure")


def test_a_false_change_in_the_manifest_does_not_excuse_it(bench: MakeBench) -> None:
    made, tally = bench("gemma2-5"), Tally()
    for field, old, new in (
        ("decoder.attn_logit_softcapping", 2.0, 9.0),
        ("encoder.sliding_window", 5, 6),
        ("decoder.tie_word_embeddings", True, False),
    ):
        made.edit("config.json", lambda document, field=field, new=new: put(document, tuple(field.split(".")), new))
        false_change = {"field": field, "source": old, "target": new}
        made.reseal(lambda manifest, false_change=false_change: manifest["changes"].append(false_change))
        tally.add(field, made.judged())
    tally.close("lies", 3)
