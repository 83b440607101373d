"""A decoder as the ONNX graph that onnxruntime-genai runs: GroupQueryAttention over a shared cache, MatMulNBits.

Operators: docs/ContribOperators.md of ONNX Runtime. One call takes (batch, new tokens) and the cache of past ones; the
same graph reads a prompt and decodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.scheme import Scheme, parse
from edgebake.target import Refusal
from edgebake.types import Tensors, rule_for
from edgebake_targets._genai_config import GRAPH, Spec, read_spec, rotary_tables, write_config
from edgebake_targets._genai_weights import DATA, WeightWriter
from edgebake_targets._onnx_graph import MICROSOFT
from edgebake_targets._onnx_units import operator_of

if TYPE_CHECKING:
    import onnx

OPSET = 21
_FLOAT, _INT32, _INT64 = 1, 6, 7  # TensorProto.DataType
_NARROWEST_BLOCK, _WIDEST_BLOCK = 16, 256  # of MatMulNBits
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def write_decoder(
    source: Path, tensors: Tensors, folder: Path, *, context: int, scheme: str, embedding: str = "w8"
) -> list[str]:
    """Write the model of the transformers folder ``source`` into ``folder`` and return the names of its files.

    ``tensors``: the weights of ``source``. ``scheme`` of the layers' products, ``embedding``, also of the head, as
    :func:`write_graph` has them.
    """
    head = f"{embedding}a8d" if embedding != "fp32" and scheme.endswith("a8d") else embedding
    apart = {EMBEDDING: embedding, HEAD: head}
    spec = read_spec(source)
    write_graph(spec, tensors, folder, context=context, scheme_of=lambda module: apart.get(module, scheme))
    return [GRAPH, DATA, write_config(folder, spec, source, context)]


def write_graph(
    spec: Spec, tensors: Tensors, folder: Path, *, context: int, scheme_of: Callable[[str], str]
) -> GraphFacts:
    """Write the decoder of ``spec`` with ``tensors`` for its weights as GRAPH and DATA into ``folder``.

    ``scheme_of`` a module: fp32, fp16 (computed in float32), w4g<n>, w8g<n>, w8 (in the widest groups that divide a
    row), w4g<n>z (groups with an offset), and of products with ``a8d``: activations rounded to int8 in the kernel; the
    embedding a float or w8. RecipeError where MatMulNBits cannot hold what is asked.
    """
    if context > spec.positions:
        what = f"the model knows {spec.positions} positions, the context is {context}"
        raise RecipeError(what, where="model.context", fix=f"give at most {spec.positions}")
    with WeightWriter(tensors, folder) as weights:
        writer = _Writer(spec, weights, scheme_of)
        model = _model(writer, context)
    (folder / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
    operators = Counter(operator_of(node) for node in model.graph.node)
    attended = 2 * spec.layers * spec.heads * spec.head_dim * context
    return GraphFacts(operators=dict(sorted(operators.items())), macs_per_token=writer.macs + attended)


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """Operators by type, and multiply-accumulates of one token that attends over the whole context."""

    operators: Mapping[str, int]
    macs_per_token: int


def refusal_of(module: str, name: str, columns: int) -> Refusal | None:
    """Why MatMulNBits cannot hold rows of ``columns`` in the scheme ``name``; None where it can."""
    scheme = parse(name)
    if scheme.family == "float":
        return None
    eight = scheme.weight_bits == 8 and not scheme.zero_points
    bits = scheme.family == "integer" and (eight or (scheme.weight_bits == 4 and scheme.group))
    if not bits or scheme.activation_bits not in (None, 8) or scheme.needs_calibration:
        return Refusal(what=f"MatMulNBits has no {name}", fix="use fp32, w4g32, w4g32a8d or w8a8d", key="scheme")
    if _group(scheme, columns) < _NARROWEST_BLOCK:
        what = f"no group of {_NARROWEST_BLOCK} or more, a power of two, divides the {columns} inputs of {module!r}"
        return Refusal(what=what, fix=rule_for(module, "fp32"))
    if columns % _group(scheme, columns):
        what = f"{name} needs an input width that is a multiple of {scheme.group}; module {module!r} has {columns}"
        return Refusal(what=what, fix=f"{rule_for(module, 'fp32')}, or a scheme with smaller groups")
    return None


def _group(scheme: Scheme, columns: int) -> int:
    return scheme.group or min(columns & -columns, _WIDEST_BLOCK)


def _known(module: str, name: str, columns: int) -> Scheme:
    """The scheme ``name`` with its group for rows of ``columns``."""
    if wrong := refusal_of(module, name, columns):
        raise RecipeError(wrong.what, where=".".join(filter(None, ("compress", wrong.key))), fix=wrong.fix)
    scheme = parse(name)
    return scheme if scheme.family == "float" else replace(scheme, group=_group(scheme, columns))


@dataclass
class _Writer:
    """Nodes in order; every method appends some and returns the name of what they compute."""

    spec: Spec
    weights: WeightWriter
    scheme_of: Callable[[str], str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    macs: int = 0  # of products, for one token

    def node(self, operator: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """One node with one output, named after it."""
        from onnx import helper

        self.nodes.append(
            helper.make_node(operator, inputs, [output], name=output, domain=domain or None, **attributes)
        )
        return output

    def number(self, name: str, *values: int | float) -> str:
        """A constant vector."""
        import numpy as np

        dtype = np.float32 if any(isinstance(value, float) for value in values) else np.int64
        return self.weights.constant(name, np.array(values, dtype))

    def norm(self, value: str, name: str, size: int) -> str:
        """RMSNorm (Zhang 2019, equation 4) with the weight ``name``."""
        weight = self.weights.vector(f"{name}.weight", size, plus=self.spec.norm_offset)
        return self.node(
            "SimplifiedLayerNormalization",
            [value, weight],
            name,
            axis=-1,
            epsilon=self.spec.epsilon,
            stash_type=1,
        )

    def linear(self, value: str, name: str, shape: tuple[int, int], *, bias: bool = False) -> str:
        """``value`` times the matrix ``name``.weight of ``shape`` (outputs, inputs)."""
        made = self.product(value, name, f"{name}.weight", shape, f"{name}/product" if bias else name)
        return self.node("Add", [made, self.weights.vector(f"{name}.bias", shape[0])], name) if bias else made

    def parts(self, value: str, name: str, rows: Mapping[str, int]) -> list[str]:
        """``value`` times a matrix that is several on top of each other, ``rows`` of outputs each; the names."""
        from onnx import helper

        whole = self.linear(value, name, (sum(rows.values()), self.spec.hidden))
        outputs = [f"{name}/{part}" for part in rows]
        sizes = self.number(f"{name}/rows", *rows.values())
        self.nodes.append(helper.make_node("Split", [whole, sizes], outputs, name=f"{name}/split", axis=-1))
        return outputs

    def product(self, value: str, module: str, tensor: str, shape: tuple[int, int], out: str) -> str:
        """``value`` times the matrix ``tensor`` of ``shape`` in the scheme of ``module``."""
        self.macs += shape[0] * shape[1]
        scheme = _known(module, self.scheme_of(module), shape[1])
        if scheme.family == "float":
            half = scheme.weight_bits == 16
            matrix = self.widened(self.weights.transposed(tensor, shape, half=half), half)
            return self.node("MatMul", [value, matrix], out)
        assert scheme.group is not None
        # Level 4: the kernel rounds activations to int8 per block; level 1: float32 products.
        level = 4 if scheme.dynamic else 1
        sizes = {"N": shape[0], "K": shape[1], "bits": scheme.weight_bits, "block_size": scheme.group}
        kernel: dict[str, Any] = {"domain": MICROSOFT, "accuracy_level": level, **sizes}
        if not scheme.zero_points:
            packed = self.weights.blocks(tensor, shape, scheme.weight_bits, scheme.group)
            return self.node("MatMulNBits", [value, *packed], out, **kernel)
        q, scales, offsets = self.weights.affine(tensor, shape, scheme.group)
        centred = self.node("MatMulNBits", [value, q, scales], f"{out}/centred", **kernel)
        shift = self.node("MatMul", [self.group_sums(value, shape[1], scheme.group), offsets], f"{out}/offset")
        return self.node("Add", [centred, shift], out)

    def widened(self, tensor: str, half: bool) -> str:
        """``tensor`` in float32; one cast of a ``half`` however often it is read."""
        made = f"{tensor}/float" if half else tensor
        if not half or any(made in node.output for node in self.nodes):
            return made
        return self.node("Cast", [tensor], made, to=_FLOAT)

    def group_sums(self, value: str, columns: int, group: int) -> str:
        """Sums of every ``group`` values of (batch, tokens, ``columns``), once for all products that read them."""
        made = f"{value}/sums_of_{group}"
        if any(made in node.output for node in self.nodes):
            return made
        shape = self.number(f"groups/{columns // group}x{group}", 0, 0, columns // group, group)
        apart = self.node("Reshape", [value, shape], f"{value}/groups_of_{group}")
        return self.node("ReduceSum", [apart, self.number("last", -1)], made, keepdims=0)


def _model(writer: _Writer, context: int) -> onnx.ModelProto:
    from onnx import helper

    spec = writer.spec
    lengths = _lengths(writer)
    rotary = _rotary(writer, "", spec.rope, context)
    local = rotary if spec.local_rope is None else _rotary(writer, "local_", spec.local_rope, context)
    hidden = _embedding(writer)
    if spec.embedding_scale != 1.0:
        scale = writer.number("embedding/factor", float(spec.embedding_scale))
        hidden = writer.node("Mul", [hidden, scale], "embedding/enlarged")
    for layer in range(spec.layers):
        hidden = _layer(writer, layer, hidden, [*lengths, *(rotary if spec.windows[layer] is None else local)])
    _head(writer, writer.norm(hidden, "model.norm", spec.hidden))
    graph = helper.make_graph(
        writer.nodes, "decoder", _inputs(spec), _outputs(spec), list(writer.weights.initializers.values())
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="edgebake")


def _rotary(writer: _Writer, prefix: str, rope: Mapping[str, Any], context: int) -> list[str]:
    tables = rotary_tables(rope, writer.spec.head_dim, context)
    names = (f"{prefix}cos_cache", f"{prefix}sin_cache")
    return [writer.weights.constant(name, table) for name, table in zip(names, tables, strict=True)]


def _inputs(spec: Spec) -> list[onnx.ValueInfoProto]:
    from onnx import helper

    past = ["batch", spec.kv_heads, "past", spec.head_dim]
    return [
        helper.make_tensor_value_info("input_ids", _INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", _INT64, ["batch", "total"]),
        *(
            helper.make_tensor_value_info(f"past_key_values.{layer}.{kind}", _FLOAT, past)
            for layer in range(spec.layers)
            for kind in ("key", "value")
        ),
    ]


def _outputs(spec: Spec) -> list[onnx.ValueInfoProto]:
    from onnx import helper

    present = ["batch", spec.kv_heads, "total", spec.head_dim]
    return [
        helper.make_tensor_value_info("logits", _FLOAT, ["batch", "sequence", spec.vocabulary]),
        *(
            helper.make_tensor_value_info(f"present.{layer}.{kind}", _FLOAT, present)
            for layer in range(spec.layers)
            for kind in ("key", "value")
        ),
    ]


def _lengths(writer: _Writer) -> list[str]:
    """``seqlens_k``, the place of each sequence's last token, (batch,), and the length of the longest, a scalar."""
    import numpy as np

    count = writer.node("ReduceSum", ["attention_mask", writer.number("one", 1)], "lengths/count", keepdims=0)
    last = writer.node("Sub", [count, "one"], "lengths/last")
    seqlens = writer.node("Cast", [last], "lengths/seqlens_k", to=_INT32)
    shape = writer.node("Shape", ["attention_mask"], "lengths/shape")
    place = writer.weights.constant("lengths/axis", np.array(1, np.int64))
    total = writer.node("Gather", [shape, place], "lengths/longest", axis=0)
    return [seqlens, writer.node("Cast", [total], "lengths/total", to=_INT32)]


