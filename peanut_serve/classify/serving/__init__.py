"""Serving the tasks of ONNX folders to many clients at once, without HTTP.

What happens to a request, in the order of the modules:

1. `server.TaskServer.predict` admits it, or refuses it because too many wait (`limits`).
2. `library` says which version its name stands for now. A name is an alias: it moves to another version when the
   files are replaced, and the request keeps the version it began with. A version has a digest of all that its answers
   depend on (`version`), from the hashes in the manifest.
3. `sessions` opens the version if it is not open: it compares all files with their hashes, and evicts what was not
   used for longest if the graphs would need more than the memory that they may have. A request holds a lease, so that
   nothing is evicted under it. Tasks of one graph share its session and its preprocessor.
4. `preparing` turns inputs into arrays, in a few threads beside the event loop. Each input becomes one row by itself.
5. `batching` runs rows of one version together (`rows`), never those of two, and never more padding than text. A run
   takes the adapter of its version as an argument.
6. `answering` turns the outputs of a row into labels, entities or embeddings.

**Batches do not change answers.** A row in a batch gives what it gives alone, but for the rounding of float32: images
have one shape, padding of texts is masked and cut off again. Where that does not hold, a batch has one row: models
that read the last column or take samples of any length (`ModelKind.batch_size`), and int8, whose activations share
one scale per tensor, so that one text would change the numbers of another (measured: 7 labels of 200 differ).
"""
