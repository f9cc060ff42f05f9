"""The plan of the source: its rooms, in order. A room imports only rooms above it in its list."""

CONVERTERS = (
    "errors",  # everything that is raised on purpose
    "_version",
    "files",  # bytes on disk: headers, reading, writing, copying, publishing
    "methods",  # g(W0; θ), one file per method
    "hub",  # the Hugging Face Hub
    "inference",  # what ONNX Runtime needs, for export and for serving
    "models",  # a base checkpoint
    "adapters",  # an opened adapter, and the layouts it is found in
    "plans",  # what will happen to each tensor
    "evaluation",  # g evaluated layer by layer, and verified
    "outputs",  # one file or folder per format
    "inspection",  # what `peanut-inspect` finds out
    "api",  # the public functions
    "serving",  # what peanut_serve may use
    "cli",  # peanut-merge, peanut-inspect
)
PEANUT_SERVE = (
    "errors",
    "settings",  # what the environment and the options say
    "signals",  # what a server tells of itself: log lines, spans
    "tenants",  # keys of many teams, their limits and usage
    "variants",  # what can be served: catalogue, versions, weights on the host
    "lora",  # adapters as LoRA for vLLM
    "swapping",  # one engine, many variants in turn
    "web",  # the HTTP side of a server
    "releases",  # a new version of a name: staged, checked, promoted or rolled back
    "classify",  # predictions of exported classifiers
    "vllm_plugin",  # everything that is loaded into vLLM
    "ray",  # many engines on Ray Serve
    "cli",  # peanut-serve
)
ORDER = {"converters": CONVERTERS, "peanut_serve": PEANUT_SERVE}
