"""What a Core ML package takes and gives, as its description and its program say."""

from __future__ import annotations

from typing import Any

from edgebake.types import Role, TensorSpec
from edgebake_targets._coreml_constants import operations
from edgebake_targets._coreml_package import Package, proto


def inputs_of(package: Package) -> tuple[TensorSpec, ...]:
    """Inputs, then states (role ``state``). A dimension with a range reads ``"8..128"``, an open one ``"8.."``."""
    description = _description(package)
    plain = tuple(_feature(feature) for feature in description.input)
    states = tuple(_feature(feature) for feature in description.state)
    return (*plain, *states)


def outputs_of(package: Package) -> tuple[TensorSpec, ...]:
    """Outputs. Their shapes come from the program, as the description leaves them out; ``"?"``: known at run time."""
    shapes = _program_shapes(package)
    found = []
    for feature in _description(package).output:
        spec = _feature(feature)
        shape = shapes.get(spec.name, spec.shape)
        found.append(TensorSpec(name=spec.name, shape=shape, dtype=spec.dtype, role=spec.role))
    return tuple(found)


def _description(package: Package) -> Any:
    description = package.spec.description
    if not description.functions:
        return description
    wanted = description.defaultFunctionName
    return next((f for f in description.functions if f.name == wanted), description.functions[0])


def _feature(feature: Any) -> TensorSpec:
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType":
        image = feature.type.imageType
        channels = (
            1 if "GRAYSCALE" in proto("FeatureTypes_pb2").ImageFeatureType.ColorSpace.Name(image.colorSpace) else 3
        )
        return TensorSpec(
            name=feature.name, shape=(1, channels, image.height, image.width), dtype="uint8", role="image"
        )
    if kind in ("multiArrayType", "stateType"):
        array = feature.type.multiArrayType if kind == "multiArrayType" else feature.type.stateType.arrayType
        role: Role = "state" if kind == "stateType" else "input"
        return TensorSpec(name=feature.name, shape=_shape(array), dtype=_dtype(array), role=role)
    return TensorSpec(name=feature.name, shape=(), dtype=str(kind).removesuffix("Type"))


def _shape(array: Any) -> tuple[int | str, ...]:
    flexible = array.WhichOneof("ShapeFlexibility")
    if flexible == "shapeRange":
        return tuple(_range(r.lowerBound, r.upperBound) for r in array.shapeRange.sizeRanges)
    if flexible == "enumeratedShapes":
        columns = zip(*[tuple(shape.shape) for shape in array.enumeratedShapes.shapes], strict=True)
        return tuple(next(iter(set(c))) if len(set(c)) == 1 else "|".join(map(str, sorted(set(c)))) for c in columns)
    return tuple(int(size) for size in array.shape)


def _range(low: int, high: int) -> int | str:
    return int(low) if low == high else f"{low}.." if high < 0 else f"{low}..{high}"


def _dtype(array: Any) -> str:
    names = proto("FeatureTypes_pb2").ArrayFeatureType.ArrayDataType
    name = str(names.Name(array.dataType)).lower()
    return "float64" if name == "double" else name


def _program_shapes(package: Package) -> dict[str, tuple[int | str, ...]]:
    if package.spec.WhichOneof("Type") != "mlProgram":
        return {}
    wanted = {feature.name for feature in _description(package).output}
    found = {}
    for operation in operations(package):
        for output in operation.outputs:
            if output.name in wanted and output.type.WhichOneof("type") == "tensorType":
                dims = output.type.tensorType.dimensions
                found[output.name] = tuple(
                    int(d.constant.size) if d.WhichOneof("dimension") == "constant" else "?" for d in dims
                )
    return found
