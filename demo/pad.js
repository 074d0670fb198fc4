// The drawing pad: it keeps the strokes, so that the last one can be undone, and sends them as one PNG picture.
const INKS = {
  red: "#d92626", orange: "#f28c13", yellow: "#edd11f", green: "#2f9e44",
  blue: "#2f5fd0", purple: "#8a3fb8", black: "#141414", eraser: "#ffffff",
};
const canvas = element.querySelector("canvas");
const brush = canvas.getContext("2d");
const inks = element.querySelector(".inks");
const width = element.querySelector("input[type=range]");
let strokes = [];
let stroke = null;
let ink = "red";

for (const name of Object.keys(INKS)) {
  const label = document.createElement("label");
  label.title = name;
  label.innerHTML = `<input type="radio" name="ink" value="${name}" aria-label="${name}"><span></span>`;
  label.firstChild.checked = name === ink;
  label.lastChild.style.setProperty("--ink", INKS[name]);
  label.lastChild.className = name;
  label.firstChild.addEventListener("change", () => { ink = name; });
  inks.append(label);
}

function point(event) {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function paint() {
  brush.fillStyle = "#ffffff";
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.lineCap = brush.lineJoin = "round";
  for (const { color, size, points } of strokes) {
    brush.strokeStyle = color;
    brush.lineWidth = size;
    brush.beginPath();
    brush.moveTo(...points[0]);
    for (const next of points) brush.lineTo(...next);
    brush.stroke();
  }
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  stroke = { color: INKS[ink], size: Number(width.value), points: [point(event)] };
  strokes.push(stroke);
  paint();
});
canvas.addEventListener("pointermove", (event) => {
  if (!stroke) return;
  stroke.points.push(point(event));
  paint();
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { stroke = null; });

const actions = {
  undo: () => { strokes.pop(); paint(); },
  clear: () => { strokes = []; paint(); },
  send: () => trigger("submit", { picture: canvas.toDataURL("image/png") }),
};
for (const button of element.querySelectorAll("button")) {
  button.addEventListener("click", actions[button.dataset.do]);
}
paint();
