"""Repositories for Bazel without a network, from what is installed.

They have the targets of those that MODULE.bazel declares, by the same names, so
that BUILD files work with either; and what Bazel 4 itself would download before
it runs the first test, though Python needs nothing of it.
"""

# Rules that were Bazel's own, by the files that they are loaded from today.
_RULES = {
    "@rules_cc//cc": [
        "cc_binary",
        "cc_library",
        "cc_test",
        "cc_toolchain",
        "cc_toolchain_suite",
    ],
    "@rules_java//java": [
        "java_import",
        "java_runtime",
        "java_toolchain",
    ],
    "@rules_python//python": [
        "py_binary",
        "py_library",
        "py_test",
    ],
}

_NOTHING = """\
filegroup(
    name = "{name}",
    visibility = ["//visibility:public"],
)
"""

_INTERPRETER = """\
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")

py_runtime(
    name = "runtime",
    interpreter_path = "{interpreter}",
    python_version = "PY3",
)

py_runtime_pair(
    name = "pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

# The interpreter finds the package by itself.
_PACKAGE = """\
py_library(
    name = "{name}",
    visibility = ["//visibility:public"],
)
"""

def _written(context):
    for path, text in context.attr.files.items():
        context.file(path, text)

_written_repository = repository_rule(
    implementation = _written,
    doc = "Files with given texts.",
    attrs = {
        "files": attr.string_dict(
            doc = "Texts, by the paths of files.",
            mandatory = True,
        ),
    },
)

def _installed(context):
    checkout = context.path(context.attr.lock).dirname
    environment = checkout.get_child(context.attr.environment)
    interpreter = environment.get_child("bin").get_child("python")
    if not interpreter.exists:
        fail("There is no %s: `make test-bazel` makes it." % interpreter)
    context.file("BUILD", _INTERPRETER.format(interpreter = interpreter))
    for line in context.read(context.attr.lock).splitlines():
        name, pinned, _ = line.partition("==")
        if pinned and not name.startswith((" ", "#")):
            name = name.replace("-", "_").replace(".", "_").lower()
            context.file(name + "/BUILD", _PACKAGE.format(name = name))

_installed_repository = repository_rule(
    implementation = _installed,
    doc = "The packages of a lock, and the interpreter that has them.",
    attrs = {
        "environment": attr.string(
            doc = "Folder, beside the lock, that the lock is installed in.",
            mandatory = True,
        ),
        "lock": attr.label(
            doc = "What `pip install --requirement` was given.",
            mandatory = True,
        ),
    },
)

def installed_repositories(name, environment, lock):
    """Declares all repositories, and the toolchain of Python.

    Args:
        name: The name of the repository of packages.
        environment: Folder, beside the lock, that the lock is installed in.
        lock: What `pip install --requirement` was given.
    """
    for label, rules in _RULES.items():
        repository, _, folder = label[1:].partition("//")
        lines = ["%s = native.%s" % (rule, rule) for rule in rules]
        _written_repository(name = repository, files = {
            folder + "/BUILD": "",
            folder + "/defs.bzl": "\n".join(lines),
        })
    _written_repository(name = "remote_coverage_tools", files = {
        "BUILD": _NOTHING.format(name = "coverage_report_generator"),
    })
    _installed_repository(name = name, environment = environment, lock = lock)
    native.register_toolchains("@%s//:toolchain" % name)
