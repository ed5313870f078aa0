// Models in ONNX Runtime: WebAssembly everywhere, WebGPU where it gives the same pictures.

const VENDOR = new URL("vendor/", document.baseURI).href;
const BACKENDS = {
  wasm: { module: "ort.wasm.min.mjs", provider: "wasm" },
  webgpu: { module: "ort.webgpu.min.mjs", provider: "webgpu" },
};
/** What two backends' pictures may differ by, in grey levels of 255. */
const TOLERANCE = 2;

async function runtime(backend) {
  const ort = await import(VENDOR + BACKENDS[backend].module);
  ort.env.wasm.wasmPaths = VENDOR;
  ort.env.wasm.numThreads = 1; // more need headers that plain file servers do not send
  ort.env.logLevel = "error";
  return ort;
}

async function session(ort, file, provider) {
  const options = { executionProviders: [provider], logSeverityLevel: 3 };
  return ort.InferenceSession.create(new URL(`models/${file}`, document.baseURI).href, options);
}

/** The mapping networks of all models: z -> w, by name. Too small for a GPU. */
export async function loadMappings(names) {
  const ort = await runtime("wasm");
  const mappings = {};
  for (const name of names) {
    const network = await session(ort, `${name}_mapping.onnx`, "wasm");
    mappings[name] = async (z) =>
      (await network.run({ z: new ort.Tensor("float32", z, [1, z.length]) })).w.data;
  }
  return mappings;
}

/** The synthesis networks of all models on one backend: (w+, psi) -> values and milliseconds. */
export async function loadSyntheses(names, nLatent, backend) {
  const ort = await runtime(backend);
  const syntheses = {};
  for (const name of names) {
    const network = await session(ort, `${name}_synthesis.onnx`, BACKENDS[backend].provider);
    syntheses[name] = async (w, psi) => {
      const inputs = {
        w_plus: new ort.Tensor("float32", w, [1, nLatent, w.length / nLatent]),
        psi: new ort.Tensor("float32", [psi], [1]),
      };
      const start = performance.now();
      const { image } = await network.run(inputs);
      return { values: image.data, ms: performance.now() - start };
    };
  }
  return syntheses;
}

/** Values in [-1, 1], channel by channel -> pixels of a canvas. */
export function toPixels(values, size) {
  const pixels = new ImageData(size, size);
  const area = size * size;
  for (let i = 0; i < area; i += 1) {
    for (let c = 0; c < 3; c += 1) {
      pixels.data[4 * i + c] = Math.round((values[c * area + i] + 1) * 127.5); // clamps
    }
    pixels.data[4 * i + 3] = 255;
  }
  return pixels;
}

/** Whether this browser has a GPU for pages; if not, why. */
export async function whyNoWebGPU() {
  if (!navigator.gpu) return "this browser has no WebGPU";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  return adapter ? "" : "this browser finds no GPU";
}

/**
 * WebGPU's synthesis networks, if they make WebAssembly's picture of a w+.
 *
 * @returns {Promise<{syntheses: object | null, note: string}>} null and the reason if they do not.
 */
export async function checkedWebGPU(wasm, w, nLatent) {
  const names = Object.keys(wasm);
  try {
    const syntheses = await loadSyntheses(names, nLatent, "webgpu");
    let largest = 0;
    for (const name of names) {
      const [a, b] = [await wasm[name](w[name], 1), await syntheses[name](w[name], 1)];
      a.values.forEach((value, i) => {
        const difference = 127.5 * Math.abs(value - b.values[i]);
        largest = difference <= largest ? largest : difference; // keeps NaN
      });
    }
    const found = `its pictures differ from WebAssembly's by up to ${largest.toPrecision(1)} grey levels`;
    return largest <= TOLERANCE ? { syntheses, note: found } : { syntheses: null, note: found };
  } catch (error) {
    return { syntheses: null, note: `it failed (${String(error.message ?? error).slice(0, 80)})` };
  }
}
