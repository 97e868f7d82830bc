"""The streamed forward pass against the full model's own, seen through hooks."""

import pytest
import torch
from tiny_models import (
    ARCHITECTURE_CASES,
    CASES,
    SIZES,
    all_specs_of,
    at_tokens,
    batches,
    config_of,
    layers_of,
    placement_of,
    random_model,
    relative_error,
    specs_of,
    tiny_model,
)

from grail_hf.calibration.calls import _Shared, held_out_tokens, record_calls
from grail_hf.calibration.stream import Stream
from grail_hf.models.capture import takes_tuples

CPU = torch.device("cpu")

every_case = pytest.mark.parametrize("case", CASES)
every_padding = pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
every_kernel = pytest.mark.parametrize("kernel", ["sdpa", "eager"])


def blocks_of(model, inputs):
    return Stream(model, placement_of(model), all_specs_of(model), inputs, progress=False).blocks()


def hidden_of(block, inputs):
    return at_tokens([batch.hidden for batch in block.batches], inputs)


@torch.no_grad()
def seen_by_hooks(model, modules, inputs):
    """What a full forward pass puts into and gets out of the modules: two lists of [tokens, H]."""
    seen = {module: ([], []) for module in modules}

    def look(module, args, kwargs, output):
        seen[module][0].append(args[0] if args else kwargs["hidden_states"])
        seen[module][1].append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in modules]
    for batch in inputs:
        model(**batch)
    for handle in handles:
        handle.remove()
    return [[at_tokens(sides[way], inputs) for sides in seen.values()] for way in (0, 1)]


@every_case
@every_padding
@every_kernel
def test_hidden_states_are_the_full_models_own(case, padded, kernel):
    model, inputs = tiny_model(case, kernel), batches(padded)
    fronts, backs = seen_by_hooks(model, layers_of(model), inputs)
    for block in blocks_of(model, inputs):
        assert torch.equal(hidden_of(block, inputs), fronts[block.index])
    assert block.index == len(fronts) - 1
    block.advance()
    assert torch.equal(hidden_of(block, inputs), backs[-1])


@every_case
@every_padding
@every_kernel
def test_grams_are_those_of_the_full_models_consumer_inputs(case, padded, kernel):
    model, inputs = tiny_model(case, kernel), batches(padded)
    consumers = [
        layer.get_submodule(spec.consumer) for layer in layers_of(model) for spec in specs_of(model)
    ]
    expected = iter(seen_by_hooks(model, consumers, inputs)[0])
    for block in blocks_of(model, inputs):
        for group in block.groups:
            x = next(expected).double()
            stats = block.collect(group)
            assert stats.count == len(x)
            assert relative_error(stats.gram.double(), x.T @ x) < 1e-6
            assert relative_error(stats.total.double(), x.sum(dim=0)) < 1e-5
            assert not group.consumer._forward_pre_hooks
    assert next(expected, None) is None


@pytest.mark.parametrize("case", ["llama", "gpt2", "gptj", "bloom", "falcon"])
@pytest.mark.parametrize("number", [1, 3])
@torch.no_grad()
def test_a_model_is_given_hidden_states_as_its_layers_return_them(case, number):
    """In a tuple or not, whatever the version of transformers, and without a layer's weights."""
    values = {"model_type": case} | SIZES | ARCHITECTURE_CASES[case]
    model = random_model(config_of(values | {"num_hidden_layers": number}))
    returned = []
    handles = [
        layer.register_forward_hook(lambda *call: returned.append(call[-1]))
        for layer in layers_of(model)
    ]
    model(**batches()[0])
    for handle in handles:
        handle.remove()
    layers_of(model).to("meta")
    assert len(returned) == number
    assert takes_tuples(model, layers_of(model)) == isinstance(returned[0], tuple)
    assert all("forward" not in vars(layer) for layer in layers_of(model))


@every_case
def test_a_layer_sees_what_the_layers_before_it_have_become(case):
    model, inputs = tiny_model(case), batches()
    fronts = []
    for block in blocks_of(model, inputs):
        fronts.append(hidden_of(block, inputs))
        for group in block.groups:
            group.consumer.weight.data *= -0.5
    changed, _ = seen_by_hooks(model, layers_of(model), inputs)
    for streamed, expected in zip(fronts, changed, strict=True):
        assert torch.equal(streamed, expected)


