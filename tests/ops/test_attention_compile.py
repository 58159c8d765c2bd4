"""Attention under what traces, recomputes or casts: opcheck, torch.compile, export, checkpoints, autocast."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from attention_cases import LAYOUTS, Case, arguments, fused_function, make_inputs, pack
from derivatives import leaves
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vitfast
from vitfast.functional import attention, attention_qkvpacked

CASES = [
    Case(queries=6, keys=5, heads=2, dim=4),
    Case(queries=6, heads=2, dim=4, bias="m", packed=True),
    Case(queries=4, keys=7, heads=2, dim=4, bias=None),
    Case(queries=4, heads=2, dim=4, bias=None, packed=True),
    Case(queries=5, keys=3, heads=2, dim=4, bias="bhnm"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch._dynamo.reset()


def output_and_gradients(function, tensors):
    tensors = leaves(tensors)
    output = function(*tensors)
    return output.detach(), torch.autograd.grad(output.sin().sum(), tensors)


# ---- the registered operators --------------------------------------------------------------------------------------


def operator_calls(case, dtype=torch.float32, requires_grad=False, relay=lambda t: t):
    """(forward operator, its arguments, backward operator, its arguments)."""
    *tensors, bias, grad_out = make_inputs(case, dtype)
    tensors, grad_out = [relay(t) for t in tensors], relay(grad_out)
    if case.packed:
        tensors, grad_out = [pack(*tensors)], grad_out.transpose(1, 2)
    bias = None if bias is None else bias.expand(*bias.shape[:3], case.scores[3])
    bias = None if bias is None or dtype == torch.float64 else bias.float()
    if requires_grad:
        tensors, bias = leaves(tensors), (None if bias is None else bias.detach().requires_grad_())
    scale = case.reference_options["scale"]
    name = "attention_qkvpacked" if case.packed else "attention"
    forward = getattr(torch.ops.vitfast, name).default
    backward = getattr(torch.ops.vitfast, f"{name}_backward").default
    with torch.no_grad():
        out, lse = forward(*tensors, bias, scale, True)
    return forward, (*tensors, bias, scale, True), backward, (grad_out, *tensors, bias, out, lse, scale)


@cases
def test_opcheck(case):
    forward, forward_arguments, backward, backward_arguments = operator_calls(case)
    torch.library.opcheck(forward, forward_arguments)
    torch.library.opcheck(backward, backward_arguments)


@pytest.mark.parametrize(
    "case",
    # tracing the double backward with symbolic shapes takes long where there is a bias
    [case if case.bias is None else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_opcheck_with_gradients(case):
    forward, forward_arguments, backward, backward_arguments = operator_calls(case, requires_grad=True)
    torch.library.opcheck(forward, forward_arguments)
    torch.library.opcheck(backward, backward_arguments)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_opcheck_of_fakes_in_other_dtypes(case, dtype):
    forward, forward_arguments, backward, backward_arguments = operator_calls(case, dtype)
    for operator, args in ((forward, forward_arguments), (backward, backward_arguments)):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_fakes_have_the_strides_of_the_kernels(layout, case):
    forward, forward_arguments, backward, backward_arguments = operator_calls(case, relay=LAYOUTS[layout])
    for operator, args in ((forward, forward_arguments), (backward, backward_arguments)):
        torch.library.opcheck(operator, args, test_utils=("test_faketensor",))


@cases
def test_fake_without_statistics(case):
    forward, forward_arguments, _, _ = operator_calls(case)
    torch.library.opcheck(forward, (*forward_arguments[:-1], False), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors_have_shapes_only(dtype):
    query, key = (torch.empty(2, 3, tokens, 4, device="meta", dtype=dtype) for tokens in (6, 5))
    output = attention(query, key, key)
    assert output.device.type == "meta"
    assert (output.shape, output.dtype) == (query.shape, dtype)


# ---- torch.compile and torch.export --------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_break(case, dynamic):
    function = fused_function(case)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for changed in (case, case.but(batch=3)):
        tensors = arguments(changed)
        assert_close(output_and_gradients(compiled, tensors), output_and_gradients(function, tensors), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.4}], ids=["causal", "dropout"])
def test_compile_without_a_kernel(options):
    def function(*tensors):
        return attention(*tensors, **options)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for run in (function, compiled):
        torch.manual_seed(0)
        results.append(output_and_gradients(run, arguments(CASES[0])))
    assert_close(*results)


@cases
def test_compile_calls_the_kernels(case):
    graphs = []

    def record(module, _):
        graphs.append(module)
        return module

    compiled = torch.compile(fused_function(case), backend=record, fullgraph=True)
    compiled(*arguments(case))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    name = "attention_qkvpacked" if case.packed else "attention"
    assert f"vitfast.{name}.default" in called


def test_compile_for_changing_lengths():
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for queries, keys in ((6, 6), (7, 5), (9, 4)):
        tensors = arguments(Case(queries=queries, keys=keys, dim=4))
        assert_close(output_and_gradients(compiled, tensors), output_and_gradients(attention, tensors), rtol=0, atol=0)


def test_compile_with_a_scale_from_the_shape():
    def function(query, key, value):
        return attention(query, key, value, scale=query.shape[-1] ** -0.5)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for dim in (4, 6):
        tensors = arguments(Case(queries=5, dim=dim, bias=None))
        assert_close(output_and_gradients(compiled, tensors), output_and_gradients(function, tensors))


@pytest.mark.slow
@cases
def test_compile_with_inductor(case):
    def function(*tensors):
        return fused_function(case)(*tensors).mul(2).relu()

    compiled = torch.compile(function, fullgraph=True)
    expected = output_and_gradients(function, arguments(case))
    assert_close(output_and_gradients(compiled, arguments(case)), expected)


class Block(torch.nn.Module):
    """A projection and a learned bias around the operator, as models have it."""

    def __init__(self, channels=8, heads=2, tokens=5):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(channels, 3 * channels)
        self.proj = torch.nn.Linear(channels, channels)
        self.bias = torch.nn.Parameter(torch.randn(heads, tokens, tokens))

    def forward(self, x):
        """(B, N, C) -> (B, N, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.proj(attention_qkvpacked(qkv, self.bias).flatten(2))


@pytest.fixture
def block():
    return Block()


@pytest.fixture
def tokens():
    return torch.randn(2, 5, 8)


def gradients(module, run):
    module.zero_grad()
    run().square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_compiled_module_trains_like_the_module(block, tokens):
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = gradients(block, lambda: block(tokens))
    assert_close(gradients(block, lambda: compiled(tokens)), expected)


def test_compiled_function_heeds_the_backend():
    """A change of the backend compiles again."""
    case = CASES[0]
    compiled = torch.compile(fused_function(case), backend="aot_eager", fullgraph=True)
    expected = compiled(*arguments(case))
    with vitfast.backend("reference"):
        assert_close(compiled(*arguments(case)), expected)
    with vitfast.backend("cuda"), pytest.raises(Exception, match="no cuda kernel"):
        compiled(*arguments(case))


@pytest.mark.parametrize("strict", [False, True])
def test_export(block, tokens, strict):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (tokens,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "vitfast.attention_qkvpacked.default" in targets
    for batch in (2, 5):
        x = torch.randn(batch, *tokens.shape[1:])
        assert_close(program.module()(x), block(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(tokens), block(tokens))


@cases
def test_double_backward_of_a_compiled_function_raises(case):
    """torch.compile has none, whatever is compiled; it must not be zero in silence."""
    compiled = torch.compile(fused_function(case), backend="aot_eager", fullgraph=True)
    tensors = leaves(arguments(case))
    scalar = compiled(*tensors).sin().sum()
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        torch.autograd.grad(torch.autograd.grad(scalar, tensors, create_graph=True)[0].sum(), tensors)


@cases
def test_compiled_hessian_vector_products(case):
    """make_fx, then torch.compile: the way that needs no support for transforms in Dynamo."""
    function, primals = fused_function(case), arguments(case)
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
    function, primals, tangents = fused_function(case), arguments(case), arguments(case, seed=1)
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
    function = fused_function(case)
    compiled = torch.compile(lambda *t: grad(lambda *u: function(*u).sum())(*t), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(*arguments(case))


# ---- recomputation, casts, copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(block, tokens, use_reentrant):
    tokens.requires_grad_()
    expected = gradients(block, lambda: block(tokens))
    again = gradients(block, lambda: checkpoint(block, tokens, use_reentrant=use_reentrant))
    assert_close(again, expected, rtol=0, atol=0)


def test_activation_checkpointing_inside_compile(block, tokens):
    expected = gradients(block, lambda: block(tokens))
    compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_close(gradients(block, lambda: compiled(tokens)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(block, tokens, dtype):
    """The projections run in lower precision, the learned bias stays float32 and gets a float32 gradient."""

    def step():
        with torch.autocast("cpu", dtype=dtype):
            output = block(tokens)
        assert output.dtype == dtype
        return output.float()

    ours = gradients(block, step)
    with vitfast.backend("reference"):
        plain = gradients(block, step)
    exact = gradients(block, lambda: block(tokens))
    assert {g.dtype for g in ours.values()} == {torch.float32}
    for name, truth in exact.items():
        error, plain_error = ((g - truth).square().mean().sqrt() for g in (ours[name], plain[name]))
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * truth.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", ["same", "float32"])
def test_gradient_of_the_bias_has_its_dtype(dtype, bias_dtype):
    x = torch.randn(1, 2, 4, 4, dtype=dtype)
    bias = torch.randn(2, 4, 4, dtype=dtype if bias_dtype == "same" else torch.float32).requires_grad_()
    attention(x, x, x, bias).sum().backward()
    assert bias.grad.dtype == bias.dtype


def test_deepcopy_of_a_module_computes_the_same(block, tokens):
    assert_close(copy.deepcopy(block)(tokens), block(tokens), rtol=0, atol=0)


def test_ensemble_of_modules(tokens):
    """torch.func.stack_module_state: one vmap over parameters, the learned bias among them."""
    blocks = [Block().double() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(blocks)
    tokens = tokens.double()

    def run(p, b):
        return torch.func.functional_call(blocks[0], (p, b), (tokens,))

    assert_close(vmap(run)(parameters, buffers), torch.stack([b(tokens) for b in blocks]))


@cases
def test_batched_cotangents_of_autograd_grad(case):
    """is_grads_batched: the older vmap, used by torch.autograd.functional."""
    tensors = leaves(arguments(case))
    output = fused_function(case)(*tensors)
    cotangents = torch.randn(3, *output.shape, dtype=output.dtype)
    batched = torch.autograd.grad(output, tensors, cotangents, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(output, tensors, c, retain_graph=True) for c in cotangents]
    assert_close(batched, tuple(torch.stack(gs) for gs in zip(*single, strict=True)))
