// Latents: random z, circles through z, and w for each layer. No page, no models.

/** A stream of uniform numbers in [0, 1) that depends on the seed alone (mulberry32). */
function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A standard normal z of a seed (Box and Muller's method). */
export function randomZ(seed, length) {
  const draw = uniform(seed);
  return Float32Array.from({ length }, () =>
    Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw()));
}

/** The point at an angle of the circle from one z through another; it stays as likely as they are. */
export function onCircle(from, through, angle) {
  const [a, b] = [Math.cos(angle), Math.sin(angle)];
  return from.map((value, i) => a * value + b * through[i]);
}

/**
 * A w for each layer: `w`, or `partner` in the layers of `mixed`, moved along directions.
 *
 * @param {Float32Array} w
 * @param {Float32Array} partner
 * @param {Array<[number, number]>} mixed first layers, and those after the last
 * @param {number[][]} directions
 * @param {number[]} amounts one for each direction
 */
export function wPlus(w, partner, nLatent, mixed, directions, amounts) {
  const length = w.length;
  const result = new Float32Array(nLatent * length);
  for (let layer = 0; layer < nLatent; layer += 1) {
    const isMixed = mixed.some(([first, end]) => first <= layer && layer < end);
    result.set(isMixed ? partner : w, layer * length);
  }
  directions.forEach((direction, k) => {
    if (amounts[k] === 0) return;
    for (let i = 0; i < result.length; i += 1) result[i] += amounts[k] * direction[i % length];
  });
  return result;
}

export function median(values) {
  const sorted = Float64Array.from(values).sort();
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