def _embedding(writer: _Writer) -> str:
    spec, name = writer.spec, f"{EMBEDDING}.weight"
    shape = (spec.vocabulary, spec.hidden)
    scheme = _known(EMBEDDING, writer.scheme_of(EMBEDDING), spec.hidden)
    if scheme.family == "float":
        half = scheme.weight_bits == 16
        table = writer.weights.table(name, shape, half=half)
        rows = writer.node("Gather", [table, "input_ids"], "embedding/half" if half else "embedding")
        return writer.node("Cast", [rows], "embedding", to=_FLOAT) if half else rows
    assert scheme.group is not None
    packed, scales = writer.weights.blocks(name, shape, 8, scheme.group)
    rows = writer.node("Gather", [packed, "input_ids"], "embedding/rows")
    values = writer.node("Cast", [rows], "embedding/values", to=_FLOAT)
    centred = writer.node("Sub", [values, writer.number("embedding/zero_point", 128.0)], "embedding/centred")
    row_scales = writer.node("Gather", [scales, "input_ids"], "embedding/row_scales")
    wide = writer.node("Unsqueeze", [row_scales, writer.number("last", -1)], "embedding/wide_scales")
    scaled = writer.node("Mul", [centred, wide], "embedding/scaled")
    return writer.node("Reshape", [scaled, writer.number("embedding/shape", 0, 0, spec.hidden)], "embedding")


