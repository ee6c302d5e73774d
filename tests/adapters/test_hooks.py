"""Hooks of accelerate and diffusers that replace a module's forward, set before and after an injection."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading, apply_layerwise_casting
from diffusers.hooks import ModelHook as DiffusersHook

from temporal_layers.adapters import TemporalAdapter, adapter_of, inject

CPU = torch.device("cpu")


class Count(ModelHook):
    """Counts calls."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class DiffusersCount(DiffusersHook):
    """Counts calls."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def case(make_unet, randomise):
    """A plain model, a clip batch with its text, and the result of a copy with the same layers and no hooks."""
    model, twin = make_unet(), make_unet()
    twin.load_state_dict(model.state_dict())
    clips, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 3, 12)
    weights = randomise(inject(twin)).state_dict()
    expected = twin(clips, 7, text).sample

    def inject_same(model):
        adapter = inject(model)
        model.load_state_dict(weights, strict=False)
        return adapter

    return model, (clips, 7, text), expected, inject_same


def modules(model):
    return [model, *(module for module in model.modules() if type(module).__name__ == "ResnetBlock2D")]


@pytest.mark.parametrize("order", ["hooks first", "injection first"])
@pytest.mark.parametrize("library", ["accelerate", "diffusers", "both"])
def test_active_hooks_run_and_so_do_the_layers(case, library, order):
    model, inputs, expected, inject_same = case
    image = model(inputs[0][:, :, 0], 7, inputs[2]).sample
    hooks = []

    def add_hooks():
        for module in modules(model):
            if library != "accelerate":
                hooks.append(DiffusersCount())
                HookRegistry.check_if_exists_or_initialize(module).register_hook(hooks[-1], "count")
            if library != "diffusers":
                hooks.append(Count())
                add_hook_to_module(module, hooks[-1])

    if order == "hooks first":
        add_hooks()
    adapter = inject_same(model)
    if order == "injection first":
        add_hooks()
    assert torch.equal(model(*inputs).sample, expected)
    assert hooks and all(hook.calls == 1 for hook in hooks)
    for module in modules(model):  # hooks off, the layers stay
        if library != "diffusers":
            remove_hook_from_module(module)
        if library != "accelerate":
            module._diffusers_hook.remove_hook("count", recurse=False)
    assert torch.equal(model(*inputs).sample, expected)
    adapter.remove()
    assert torch.equal(model(inputs[0][:, :, 0], 7, inputs[2]).sample, image)


@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
def test_what_removed_hooks_leave_behind_does_not_hide_the_layers(case, library):
    model, inputs, expected, inject_same = case
    for module in modules(model):
        if library == "accelerate":
            remove_hook_from_module(add_hook_to_module(module, Count()))
        else:
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(DiffusersCount(), "count")
            registry.remove_hook("count")
    assert all("forward" in module.__dict__ for module in modules(model))
    inject_same(model)
    assert torch.equal(model(*inputs).sample, expected)


def test_removal_with_active_hooks(case):
    model, inputs, _, inject_same = case
    image = model(inputs[0][:, :, 0], 7, inputs[2]).sample
    hooks = [Count() for _ in modules(model)]
    adapter = inject_same(model)
    for module, hook in zip(modules(model), hooks, strict=True):
        add_hook_to_module(module, hook)
    adapter.remove()
    assert torch.equal(model(inputs[0][:, :, 0], 7, inputs[2]).sample, image)
    assert all(hook.calls == 1 for hook in hooks)


def test_model_offload(case):
    # What pipelines do in enable_model_cpu_offload().
    model, inputs, expected, inject_same = case
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    inject_same(model)
    assert torch.equal(model(*inputs).sample, expected)
    hook.remove()
    assert torch.equal(model(*inputs).sample, expected)


def test_sequential_offload_after_injection(case, tmp_path):
    # What pipelines do in enable_sequential_cpu_offload(): all weights are on the meta device between calls.
    model, inputs, expected, inject_same = case
    adapter = inject_same(model)
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected a value, got a tensor on the meta device"):
        adapter.save_pretrained(tmp_path)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(adapter.state_dict()["mid_block.resnets.0.temporal.blend.logit"].cpu(),
                       model.mid_block.resnets[0].temporal.blend.logit)  # fmt: skip


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_after_injection(case, kind):
    model, inputs, expected, inject_same = case
    inject_same(model)
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=kind, **groups)
    assert torch.equal(model(*inputs).sample, expected)


@pytest.mark.parametrize("kind", ["sequential", "disk", "leaf_level", "block_level"])
def test_injection_under_offloading_hooks(case, kind, tmp_path):
    # The layers join: their weights come for each call and go again, like those of their hosts.
    model, inputs, expected, inject_same = case
    image = model(inputs[0][:, :, 0], *inputs[1:]).sample
    twin = copy.deepcopy(model)
    inject_same(twin)
    adapter_of(twin).save_pretrained(tmp_path / "adapter")
    if kind == "sequential":
        accelerate.cpu_offload(model, execution_device=CPU)
    elif kind == "disk":
        accelerate.disk_offload(model, tmp_path / "weights", execution_device=CPU)
    else:
        groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=kind, **groups)
    adapter = TemporalAdapter.from_pretrained(model, tmp_path / "adapter")
    temporal = dict(adapter.named_parameters("temporal")) | dict(adapter.named_parameters("alpha"))
    if kind in ("sequential", "disk"):
        assert all(parameter.is_meta for parameter in temporal.values())
    else:
        moved = {id(tensor) for module in model.modules() for tensor in moved_with(module)}
        assert {id(parameter) for parameter in temporal.values()} <= moved
    assert torch.equal(model(*inputs).sample, expected)
    adapter.remove()
    assert torch.equal(model(inputs[0][:, :, 0], *inputs[1:]).sample, image)
    assert torch.equal(inject(model).model(inputs[0][:, :, 0], *inputs[1:]).sample, image)


def moved_with(module):
    """All tensors that diffusers' group offloading brings when ``module`` is called."""
    hook = module._diffusers_hook.get_hook("group_offloading") if hasattr(module, "_diffusers_hook") else None
    if hook is None:
        return []
    inside = [parameter for part in hook.group.modules for parameter in part.parameters()]
    return [*inside, *hook.group.parameters]


