"""What Qualcomm's ONNX Runtime provider needs on this side: the wheel, session options, and what its files say."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.target import Missing
from edgebake_targets._onnx_units import CONTEXT

if TYPE_CHECKING:
    import onnx

PROVIDER = "QNNExecutionProvider"
SOURCES = (b"", PROVIDER.encode(), b"QNN")  # how compiled parts name it
COMPATIBILITY = f"ep_compatibility_info.{PROVIDER}"
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "onnxruntime_qnn")
REMEDY = "pip install onnx onnxscript onnxruntime==1.31.1 onnxruntime-qnn==2.7.0"
_SOC_FIELD = 5  # of COMPATIBILITY: format, backend, SDK, backend API, HTP architecture (0: by chip), chip, ...


def missing() -> Missing | None:
    """Whether ONNX, ONNX Runtime and Qualcomm's provider with its compiler and simulator are installed."""
    if platform.system() not in ("Linux", "Windows"):
        return Missing(
            reason=f"Qualcomm has no HTP compiler for {platform.system()}",
            remedy="build on Linux x86-64 (glibc 2.35 or later) or Windows",
        )
    absent = [name.replace("_", "-") for name in PACKAGES if find_spec(name) is None]
    return Missing(reason=f"not installed: {', '.join(absent)}", remedy=REMEDY) if absent else None


def session_options(provider: Mapping[str, str], *, cpu_fallback: bool) -> Any:
    """ONNX Runtime's options for the HTP: ``provider`` as the provider takes them, all of them text.

    For a process that runs nothing else: registering the provider is for the whole process, and the vendor's libraries
    have been seen to bring theirs down.
    """
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(3)
    if not any(device.ep_name == PROVIDER for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not cpu_fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices, {"backend_type": "htp", **provider})
    return options


def unknown_options(provider: Mapping[str, str], library: Path) -> list[str]:
    """Names of ``provider`` that do not stand in the provider's ``library``: it ignores what it does not know."""
    content = library.read_bytes()
    return sorted(name for name in provider if name.encode() not in content)


@dataclass(frozen=True, kw_only=True)
class ContextFacts:
    """What an EPContext model says of itself."""

    partitions: int
    embedded_bytes: int
    sdk: str  # version of QAIRT that compiled it, "2.51.0"
    soc_model: str  # the chip it was compiled for, as QNN numbers them; empty when the file does not say
    files: tuple[str, ...] = ()  # binaries beside the model


def facts_of(model: onnx.ModelProto) -> ContextFacts | None:
    """The facts of ``model``, whoever wrote it; None when it holds no compiled part of Qualcomm's."""
    nodes = [_attributes(node) for node in model.graph.node if node.op_type == CONTEXT]
    ours = [found for found in nodes if _bytes(found, "source") in SOURCES]
    if not ours:
        return None
    inside = [found for found in ours if found.get("embed_mode", 1)]
    info = next((str(p.value) for p in model.metadata_props if p.key == COMPATIBILITY), "").split(":")
    sdk = next((word for found in ours if (word := _word(found, "ep_sdk_version"))), "")
    return ContextFacts(
        partitions=len(ours),
        embedded_bytes=sum(len(_bytes(found, "ep_cache_context")) for found in inside),
        sdk=".".join(sdk.lstrip("v").split(".")[:3]),
        soc_model=info[_SOC_FIELD] if len(info) > _SOC_FIELD else "",
        files=tuple(word for found in ours if found not in inside and (word := _word(found, "ep_cache_context"))),
    )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: a.s if a.type == a.STRING else a.i for a in node.attribute}


def _bytes(attributes: Mapping[str, Any], name: str) -> bytes:
    value = attributes.get(name, b"")
    return value if isinstance(value, bytes) else b""


def _word(attributes: Mapping[str, Any], name: str) -> str:
    return _bytes(attributes, name).decode("utf-8", "replace")
