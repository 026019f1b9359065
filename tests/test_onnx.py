"""torch.onnx.export of layers and networks as they are, and onnxruntime against PyTorch."""

import warnings

import pytest
import torch
from torch import nn

from autofocus_kernels import AutofocusConv1d, AutofocusConv2d, AutofocusConv3d, decompositions, networks

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

AXES = ("batch", None, "depth", "height", "width")


def export(model, shape, dynamic=True, **arguments):
    """The ONNX program of a module; with ``shape=None`` of what torch.export made of it."""
    dynamic_shapes = None
    if dynamic and shape is not None:
        dynamic_shapes = {"input": {i: AXES[i] for i in range(len(shape)) if AXES[i]}, **dict.fromkeys(arguments)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        return torch.onnx.export(
            model,
            () if shape is None else (torch.randn(shape),),
            kwargs=arguments,
            input_names=["input"],
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )


def session(program):
    assert {node.domain for node in program.model_proto.graph.node} <= {"", "ai.onnx"}
    model = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def assert_equal_outputs(session, model, shape, **arguments):
    input = torch.randn(shape)
    outputs = session.run(None, {"input": input.numpy()})
    with torch.no_grad():
        expected = model(input, **arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), wanted)


def away_from_initial_values(model):
    """Statistics, scales and biases that a wrong export would not get right by chance."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 2, 3)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize(
    "Layer, settings, arguments",
    [
        (AutofocusConv1d, {"stride": 2, "padding": 1}, {}),
        (AutofocusConv2d, {"padding": "valid"}, {"return_attention": True}),
        (AutofocusConv3d, {"branch_norm": True}, {}),
    ],
)
def test_a_layer_with_dynamic_batch_and_volume(Layer, settings, arguments):
    torch.manual_seed(0)
    layer = away_from_initial_values(Layer(2, 3, dilations=(1, 3), **settings)).eval()
    size = (9, 8, 7)[: layer.spatial_dims]
    program = export(layer, (2, 2, *size), **arguments)
    operators = [node.op_type for node in program.model_proto.graph.node]
    assert operators.count("Conv") == 2 + 2  # the branches and the gate
    runtime = session(program)
    for shape in ((2, 2, *size), (1, 2, *(length + 3 for length in size)), (3, 2, *(length - 2 for length in size))):
        assert_equal_outputs(runtime, layer, shape, **arguments)


def test_a_network_with_dynamic_batch_and_length():
    torch.manual_seed(1)
    options = {"spatial_dims": 1, "widths": (4, 5, 6, 7), "dilations": (1, 2), "padding": "same"}
    model = away_from_initial_values(networks.build("AFN-1", 2, 3, **options)).eval()
    runtime = session(export(model, (2, 2, 24)))
    assert_equal_outputs(runtime, model, (1, 2, 31))


def test_branch_norm_by_batch_statistics():
    """A layer that is exported while it trains normalises by the batch in the runtime, too."""
    torch.manual_seed(3)
    layer = AutofocusConv2d(2, 3, dilations=(1, 2), branch_norm=True).train()
    assert_equal_outputs(session(export(layer, (2, 2, 6, 7), dynamic=False)), layer, (2, 2, 6, 7))


def test_an_exported_program_through_decompositions():
    torch.manual_seed(4)
    layer, shape = AutofocusConv2d(2, 3, dilations=(1, 2)).eval(), (1, 2, 6, 7)
    program = torch.export.export(layer, (torch.randn(shape),)).run_decompositions(decompositions())
    assert_equal_outputs(session(export(program, None)), layer, shape)