@torch.no_grad()
def test_replaying_the_first_layers_arguments_would_be_wrong_where_layers_differ():
    model, inputs = tiny_model("qwen2-mixed"), batches()
    layers = layers_of(model)
    *_, expected = seen_by_hooks(model, layers, inputs)[1]
    replayed = {}
    for name, call_of in (("own", lambda index: index), ("first", lambda index: 0)):
        recorded = record_calls(model, layers, inputs)
        for batch in recorded:
            for index, layer in enumerate(layers):
                args, kwargs = batch.calls[call_of(index)]
                batch.hidden = layer(batch.hidden, *args, **kwargs)
        replayed[name] = at_tokens([batch.hidden for batch in recorded], inputs)
    assert torch.equal(replayed["own"], expected)
    assert relative_error(replayed["first"], expected) > 0.1


def test_every_group_has_a_name_and_a_seed_of_its_own():
    model, inputs = tiny_model("llama"), batches()
    specs = all_specs_of(model)
    groups = [
        group
        for seed in (0, 1)
        for block in Stream(
            model, placement_of(model), specs, inputs, seed=seed, progress=False
        ).blocks()
        for group in block.groups
    ]
    assert len({group.seed for group in groups}) == len(groups) == 2 * 3 * 2
    expected = [f"model.layers.{i}.{block}" for i in range(3) for block in ("self_attn", "mlp")]
    assert [group.name for group in groups] == 2 * expected


@pytest.mark.parametrize("fails", [False, True], ids=["after a pass", "after an exception"])
def test_layers_get_their_forward_back(fails):
    model, inputs = tiny_model("llama"), batches()
    layers = layers_of(model)

    def hooked(*args, **kwargs):  # accelerate's hooks set the instance's forward like this
        raise AssertionError("the recorder must stand in for this")

    layers[1].forward = hooked
    if fails:
        inputs[1]["input_ids"] = inputs[1]["input_ids"] + 1000
        with pytest.raises(IndexError):
            record_calls(model, layers, inputs)
    else:
        record_calls(model, layers, inputs)
    assert [vars(layer).get("forward") for layer in layers] == [None, hooked, None]


@every_padding
def test_equal_masks_and_rotary_tables_are_stored_once(padded):
    model, inputs = tiny_model("qwen2-mixed", "eager"), batches(padded)
    recorded = record_calls(model, layers_of(model), [inputs[0], inputs[0]])
    tensors = {}
    for batch in recorded:
        for args, kwargs in batch.calls:
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, torch.Tensor):
                        tensors[id(tensor)] = tensor
    distinct = list(tensors.values())
    assert len(distinct) >= 4  # a full and a sliding mask, cos and sin
    for i, one in enumerate(distinct):
        for other in distinct[:i]:
            assert one.dtype != other.dtype or not torch.equal(one, other)


def test_tensors_that_differ_in_value_shape_or_dtype_are_stored_apart():
    shared = _Shared()
    zeros = torch.zeros(2, 3)
    assert shared.store({"a": (zeros,)})["a"][0] is zeros
    assert shared.store((zeros.clone(),))[0] is zeros
    for other in (torch.ones(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int64)):
        assert shared.store((other,))[0] is other


