"""Eight-bit weights of torchao, before and after an injection."""

import copy

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from temporal_layers.adapters import inject

REFUSAL = r"\.weight: expected a plain tensor, got a .*; save the adapter before its layers are quantised"


@pytest.mark.filterwarnings("ignore")  # torchao's own, of several kinds by version
@pytest.mark.parametrize("order", ["quantised first", "injection first"])
def test_the_result_is_that_of_the_rounded_weights(make_unet, randomise, tmp_path, order):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = make_unet()
    exact = copy.deepcopy(model)
    weights = randomise(inject(exact)).state_dict()
    if order == "quantised first":
        quantize_(model, Int8WeightOnlyConfig())
        adapter = inject(model)
        model.load_state_dict(weights, strict=False)
    else:
        adapter = inject(model)
        model.load_state_dict(weights, strict=False)
        quantize_(model, Int8WeightOnlyConfig())
    rounded = {name: value for name, value in model.named_parameters() if type(value) is not torch.nn.Parameter}
    assert any(".temporal." in name for name in rounded) == (order == "injection first")
    assert any(".temporal." not in name for name in rounded)
    clips, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        for name, value in rounded.items():
            exact.get_parameter(name).copy_(value.dequantize())
        result = model(clips, 7, text).sample
        torch.testing.assert_close(result, exact(clips, 7, text).sample, rtol=1e-4, atol=1e-5)
    if order == "quantised first":  # the adapter itself is not rounded
        assert all(torch.equal(value, weights[key]) for key, value in adapter.state_dict().items())
        adapter.save_pretrained(tmp_path)
    else:
        with pytest.raises(ValueError, match=REFUSAL):
            adapter.save_pretrained(tmp_path)


def test_weights_of_a_tensor_subclass_are_not_saved(make_unet, tmp_path):
    # Without torchao: any other tensor subclass that holds tensors, as its quantised ones do.
    model = make_unet()
    adapter = inject(model)
    projection = model.mid_block.attentions[0].transformer_blocks[0].temporal.attentions[0].to_q
    weight = projection.weight.detach()
    projection.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()))
    with pytest.raises(ValueError, match=REFUSAL):
        adapter.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
