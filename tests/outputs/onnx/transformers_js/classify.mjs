// What transformers.js says to some inputs. A request comes as JSON on stdin, the answers go as JSON to stdout.
//
// modules: the node_modules folder; models: where models are, a folder, or for `web` a URL; web: take the build for
// browsers, which runs WebAssembly and fetches its files; task, model, options, inputs: as for its `pipeline`.
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const { modules, models, web, task, model, options, inputs } = JSON.parse(readFileSync(0, 'utf8'));
const build = web ? 'transformers.js' : 'transformers.node.mjs';
if (web) {
  Object.defineProperty(process, 'release', { value: { name: 'browser' } }); // by this it knows where it is
  const fetchWhole = globalThis.fetch;
  globalThis.fetch = (what, ...rest) => fetchWhole(new URL(what, models), ...rest); // a page has an origin, node has not
}
const { env, pipeline } = await import(pathToFileURL(`${modules}/@huggingface/transformers/dist/${build}`));
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = web ? '/' : models;
env.useBrowserCache = false;
if (web) {
  env.backends.onnx.wasm.wasmPaths = pathToFileURL(`${modules}/onnxruntime-web/dist/`).href;
  env.backends.onnx.wasm.numThreads = 1;
}
const classify = await pipeline(task, model, options);
const answers = [];
for (const input of inputs) {
  answers.push(await classify(input, { top_k: 10 }));
}
console.log(JSON.stringify(answers));