@pytest.mark.parametrize("target", ["dense", "residual"])
@pytest.mark.parametrize("case", ["llama", "qwen2-mixed"])
def test_targets_lead_back_to_the_dense_model(case, target):
    """Y^T X and ||Y||^2 against hooks on a dense model and on one whose first layer is pruned."""
    model, dense = tiny_model(case), tiny_model(case)
    specs, inputs = specs_of(model), batches()
    found = {}
    options = {"target": target, "progress": False}
    for block in Stream(
        model, placement_of(model), all_specs_of(model), inputs, **options
    ).blocks():
        for group in block.groups:
            found[block.index, group.kind] = block.collect(group)
            if block.index == 0:  # from here on the two paths differ
                group.consumer.weight.data[:, ::3] = 0

    for index in range(2):
        for spec in specs:
            x, y = [], []
            for batch in inputs:
                mask = batch["attention_mask"].bool() if "attention_mask" in batch else ...
                state = [consumer_states(m, index, spec, batch) for m in (dense, model)]
                (_, output, residual), (own, _, compressed) = state
                goal = output if target == "dense" else output + residual - compressed
                x.append(own[mask].flatten(0, -2))
                y.append(goal[mask].flatten(0, -2))
            x, y = torch.cat(x), torch.cat(y)
            stats = found[index, spec.kind]
            if index == 0 and spec is specs[0]:
                continue  # its consumer was still whole when its moments were taken
            torch.testing.assert_close(stats.cross.float(), y.T @ x, rtol=1e-4, atol=1e-3)
            assert stats.target_energy == pytest.approx(y.square().sum().item(), rel=1e-4)


def consumer_states(model, index, spec, batch):
    """The consumer's input and output, and the residual stream that the output is added to."""
    layer = layers_of(model)[index]
    seen = {}
    before_mlp = layer.post_attention_layernorm
    handles = [
        layer.get_submodule(spec.consumer).register_forward_hook(
            lambda _, inputs, output: seen.update(input=inputs[0], output=output)
        ),
        layer.register_forward_pre_hook(lambda _, inputs: seen.update(attention=inputs[0])),
        before_mlp.register_forward_pre_hook(lambda _, inputs: seen.update(mlp=inputs[0])),
    ]
    with torch.no_grad():
        model.base_model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen["input"], seen["output"], seen[spec.kind]


@pytest.mark.parametrize(
    ("samples", "held"),
    [(2, [1]), (3, [2]), (4, [3]), (7, [6]), (8, [3, 7]), (11, [5, 10]), (13, [4, 8, 12])],
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_quarter_of_the_samples_is_held_out_whatever_the_batch_size(samples, held, batch_size):
    ids = torch.zeros(samples, 5, dtype=torch.int64)
    masks = held_out_tokens([{"input_ids": rows} for rows in ids.split(batch_size)])
    rows = torch.cat([mask.reshape(-1, 5) for mask in masks])
    assert (rows.any(dim=1) == rows.all(dim=1)).all()
    assert rows.all(dim=1).nonzero().flatten().tolist() == held


@pytest.mark.parametrize(("tokens", "held"), [(1, 0), (3, 0), (4, 1), (11, 2), (12, 3)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_single_sample_the_last_quarter_is_held_out(tokens, held, side):
    mask = torch.zeros(1, 12, dtype=torch.int64)
    own = slice(12 - tokens, 12) if side == "left" else slice(0, tokens)
    mask[:, own] = 1
    (found,) = held_out_tokens([{"input_ids": mask, "attention_mask": mask}])
    assert found[own].tolist() == [False] * (tokens - held) + [True] * held
    assert found.sum() == held


@every_padding
@pytest.mark.parametrize("target", ["self", "residual"])
def test_the_held_out_moments_are_those_of_the_held_out_samples_alone(padded, target):
    """The same samples streamed by themselves."""
    model, inputs = tiny_model("qwen2"), batches(padded)
    held = [
        {key: rows[mask.reshape(rows.shape).any(dim=1)] for key, rows in batch.items()}
        for batch, mask in zip(inputs, held_out_tokens(inputs), strict=True)
    ]
    options = {"target": target, "progress": False}
    placement, specs = placement_of(model), all_specs_of(model)
    for blocks in zip(
        *(Stream(model, placement, specs, b, **options).blocks() for b in (inputs, held)),
        strict=True,
    ):
        for group, same in zip(*(block.groups for block in blocks), strict=True):
            stats, alone = blocks[0].collect(group, hold_out=True), blocks[1].collect(same)
            assert stats.held_out.count == alone.count < stats.count
            assert relative_error(stats.held_out.gram, alone.gram) < 1e-5
            if target != "self":
                assert relative_error(stats.held_out.cross, alone.cross) < 1e-5
            whole = blocks[0].collect(group)
            assert whole.held_out is None
            assert relative_error(whole.gram, stats.gram) < 1e-6
