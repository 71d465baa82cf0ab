// data: blocks of the page -> JSON and typed arrays, as pack.py wrote them.

const ARRAYS = {
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, float32: Float32Array,
};
const NO_CODE = 255;

async function bytesOf(id) {
  const element = document.getElementById(id);
  const text = atob(element.textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  element.remove(); // it is not needed twice
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// A block's document, with its columns as properties of `columns`.
async function unpack(id) {
  const buffer = await bytesOf(id);
  const size = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const columns = {};
  for (const [name, place] of Object.entries(head.columns)) {
    columns[name] = new ARRAYS[place.type](buffer, 4 + size + place.offset, place.length);
  }
  return { ...head.document, columns };
}

// Run the plotting library, which is compressed as the data are.
async function loadPlotly() {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await bytesOf("plotly"));
  document.head.append(script);
}

// starts[i]: the sum of the sizes before i; one more than there are sizes.
function startsOf(sizes) {
  const starts = new Uint32Array(sizes.length + 1);
  for (let i = 0; i < sizes.length; i++) starts[i + 1] = starts[i] + sizes[i];
  return starts;
}

function logprobOf(code, range) {
  return code === NO_CODE ? null : -range * (code / 254) ** 2;
}

function ratioOf(code, range) {
  return code === NO_CODE ? null : Math.exp(Math.sign(code - 127) * range * ((code - 127) / 127) ** 2);
}
