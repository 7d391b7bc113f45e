"""A compiled function of TensorFlow as a StableHLO program that says its own.

With it goes what its arguments and results are: other runtimes of XLA see
numbered ones only.
"""

from __future__ import annotations

from collections.abc import Callable
import re
from typing import Any

import arrays
import keras
import numpy as np
import steps
import tensorflow as tf

_WRITES = re.compile("(Assign.*Variable|ResourceApply|ResourceScatter).*")


def exported(
    step: steps.Step, arguments: list[dict[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """The program of a step, and its description.

    Args:
        step: What to export.
        arguments: Descriptions of the batch that it is called with.

    Returns:
        The text of the program; and a dict of `arguments` and of `results`,
        where a result `feeds` the argument that is its variable.
    """
    specs = [tf.TensorSpec(a["shape"], a["dtype"]) for a in arguments]
    concrete = step.function.get_concrete_function(*specs)
    compiled = step.function.experimental_get_compiler_ir(*specs)
    text = _portable(compiled(stage="stablehlo"))
    described = arguments + _captured(concrete, step.names)
    written = _written(concrete)
    outputs = keras.tree.flatten_with_path(concrete.structured_outputs)
    results = [
        {"name": "/".join(map(str, path)), "feeds": None}
        for path, output in outputs
        if output is not None
    ]
    results += [
        {"name": described[i]["name"], "feeds": i} for i in sorted(written)
    ]
    _check(text, described, results)
    return text, {"arguments": described, "results": results}


def _portable(text: str) -> str:
    """The program without the one operation that is not StableHLO.

    XLA copies the values of variables, which other runtimes see to.
    """
    return re.sub(
        r'"?mhlo\.copy"? (%\S+) : (tensor<[^>]*>)',
        r"stablehlo.convert \1 : (\2) -> \2",
        text,
    )


def _captured(concrete, names: dict[int, str]) -> list[dict[str, Any]]:
    variables = {id(v.handle): v for v in concrete.variables}
    found = []
    for number, tensor in enumerate(concrete.captured_inputs):
        if tensor.dtype != tf.resource:
            value, name = tensor.numpy(), f"constant {number}"
        else:
            variable = variables[id(tensor)]
            name = names.get(id(tensor), f"other {variable.name}")
            value = steps.value_of(variable, name)
        found.append(
            {
                "name": name,
                "shape": list(value.shape),
                "dtype": value.dtype.name,
                "make": arrays.described(np.asarray(value)),
                "role": "variable" if tensor.dtype == tf.resource else "value",
            }
        )
    return found


def _written(concrete) -> set[int]:
    """Positions of the arguments that are variables it assigns."""
    graph_def = concrete.graph.as_graph_def()
    library = {f.signature.name: f for f in graph_def.library.function}
    inputs = [t.op.name for t in concrete.graph.inputs]
    return {
        inputs.index(name)
        for name in _written_names(graph_def.node, library)
        if name in inputs
    }


def _written_names(nodes, library) -> set[str]:
    """Names of the inputs of a graph that are assigned in it."""
    sources = {node.name: node for node in nodes}

    def origin(name):
        name = name.lstrip("^").split(":")[0]
        node = sources.get(name)
        if node is not None and node.op == "Identity":
            return origin(node.input[0])
        return name

    found = set()
    for node in nodes:
        inputs = [i for i in node.input if not i.startswith("^")]
        if _WRITES.fullmatch(node.op):
            found.add(origin(inputs[0]))
        for value in node.attr.values():
            for name in [value.func.name, *(f.name for f in value.list.func)]:
                if name not in library:
                    continue
                signature = [a.name for a in library[name].signature.input_arg]
                inner = _written_names(library[name].node_def, library)
                # Conditions have another input in front.
                given = inputs[len(inputs) - len(signature) :]
                found |= {
                    origin(outer)
                    for outer, arg in zip(given, signature)
                    if arg in inner
                }
    return found


def signature(text: str) -> tuple[list[str], list[str]]:
    """Types of the arguments and of the results of a program's `@main`."""
    begin = text.index("func.func @main")
    line = text[begin : text.index("\n", begin)]
    arguments, _, results = line.partition("->")
    types = re.compile(r"tensor<[^>]*>")
    return types.findall(arguments), types.findall(results)


_ELEMENTS = {
    "f32": "float32",
    "f64": "float64",
    "bf16": "bfloat16",
    "i32": "int32",
    "i64": "int64",
    "ui32": "uint32",
    "ui64": "uint64",
    "i1": "bool",
}


def shape_and_dtype(kind: str) -> tuple[list[int], str]:
    """Of a type as programs write it, `tensor<2x3xf32>`."""
    *sizes, element = kind[len("tensor<") : -1].split("x")
    return [int(size) for size in sizes], _ELEMENTS[element]


def _check(text: str, arguments: list, results: list) -> None:
    """Raises a `ValueError` unless the program has these."""
    inputs, outputs = signature(text)
    if len(inputs) != len(arguments) or len(outputs) != len(results):
        raise ValueError(
            f"The program has {len(inputs)} arguments and {len(outputs)} "
            f"results, not {len(arguments)} and {len(results)}."
        )
    for kind, argument in zip(inputs, arguments):
        if shape_and_dtype(kind) != (argument["shape"], argument["dtype"]):
            raise ValueError(f"{kind} is not {argument}.")
    for kind, result in zip(outputs, results):
        result["shape"], result["dtype"] = shape_and_dtype(kind)
        if result["feeds"] is not None:
            fed = arguments[result["feeds"]]
            if (fed["shape"], fed["dtype"]) != shape_and_dtype(kind):
                raise ValueError(f"{kind} does not feed {fed}.")


def true_results(
    function: Callable, step: steps.Step, described: dict[str, Any], batch: list
) -> list[list[float]]:
    """Sketches of the results that TensorFlow finds.

    Args:
        function: What to call; a `tf.function` of the batch.
        step: Names its variables.
        described: Description of the program.
        batch: Descriptions of its arguments.
    """
    given = [tf.constant(arrays.made(a)) for a in batch]
    variables = {}
    for variable in function.get_concrete_function(*given).variables:
        name = step.names.get(id(variable.handle), f"other {variable.name}")
        variables[name] = variable
    for argument in described["arguments"]:
        if argument["role"] == "variable":
            variables[argument["name"]].assign(arrays.made(argument))
    outputs = iter(keras.tree.flatten(function(*given)))
    return [
        arrays.sketch(
            result["name"],
            next(outputs).numpy()
            if result["feeds"] is None
            else variables[result["name"]].numpy(),
        )
        for result in described["results"]
    ]
