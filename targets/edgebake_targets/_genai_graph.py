"""A decoder as the ONNX graph that onnxruntime-genai runs: GroupQueryAttention over a shared cache, MatMulNBits.

Operators: docs/ContribOperators.md of ONNX Runtime. One call takes (batch, new tokens) and the cache of past ones; the
same graph reads a prompt and decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.scheme import Scheme, parse
from edgebake_targets._genai_config import GRAPH, Spec, read_spec, rotary_tables, write_config
from edgebake_targets._genai_weights import DATA, Tensors, WeightWriter
from edgebake_targets._onnx_graph import MICROSOFT

if TYPE_CHECKING:
    import onnx

OPSET = 21
_FLOAT, _INT32, _INT64 = 1, 6, 7  # TensorProto.DataType
_WIDEST_BLOCK = 256  # of MatMulNBits


def write_decoder(
    source: Path, tensors: Tensors, folder: Path, *, context: int, scheme: str, embedding: str = "w8"
) -> list[str]:
    """Write the model of the transformers folder ``source`` into ``folder`` and return the names of its files.

    ``tensors``: the weights of ``source``.
    ``scheme`` of the layers' products: fp32, w4g<n>, w8g<n>, with ``a8d`` activations rounded to int8 in the kernel.
    ``embedding``, also of the head: fp32 or w8 (8 bits in the widest groups that divide a row).
    """
    spec = read_spec(source)
    if context > spec.positions:
        what = f"the model knows {spec.positions} positions, the context is {context}"
        raise RecipeError(what, where="model.context", fix=f"give at most {spec.positions}")
    with WeightWriter(tensors, folder) as weights:
        writer = _Writer(spec, weights, _known(scheme), embedding == "w8")
        model = _model(writer, context)
    (folder / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
    return [GRAPH, DATA, *write_config(folder, spec, source, context)]


def _known(name: str) -> Scheme:
    scheme = parse(name)
    if scheme.name == "fp32" or (scheme.family == "integer" and scheme.group and scheme.weight_bits in (4, 8)):
        return scheme
    raise RecipeError(f"MatMulNBits has no {name}", where="compress.scheme", fix="use fp32, w4g32, w4g32a8d or w8g32")


@dataclass
class _Writer:
    """Nodes in order; every method appends some and returns the name of what they compute."""

    spec: Spec
    weights: WeightWriter
    scheme: Scheme
    rounded_embedding: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)

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
        weight = self.weights.vector(f"{name}.weight", size)
        return self.node(
            "SimplifiedLayerNormalization",
            [value, weight],
            name,
            axis=-1,
            epsilon=self.spec.epsilon,
            stash_type=1,
        )

    def linear(self, value: str, name: str, shape: tuple[int, int], *, bias: bool, scheme: Scheme | None = None) -> str:
        """``value`` times the matrix ``name``.weight of ``shape`` (outputs, inputs)."""
        out = f"{name}/product" if bias else name
        known = scheme or self.scheme
        if known.name == "fp32":
            self.node("MatMul", [value, self.weights.transposed(f"{name}.weight", shape)], out)
        else:
            assert known.group is not None
            packed = self.weights.blocks(f"{name}.weight", shape, known.weight_bits, known.group)
            self.blocks(value, packed, out, shape, known)
        return self.node("Add", [out, self.weights.vector(f"{name}.bias", shape[0])], name) if bias else name

    def blocks(self, value: str, packed: tuple[str, str], out: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """``value`` times a matrix that the writer of weights has packed."""
        # Level 4: the kernel rounds activations to int8 per block; level 1: float32 products.
        level = 4 if scheme.activation_bits == 8 else 1
        sizes = {"N": shape[0], "K": shape[1], "bits": scheme.weight_bits, "block_size": scheme.group}
        self.node("MatMulNBits", [value, *packed], out, domain=MICROSOFT, accuracy_level=level, **sizes)


def _model(writer: _Writer, context: int) -> onnx.ModelProto:
    from onnx import helper

    spec = writer.spec
    lengths = _lengths(writer)
    tables = rotary_tables(spec, context)
    rotary = [writer.weights.constant(n, t) for n, t in zip(("cos_cache", "sin_cache"), tables, strict=True)]
    hidden = _embedding(writer)
    for layer in range(spec.layers):
        hidden = _layer(writer, layer, hidden, [*lengths, *rotary])
    _head(writer, writer.norm(hidden, "model.norm", spec.hidden))
    graph = helper.make_graph(
        writer.nodes, "decoder", _inputs(spec), _outputs(spec), list(writer.weights.initializers.values())
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="edgebake")


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
    spec, name = writer.spec, "model.embed_tokens.weight"
    shape = (spec.vocabulary, spec.hidden)
    if not writer.rounded_embedding:
        return writer.node("Gather", [writer.weights.table(name, shape), "input_ids"], "embedding")
    packed, scales = writer.weights.blocks(name, shape, 8, _block(spec.hidden))
    rows = writer.node("Gather", [packed, "input_ids"], "embedding/rows")
    values = writer.node("Cast", [rows], "embedding/values", to=_FLOAT)
    centred = writer.node("Sub", [values, writer.number("embedding/zero_point", 128.0)], "embedding/centred")
    row_scales = writer.node("Gather", [scales, "input_ids"], "embedding/row_scales")
    wide = writer.node("Unsqueeze", [row_scales, writer.number("last", -1)], "embedding/wide_scales")
    scaled = writer.node("Mul", [centred, wide], "embedding/scaled")
    return writer.node("Reshape", [scaled, writer.number("embedding/shape", 0, 0, spec.hidden)], "embedding")


def _block(columns: int) -> int:
    """The widest group that MatMulNBits knows and that divides ``columns``; RecipeError when none does."""
    block = min(columns & -columns, _WIDEST_BLOCK)
    if block < 16:
        what = f"no group of 16 or more, a power of two, divides rows of {columns}"
        raise RecipeError(what, where="compress.modules", fix="keep the embedding in fp32")
    return block


def _layer(writer: _Writer, layer: int, hidden: str, shared: list[str]) -> str:
    spec, name = writer.spec, f"model.layers.{layer}"
    normed = writer.norm(hidden, f"{name}.input_layernorm", spec.hidden)
    attended = _attention(writer, layer, normed, shared)
    middle = writer.node("Add", [hidden, attended], f"{name}/middle")
    normed = writer.norm(middle, f"{name}.post_attention_layernorm", spec.hidden)
    return writer.node("Add", [middle, _mlp(writer, f"{name}.mlp", normed)], f"{name}/output")


def _attention(writer: _Writer, layer: int, value: str, shared: list[str]) -> str:
    from onnx import helper

    spec, name = writer.spec, f"model.layers.{layer}.self_attn"
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
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
            scale=spec.head_dim**-0.5,
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
    gate, up = (
        writer.linear(value, f"{name}.{kind}", (spec.inner, spec.hidden), bias=spec.mlp_bias)
        for kind in ("gate_proj", "up_proj")
    )
    sigmoid = writer.node("Sigmoid", [gate], f"{name}/sigmoid")
    activated = writer.node("Mul", [gate, sigmoid], f"{name}/silu")
    product = writer.node("Mul", [activated, up], f"{name}/gated")
    return writer.linear(product, f"{name}.down_proj", (spec.hidden, spec.inner), bias=spec.mlp_bias)


def _head(writer: _Writer, value: str) -> None:
    """Logits; a tied head reads the embedding's tensor, in the embedding's one copy where that is rounded."""
    spec = writer.spec
    tensor = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    shape = (spec.vocabulary, spec.hidden)
    if not writer.rounded_embedding:
        writer.node("MatMul", [value, writer.weights.transposed(tensor, shape)], "logits")
        return
    scheme = parse(f"w8g{_block(spec.hidden)}{'a8d' if writer.scheme.activation_bits == 8 else ''}")
    assert scheme.group is not None
    writer.blocks(value, writer.weights.blocks(tensor, shape, 8, scheme.group), "logits", shape, scheme)
