// Heat maps in colour: what counted nothing is clear, what counted most is bright.

// From black over purple and orange to yellow: brightness rises all along, as for inferno.
const STOPS = [
  [0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21],
  [250, 193, 39], [252, 255, 164],
];

function colour(value) {
  const place = (value / 255) * (STOPS.length - 1);
  const i = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[i].map((from, c) => Math.round(from + (STOPS[i + 1][c] - from) * (place - i)));
}

const COLOURS = Array.from({ length: 256 }, (_, value) => colour(value));

async function decoded(png) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  return image;
}

/** Draw a grey map, PNG in base64, in colour; its heat is also how much it covers. */
export async function drawMap(canvas, png) {
  const image = await decoded(png);
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const value = pixels.data[at];
    pixels.data.set([...COLOURS[value], value], at);
  }
  context.putImageData(pixels, 0, 0);
}

export function drawScale(canvas) {
  canvas.width = 256;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  COLOURS.forEach(([r, g, b], value) => {
    context.fillStyle = `rgb(${r} ${g} ${b})`;
    context.fillRect(value, 0, 1, 1);
  });
}
