"""Input norms: the sum over valid rows of all uses, in float64; and their file."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlprune.errors import RequestError
from vlprune.pruning import InputNorms, load_statistics, save_statistics, statistics


def test_norms_over_batches_of_any_size_with_padding():
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(6, 2)
    norms = InputNorms({"layer": ([module], "text")})
    total = np.zeros(6)
    with norms.collect():
        for batch, tokens in ((3, 5), (1, 7), (1, 1), (4, 2)):
            x = torch.randn(batch, tokens, 6, generator=generator) * 10
            mask = torch.rand(batch, tokens, generator=generator) < 0.6
            mask[:, 0] = True
            with norms.valid(text=mask.long()):
                module(x)
            total += sum(row.double().numpy() ** 2 for row in x[mask])
    result = norms.result()["layer"]
    assert result.dtype == torch.float32 and result.shape == (6,)
    np.testing.assert_allclose(result.double().numpy(), np.sqrt(total), rtol=1e-6)


def test_long_sums_do_not_drift():
    # 2^16 rows of 1 after a row of 4096: a float32 sum of squares would lose most of them (2^24 + 1 = 2^24).
    module = nn.Linear(1, 1)
    norms = InputNorms({"layer": ([module], "vision")})
    with norms.collect():
        module(torch.full((1, 1), 4096.0))
        for _ in range(64):
            module(torch.ones(1024, 1))
    assert norms.result()["layer"].item() == pytest.approx(math.sqrt(2**24 + 2**16), rel=1e-7)


def test_squares_beyond_float32_are_summed():
    module = nn.Linear(1, 1)
    norms = InputNorms({"layer": ([module], "vision")})
    with norms.collect():
        module(torch.tensor([[1e20], [1e20]]))
    assert norms.result()["layer"].item() == pytest.approx(math.sqrt(2) * 1e20, rel=1e-6)


def test_padding_rows_may_hold_anything():
    module = nn.Linear(3, 1)
    norms = InputNorms({"layer": ([module], "text")})
    x = torch.ones(2, 3, 3)
    x[1, 2] = float("nan")
    with norms.collect(), norms.valid(text=torch.tensor([[1, 1, 1], [1, 1, 0]])):
        module(x)
    torch.testing.assert_close(norms.result()["layer"], torch.full((3,), math.sqrt(5)))


def test_masks_apply_to_their_own_tokens_and_end_with_their_block():
    text, image, cross = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1)
    norms = InputNorms({"text": ([text], "text"), "image": ([image], "vision"), "cross": ([cross], "vision")})
    with norms.collect():
        with norms.valid(text=torch.tensor([[True, False]])):
            text(torch.ones(1, 2, 4))
            image(torch.ones(1, 9, 4))
            cross(torch.ones(1, 2, 4))  # image tokens, as many as there are text tokens: all count
        text(torch.ones(1, 2, 4))
        with norms.valid(vision=torch.tensor([[1, 0, 0]])):
            image(torch.ones(1, 3, 4))
    squares = {name: round(float(norm[0]) ** 2, 4) for name, norm in norms.result().items()}
    assert squares == {"text": 1 + 2, "image": 9 + 1, "cross": 2}


def test_flattened_rows_and_keyword_inputs_and_single_rows():
    module = nn.Linear(3, 1)
    norms = InputNorms({"layer": ([module], "text")})
    with norms.collect():
        with norms.valid(text=torch.tensor([[1, 0], [1, 1]])):
            module(input=torch.ones(4, 3))
        module(torch.ones(3))
        module(torch.ones(2, 1, 1, 3))
    torch.testing.assert_close(norms.result()["layer"], torch.full((3,), math.sqrt(3 + 1 + 2)))


def test_all_uses_of_a_shared_weight_add_up():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.weight = first.weight
    norms = InputNorms({"shared": ([first, second, first], "text")})
    with norms.collect():
        first(torch.full((1, 1, 3), 2.0))
        first(torch.full((1, 1, 3), 2.0))
        second(torch.full((1, 1, 3), 1.0))
    torch.testing.assert_close(norms.result()["shared"], torch.full((3,), 3.0))


def test_collects_inside_the_block_only_and_adds_up_over_blocks():
    module = nn.Linear(2, 2)
    norms = InputNorms({"layer": ([module], "text")})
    module(torch.ones(1, 2))
    with norms.collect():
        module(torch.ones(1, 2))
    module(torch.ones(1, 2))
    with norms.collect():
        module(torch.ones(3, 2))
    assert not module._forward_pre_hooks
    torch.testing.assert_close(norms.result()["layer"], torch.full((2,), 2.0))


def test_hooks_and_switches_are_gone_after_an_error():
    module = nn.Linear(2, 2)
    norms = InputNorms({"layer": ([module], "text")})
    with pytest.raises(ZeroDivisionError), norms.collect():
        raise ZeroDivisionError
    assert not module._forward_pre_hooks and torch.is_grad_enabled()


def test_no_activation_is_kept():
    import gc
    import weakref

    module = nn.Linear(2, 2)
    norms = InputNorms({"layer": ([module], "text")})
    with norms.collect():
        x = torch.ones(4, 5, 2)
        watched = weakref.ref(x)
        output = module(x)
        assert not output.requires_grad
        del x, output
        gc.collect()
        assert watched() is None


def switches() -> list[object]:
    to = torch.backends
    if hasattr(to.cuda.matmul, "fp32_precision"):
        return [to.cuda.matmul.fp32_precision, to.cudnn.conv.fp32_precision, to.mkldnn.matmul.fp32_precision]
    return [to.cuda.matmul.allow_tf32, to.cudnn.allow_tf32]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_precision_inside_and_the_old_switches_after(precision):
    before_all = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        before = switches()
        with InputNorms({"layer": ([nn.Linear(2, 2)], "text")}).collect():
            assert set(switches()) <= {"ieee", False}
        assert switches() == before
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 is (precision != "highest")
    finally:
        torch.set_float32_matmul_precision(before_all)


def test_autocast_is_off_inside():
    module = nn.Linear(64, 64)
    norms = InputNorms({"layer": ([module], "text")})
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with norms.collect():
            assert module(x).dtype == torch.float32
        assert module(x).dtype == torch.bfloat16


def test_reduced_precision_is_refused():
    module = nn.Linear(2, 2).bfloat16()
    norms = InputNorms({"half": ([module], "text")})
    with pytest.raises(RequestError, match="'half' got torch.bfloat16 inputs"), norms.collect():
        module(torch.ones(1, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("x", "mask"), [((2, 3, 2), (2, 4)), ((3, 2, 2), (2, 3)), ((5, 2), (2, 3)), ((2, 1, 2), (2, 3))]
)
def test_a_mask_of_another_shape_is_refused(x, mask):
    module = nn.Linear(2, 2)
    norms = InputNorms({"layer": ([module], "text")})
    with (
        pytest.raises(RequestError, match="'layer' got inputs .* the text mask is"),
        norms.collect(),
        norms.valid(text=torch.ones(mask)),
    ):
        module(torch.ones(x))


def test_a_layer_that_never_ran_is_named():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    norms = InputNorms({"runs": ([a], "text"), "never runs": ([b], "text")})
    with norms.collect():
        a(torch.ones(1, 2))
    with pytest.raises(RequestError, match="'never runs' never ran"):
        norms.result()


def test_broken_inputs_are_named():
    module = nn.Linear(2, 2)
    norms = InputNorms({"layer": ([module], "vision")})
    with norms.collect():
        module(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(RequestError, match="'layer': its inputs held NaN or infinity"):
        norms.result()


def test_wrong_layers_are_refused():
    for layers in (
        {"x": ([], "text")},
        {"x": ([nn.Linear(2, 2), nn.Linear(3, 2)], "text")},
        {"x": ([nn.Linear(2, 2)], "a")},
    ):
        with pytest.raises(RequestError, match="'x'"):
            InputNorms(layers)


NORMS = {"b.fc": torch.tensor([1.0, 0.0, 2.5]), "a.fc": torch.tensor([3.0])}


def test_file_round_trip(tmp_path):
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, NORMS, {"samples": 32, "source": "scènes"})
    norms, metadata = load_statistics(path, {"b.fc": 3, "a.fc": 1})
    assert metadata == {"samples": 32, "source": "scènes"}
    assert list(norms) == list(NORMS) and all(torch.equal(norms[name], NORMS[name]) for name in NORMS)
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.safetensors"]


@pytest.mark.parametrize("expected", [{"b.fc": 3}, {"b.fc": 3, "a.fc": 2}, {"b.fc": 3, "a.fc": 1, "c.fc": 1}, {}])
def test_file_of_another_model(tmp_path, expected):
    path = tmp_path / "s.safetensors"
    save_statistics(path, NORMS, {})
    with pytest.raises(RequestError, match="belongs to another model: layer"):
        load_statistics(path, expected)


def raw(path, header, tensors, kind="vlprune-statistics-1"):
    save_file(tensors, path, {"kind": kind, "header": header if isinstance(header, str) else json.dumps(header)})


one = {"input_norm/x": torch.ones(2)}


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"widths": {"x": 3}, "metadata": {}}, one, "is F32 \\[2\\], expected F32 \\[3\\]"),
        ({"widths": {"x": 2, "y": 2}, "metadata": {}}, one, "has no tensor 'input_norm/y'"),
        ({"widths": {"x": -2}, "metadata": {}}, one, "claims the width -2"),
        ({"widths": {"x": 2.0}, "metadata": {}}, one, "claims the width 2.0"),
        ({"widths": {"x": True}, "metadata": {}}, one, "claims the width True"),
        ({"widths": {"x": 10**18}, "metadata": {}}, one, "expected F32 \\[1000000000000000000\\]"),
        ({"widths": [2], "metadata": {}}, one, "lacks widths"),
        ({"widths": {"x": 2}}, one, "lacks widths or metadata"),
        ({"widths": {"x": 2}, "metadata": {}}, {"input_norm/x": torch.ones(2).double()}, "is F64"),
        ({"widths": {"x": 2}, "metadata": {}}, {"input_norm/x": torch.ones(1, 2)}, "is F32 \\[1, 2\\]"),
        ({"widths": {"x": 2}, "metadata": {}}, {"input_norm/x": torch.tensor([1, -1.0])}, "negative, NaN"),
        ({"widths": {"x": 2}, "metadata": {}}, {"input_norm/x": torch.tensor([1, np.nan])}, "negative, NaN"),
        ('{"widths": {"x": 2}, "metadata": {"a": NaN}}', one, "NaN is not JSON"),
    ],
)
def test_files_that_lie(tmp_path, header, tensors, message):
    raw(tmp_path / "s.safetensors", header, tensors)
    with pytest.raises(RequestError, match=message) as error:
        load_statistics(tmp_path / "s.safetensors")
    assert "\n" not in str(error.value)


def test_layers_that_read_one_input_share_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, other = (nn.Linear(4, 4, bias=False) for _ in range(3))
    counted = []
    sums = statistics._column_squares
    monkeypatch.setattr(statistics, "_column_squares", lambda rows: counted.append(1) or sums(rows))
    norms = InputNorms({"query": ([query], "text"), "key": ([key], "text"), "other": ([other], "text")})
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with norms.collect():
        query(x), key(x), key(x)
        with norms.valid(text=mask):
            query(x)  # another mask: other sums
        x.mul_(2)
        other(x)  # the same tensor, changed
        with torch.inference_mode():
            key(torch.ones(1, 1, 4))
    assert len(counted) == 4
    found, before = norms.result(), (x / 2).double()
    whole, valid = (before**2).sum((0, 1)), (before**2 * mask[..., None]).sum((0, 1))
    torch.testing.assert_close(found["query"], (whole + valid).sqrt().float())
    torch.testing.assert_close(found["key"], (2 * whole + 1).sqrt().float())
    torch.testing.assert_close(found["other"], (4 * whole).sqrt().float())
