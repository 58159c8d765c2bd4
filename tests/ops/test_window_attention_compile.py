"""Window attention under what traces, recomputes or casts: opcheck, torch.compile, export, checkpoints, autocast."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from helpers import LAYOUTS, Case, make_inputs
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vitfast
from vitfast.functional import window_attention, window_attention_qkvpacked

CASES = [
    Case(size=(6, 5), window=(3, 4), shift=(1, 2), heads=2, dim=4),
    Case(size=(6, 5), window=(3, 4), shift=(1, 2), heads=2, dim=4, bias="shared", packed=True),
    Case(size=(4, 4), window=(2, 2), heads=2, dim=4, bias=None),
    Case(size=(4, 4), window=(2, 2), heads=2, dim=4, bias=None, packed=True),
    Case(size=(4, 8), window=(2, 4), shift=(0, 2), heads=2, dim=4, ratio=(2, 2), bias="shared"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch._dynamo.reset()


def tensors_of(case, dtype=torch.float64, seed=0):
    *tensors, bias, _ = make_inputs(case, dtype, seed)
    if case.packed:
        tensors = [torch.stack(tensors, dim=3)]
    return tuple(tensors) if bias is None else (*tensors, bias)


def leaves(tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


def function_of(case):
    return functools.partial(window_attention_qkvpacked if case.packed else window_attention, **case.options)


def output_and_gradients(function, tensors):
    tensors = leaves(tensors)
    output = function(*tensors)
    return output.detach(), torch.autograd.grad(output.sin().sum(), tensors)


# ---- the registered operators --------------------------------------------------------------------------------------


def operator_arguments(case, dtype=torch.float32, requires_grad=False):
    """(forward operator, its arguments, backward operator, its arguments)."""
    *tensors, bias, grad_out = make_inputs(case, dtype)
    if case.packed:
        tensors = [torch.stack(tensors, dim=3)]
    if requires_grad:
        tensors, bias = leaves(tensors), (None if bias is None else bias.requires_grad_())
    options = (list(case.window), list(case.shift), case.reference_options["scale"])
    name = "window_attention_qkvpacked" if case.packed else "window_attention"
    forward = getattr(torch.ops.vitfast, name).default
    backward = getattr(torch.ops.vitfast, f"{name}_backward").default
    arguments = (*tensors, bias, *options, True)
    with torch.no_grad():
        lse = forward(*arguments)[1]
    return forward, arguments, backward, (grad_out, *tensors, bias, lse, *options)


@cases
def test_opcheck(case):
    forward, arguments, backward, backward_arguments = operator_arguments(case)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(backward, backward_arguments)


@pytest.mark.parametrize(
    "case",
    # tracing the double backward with symbolic shapes takes long where there is a bias
    [case if case.bias is None else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_opcheck_with_gradients(case):
    forward, arguments, backward, backward_arguments = operator_arguments(case, requires_grad=True)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(backward, backward_arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_opcheck_of_fakes_in_other_dtypes(dtype):
    case = CASES[0]
    forward, arguments, backward, backward_arguments = operator_arguments(case.but(bias=None), dtype)
    for operator, args in ((forward, arguments), (backward, backward_arguments)):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_strides_of_the_kernels(layout):
    forward, arguments, backward, backward_arguments = operator_arguments(CASES[0])
    relaid = [LAYOUTS[layout](t) if isinstance(t, torch.Tensor) and t.dim() == 5 else t for t in arguments]
    relaid_backward = [
        LAYOUTS[layout](t) if isinstance(t, torch.Tensor) and t.dim() == 5 else t for t in backward_arguments
    ]
    for operator, args in ((forward, relaid), (backward, relaid_backward)):
        torch.library.opcheck(operator, tuple(args), test_utils=("test_faketensor",))


def test_fake_without_statistics():
    forward, arguments, _, _ = operator_arguments(CASES[0])
    torch.library.opcheck(forward, (*arguments[:-1], False), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors_have_shapes_only(dtype):
    query = torch.empty(2, 6, 5, 2, 4, device="meta", dtype=dtype)
    output = window_attention(query, query, query, window_size=3, shift=1)
    assert output.device.type == "meta"
    assert (output.shape, output.dtype) == (query.shape, dtype)


# ---- torch.compile and torch.export --------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_break(case, dynamic):
    function = function_of(case)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for changed in (case, case.but(batch=3)):
        tensors = tensors_of(changed)
        assert_close(output_and_gradients(compiled, tensors), output_and_gradients(function, tensors), rtol=0, atol=0)


@cases
def test_compile_calls_the_kernels(case):
    graphs = []

    def record(module, _):
        graphs.append(module)
        return module

    compiled = torch.compile(function_of(case), backend=record, fullgraph=True)
    compiled(*tensors_of(case))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    name = "window_attention_qkvpacked" if case.packed else "window_attention"
    assert f"vitfast.{name}.default" in called


def test_compile_for_changing_map_sizes():
    function = functools.partial(window_attention, window_size=3, shift=1)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for height, width in ((6, 6), (7, 5), (9, 4)):
        tensors = tuple(torch.randn(2, height, width, 2, 4, dtype=torch.float64) for _ in range(3))
        assert_close(output_and_gradients(compiled, tensors), output_and_gradients(function, tensors), rtol=0, atol=0)


def test_compile_with_a_scale_from_the_shape():
    def function(query, key, value):
        return window_attention(query, key, value, window_size=3, scale=query.shape[-1] ** -0.5)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for dim in (4, 6):
        tensors = tuple(torch.randn(1, 3, 3, 2, dim, dtype=torch.float64) for _ in range(3))
        assert_close(output_and_gradients(compiled, tensors), output_and_gradients(function, tensors))


@pytest.mark.slow
@cases
def test_compile_with_inductor(case):
    function = function_of(case)
    compiled = torch.compile(lambda *tensors: function(*tensors).mul(2).relu(), fullgraph=True)
    expected = output_and_gradients(lambda *tensors: function(*tensors).mul(2).relu(), tensors_of(case))
    assert_close(output_and_gradients(compiled, tensors_of(case)), expected)


class Block(torch.nn.Module):
    """A projection, a learned bias and channels-first maps around the operator, as models have it."""

    def __init__(self, channels=8, heads=2, window=3, shift=1):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = torch.nn.Linear(channels, 3 * channels)
        self.bias = torch.nn.Parameter(torch.randn(heads, window**2, window**2))

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        qkv = self.qkv(x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.heads, -1))
        out = window_attention_qkvpacked(qkv, self.bias, window_size=self.window, shift=self.shift)
        return out.flatten(3).permute(0, 3, 1, 2)


@pytest.fixture
def block():
    return Block()


@pytest.fixture
def image():
    return torch.randn(2, 8, 5, 6)


def gradients(module, run):
    module.zero_grad()
    run().square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_compiled_module_trains_like_the_module(block, image):
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = gradients(block, lambda: block(image))
    assert_close(gradients(block, lambda: compiled(image)), expected)


def test_compiled_function_heeds_the_backend():
    """A change of the backend compiles again."""
    case = CASES[0]
    compiled = torch.compile(function_of(case), backend="aot_eager", fullgraph=True)
    expected = compiled(*tensors_of(case))
    with vitfast.backend("reference"):
        assert_close(compiled(*tensors_of(case)), expected)
    with vitfast.backend("cuda"), pytest.raises(Exception, match="no cuda kernel"):
        compiled(*tensors_of(case))


@pytest.mark.parametrize("strict", [False, True])
def test_export(block, image, strict):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (image,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "vitfast.window_attention_qkvpacked.default" in targets
    for batch in (2, 5):
        x = torch.randn(batch, *image.shape[1:])
        assert_close(program.module()(x), block(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(image), block(image))


@cases
def test_double_backward_of_a_compiled_function_raises(case):
    """torch.compile has none, whatever is compiled; it must not be zero in silence."""
    compiled = torch.compile(function_of(case), backend="aot_eager", fullgraph=True)
    tensors = leaves(tensors_of(case))
    scalar = compiled(*tensors).sin().sum()
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        torch.autograd.grad(torch.autograd.grad(scalar, tensors, create_graph=True)[0].sum(), tensors)


@cases
def test_compiled_hessian_vector_products(case):
    """make_fx, then torch.compile: the way that needs no support for transforms in Dynamo."""
    function = function_of(case)
    primals = tensors_of(case)
    vectors = tuple(torch.randn(3, *t.shape, dtype=t.dtype) for t in primals)

    def products(primals, vectors):
        gradient = grad(lambda *tensors: function(*tensors).sin().sum(), tuple(range(len(primals))))
        return vmap(lambda *v: jvp(gradient, primals, v)[1])(*vectors)

    traced = make_fx(products)(primals, vectors)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    assert_close(compiled(primals, vectors), products(primals, vectors))


@cases
@pytest.mark.parametrize("transform", ["jvp", "vmap", "jvp_of_grad"])
def test_transforms_inside_compile(case, transform):
    function = function_of(case)
    primals, tangents = tensors_of(case), tensors_of(case, seed=1)
    gradient = grad(lambda *tensors: function(*tensors).sin().sum(), tuple(range(len(primals))))
    run = {
        "jvp": lambda: jvp(function, primals, tangents),
        "vmap": lambda: vmap(function)(*(torch.stack([p, t]) for p, t in zip(primals, tangents, strict=True))),
        "jvp_of_grad": lambda: jvp(gradient, primals, tangents),
    }[transform]
    assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(), run())


@cases
def test_grad_inside_compile_raises(case):
    """A registered operator has no rule for torch.func.grad; make_fx, as above, is the way."""
    function = function_of(case)
    compiled = torch.compile(lambda *t: grad(lambda *u: function(*u).sum())(*t), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(*tensors_of(case))


# ---- recomputation, casts, copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(block, image, use_reentrant):
    image.requires_grad_()
    expected = gradients(block, lambda: block(image))
    again = gradients(block, lambda: checkpoint(block, image, use_reentrant=use_reentrant))
    assert_close(again, expected, rtol=0, atol=0)


def test_activation_checkpointing_inside_compile(block, image):
    expected = gradients(block, lambda: block(image))
    compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_close(gradients(block, lambda: compiled(image)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(block, image, dtype):
    """The projection runs in lower precision, the learned bias stays float32 and gets a float32 gradient."""

    def step():
        with torch.autocast("cpu", dtype=dtype):
            output = block(image)
        assert output.dtype == dtype
        return output.float()

    ours = gradients(block, step)
    with vitfast.backend("reference"):
        plain = gradients(block, step)
    exact = gradients(block, lambda: block(image))
    assert {g.dtype for g in ours.values()} == {torch.float32}
    for name, truth in exact.items():
        error, plain_error = ((g - truth).square().mean().sqrt() for g in (ours[name], plain[name]))
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * truth.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", ["same", "float32"])
def test_gradient_of_the_bias_has_its_dtype(dtype, bias_dtype):
    x = torch.randn(1, 4, 4, 2, 4, dtype=dtype)
    bias = torch.randn(2, 4, 4, dtype=dtype if bias_dtype == "same" else torch.float32).requires_grad_()
    window_attention(x, x, x, bias, window_size=2).sum().backward()
    assert bias.grad.dtype == bias.dtype


def test_channels_last_image(block, image):
    assert_close(block(image.to(memory_format=torch.channels_last)), block(image))


def test_deepcopy_of_a_module_computes_the_same(block, image):
    assert_close(copy.deepcopy(block)(image), block(image), rtol=0, atol=0)


def test_ensemble_of_modules(block, image):
    """torch.func.stack_module_state: one vmap over parameters, the learned bias among them."""
    blocks = [Block().double() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(blocks)
    image = image.double()

    def run(p, b):
        return torch.func.functional_call(blocks[0], (p, b), (image,))

    assert_close(vmap(run)(parameters, buffers), torch.stack([b(image) for b in blocks]))


def test_batched_cotangents_of_autograd_grad():
    """is_grads_batched: the older vmap, used by torch.autograd.functional."""
    case = CASES[0]
    tensors = leaves(tensors_of(case))
    output = function_of(case)(*tensors)
    cotangents = torch.randn(3, *output.shape, dtype=output.dtype)
    batched = torch.autograd.grad(output, tensors, cotangents, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(output, tensors, c, retain_graph=True) for c in cotangents]
    assert_close(batched, tuple(torch.stack(gs) for gs in zip(*single, strict=True)))
