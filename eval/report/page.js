"use strict";

const films = [...document.querySelectorAll(".film")].filter((film) => film.querySelector("input")).map((film) => ({
  slider: film.querySelector("input"),
  output: film.querySelector("output"),
  pictures: [...film.querySelectorAll("img[data-class]")],
  nearest: [...film.querySelectorAll(".nearest")],
  ...JSON.parse(film.querySelector("script").textContent),
}));

function show(film, index) {
  const step = film.steps[index];
  film.slider.value = index;
  film.slider.setAttribute("aria-valuetext", `step ${step}`);
  film.output.textContent = step;
  film.pictures.forEach((picture) => {
    picture.src = film.frames[index][picture.dataset.row];
    picture.alt = `${picture.dataset.class}, step ${step}`;
  });
  film.nearest.forEach((picture) => picture.classList.toggle("away", index !== film.steps.length - 1));
}

const dialog = document.getElementById("enlarged");

function tile(strip, k, count) {
  const canvas = document.createElement("canvas");
  canvas.width = (strip.naturalWidth + 2) / count - 2;
  canvas.height = strip.naturalHeight;
  canvas.style.width = `max(${count === 1 ? 16 : 8}rem, ${canvas.width}px)`;
  canvas.getContext("2d").drawImage(strip, -k * (canvas.width + 2), 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${strip.alt}, ${k + 1} of ${count}`);
  return canvas;
}

function enlarge(button) {
  const count = Number(button.dataset.count);
  const [made, ...nearest] = [...button.querySelectorAll("img:not(.away)")];
  const name = button.closest("article").querySelector("h3").textContent;
  dialog.querySelector("h2").textContent = `${name}: ${made.alt}`;
  dialog.querySelector("p").hidden = !nearest.length;
  const figures = Array.from({ length: count }, (_, k) => {
    const figure = document.createElement("figure");
    figure.append(...[made, ...nearest].map((strip) => tile(strip, k, count)));
    if (nearest.length) {
      const caption = document.createElement("figcaption");
      caption.textContent = `distance ${nearest[0].dataset.distances.split(" ")[k]}`;
      figure.append(caption);
    }
    return figure;
  });
  dialog.querySelector("div").replaceChildren(...figures);
  dialog.showModal();
}

document.querySelectorAll(".picture").forEach((button) => button.addEventListener("click", () => enlarge(button)));
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

for (const film of films) {
  film.slider.addEventListener("input", () => {
    const index = Number(film.slider.value);
    show(film, index);
    if (document.getElementById("together")?.checked) {
      const share = index / Math.max(film.steps.length - 1, 1);
      films.filter((other) => other !== film).forEach((other) => show(other, Math.round(share * (other.steps.length - 1))));
    }
  });
}

function valueOf(cell) {
  const text = cell.dataset.value ?? cell.textContent;
  const number = Number.parseFloat(text);
  return Number.isNaN(number) ? text.trim() : number;
}

function sort(table, column, heading) {
  const ascending = heading.getAttribute("aria-sort") === "descending";
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const order = (a, b) => {
    const [x, y] = [valueOf(a.cells[column]), valueOf(b.cells[column])];
    const sign = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return ascending ? sign : -sign;
  };
  body.append(...[...body.rows].sort(order));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, column, heading));
    heading.append(button);
  });
}

async function copy(block, button) {
  try {
    await navigator.clipboard.writeText(block.textContent);
  } catch {
    getSelection().selectAllChildren(block);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
}

for (const box of document.querySelectorAll(".commands")) {
  const button = box.querySelector("button");
  button.hidden = false;
  button.addEventListener("click", () => copy(box.querySelector("pre"), button));
}