def _layer(writer: _Writer, layer: int, hidden: str, shared: list[str]) -> str:
    spec, name = writer.spec, f"model.layers.{layer}"
    normed = writer.norm(hidden, f"{name}.input_layernorm", spec.hidden)
    attended = _attention(writer, layer, normed, shared)
    before = "post_attention_layernorm"
    if spec.post_norms:
        attended, before = writer.norm(attended, f"{name}.{before}", spec.hidden), "pre_feedforward_layernorm"
    middle = writer.node("Add", [hidden, attended], f"{name}/middle")
    made = _mlp(writer, f"{name}.mlp", writer.norm(middle, f"{name}.{before}", spec.hidden))
    made = writer.norm(made, f"{name}.post_feedforward_layernorm", spec.hidden) if spec.post_norms else made
    return writer.node("Add", [middle, made], f"{name}/output")


def _attention(writer: _Writer, layer: int, value: str, shared: list[str]) -> str:
    from onnx import helper

    spec, name = writer.spec, f"model.layers.{layer}.self_attn"
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if spec.fused:
        projected = writer.parts(value, f"{name}.qkv_proj", rows)
    else:
        projected = [writer.linear(value, f"{name}.{n}", (r, spec.hidden), bias=spec.qkv_bias) for n, r in rows.items()]
    if spec.head_norms:
        for place, kind in enumerate(("q_norm", "k_norm")):
            projected[place] = _head_norm(writer, projected[place], f"{name}.{kind}", (queries, keys)[place])
    past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
    present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
    seqlens, total, *rotary = shared
    writer.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            [*projected, *past, seqlens, total, *rotary],
            [f"{name}/attended", *present],
            name=f"{name}/attended",
            domain=MICROSOFT,
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            scale=spec.attention_scale or spec.head_dim**-0.5,
            softcap=spec.softcap,
            local_window_size=spec.windows[layer] or -1,
            do_rotary=1,
            rotary_interleaved=0,
        )
    )
    return writer.linear(f"{name}/attended", f"{name}.o_proj", (spec.hidden, queries), bias=spec.out_bias)


