"""HTTP in front of a `TaskServer`.

- `door`: what every request passes before the application sees it: the key, the size and the time of its body. It
  adds the headers, and gives up a client that does not read its answer.
- `asking`: `POST /models/NAME`, the protocol of Hugging Face's hosted inference and of its `InferenceClient`, which a
  fleet on Ray speaks too (`peanut_serve.classify.hugging_face`).
- `open_inference` and `tensors`: `/v2/...`, the Open Inference Protocol of KServe and Triton, with its binary
  extension.
- `app`: the routes together, errors, `/health`, `/ready`, `/metrics`, and the OpenAPI description.
- `serving`: listening, and a stop that loses nothing.

Nothing in a request is opened: an image or a sound is its content, never a path or URL. What is not understood is
refused, never ignored.
"""