def test_offloading_that_new_layers_cannot_join_is_refused(make_unet, fingerprint, tmp_path):
    together, on_disk = make_unet(), make_unet()
    accelerate.cpu_offload(together, execution_device=CPU, preload_module_classes=["ResnetBlock2D"])
    apply_group_offloading(
        on_disk,
        onload_device=CPU,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    cases = {
        together: r"resnets\.0: .* load a module's children",
        on_disk: r"plan: .*: .* group offloading with a stream",
    }
    for model, match in cases.items():
        before = fingerprint(model)
        with pytest.raises(ValueError, match=match + r".*; inject first, then set up offloading"):
            inject(model)
        assert fingerprint(model) == before


@pytest.mark.parametrize("order", ["casting first", "injection first"])
def test_layerwise_casting(case, order):
    # Weights are stored in eight bits and cast for each call; the layers work in the dtype that is computed with.
    model, inputs, expected, inject_same = case
    if order == "injection first":
        adapter = inject_same(model)
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if order == "casting first":
        adapter = inject_same(model)
        assert {parameter.dtype for _, parameter in adapter.named_parameters("temporal")} == {torch.float32}
    assert model.down_blocks[0].resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    result = model(*inputs).sample
    # e4m3 has 3 bits behind the point: half a unit is 1/16 of a weight.
    assert 0 < (result - expected).norm() / expected.norm() < 1 / 4
    assert {parameter.dtype for _, parameter in adapter.named_parameters("alpha")} == {torch.float32}