def _head_norm(writer: _Writer, value: str, name: str, size: int) -> str:
    """RMSNorm over each head of (batch, tokens, heads · width)."""
    width = writer.spec.head_dim
    shape = writer.number(f"{name}/heads", 0, 0, size // width, width)
    normed = writer.norm(writer.node("Reshape", [value, shape], f"{name}/split"), name, width)
    return writer.node("Reshape", [normed, writer.number(f"{name}/whole", 0, 0, size)], f"{name}/joined")


def _mlp(writer: _Writer, name: str, value: str) -> str:
    spec = writer.spec
    kinds = dict.fromkeys(("gate_proj", "up_proj"), spec.inner)
    if spec.fused:
        gate, up = writer.parts(value, f"{name}.gate_up_proj", kinds)
    else:
        shape = (spec.inner, spec.hidden)
        gate, up = (writer.linear(value, f"{name}.{kind}", shape, bias=spec.mlp_bias) for kind in kinds)
    if spec.activation == "silu":
        sigmoid = writer.node("Sigmoid", [gate], f"{name}/sigmoid")
        activated = writer.node("Mul", [gate, sigmoid], f"{name}/silu")
    else:
        approximate = "tanh" if spec.activation == "gelu_pytorch_tanh" else "none"
        activated = writer.node("Gelu", [gate], f"{name}/gelu", approximate=approximate)
    product = writer.node("Mul", [activated, up], f"{name}/gated")
    return writer.linear(product, f"{name}.down_proj", (spec.hidden, spec.inner), bias=spec.mlp_bias)


def _head(writer: _Writer, value: str) -> None:
    """Logits; a tied head reads the embedding's tensor, in its one copy where both are in one form."""
    spec = writer.spec
    tensor = f"{EMBEDDING}.weight" if spec.tied else f"{HEAD}.weight"
    shape = (spec.vocabulary, spec.hidden)
    out = "head" if spec.final_softcap else "logits"
    scheme = parse(writer.scheme_of(HEAD))
    half = scheme.name == "fp16"
    stored = f"{tensor}.half" if half else tensor
    if scheme.family == "float" and stored in writer.weights.initializers:
        writer.macs += shape[0] * shape[1]
        writer.node("FusedMatMul", [value, writer.widened(stored, half)], out, domain=MICROSOFT, transB=1)
    else:
        writer.product(value, HEAD, tensor, shape, out)
    if spec.final_softcap:
        cap = writer.number("head/cap", spec.final_softcap)
        small = writer.node("Tanh", [writer.node("Div", [out, cap], "head/share")], "head/tanh")
        writer.node("Mul", [small, cap], "logits")
